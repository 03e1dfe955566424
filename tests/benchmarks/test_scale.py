"""The page on scale: its tables equal the program's output, and the simulation equals a computation by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import scale
from benchmarks.scale_simulation import BATCH, fetch_seconds, rows_of_nodes, simulate
from med3dvlm.datasets.ahead import OwnRows
from med3dvlm.training.trainer import WholeBatches

INPUTS: dict[str, Any] = json.loads(scale.INPUTS.read_text(encoding="utf-8"))
SMALL: dict[str, Any] = INPUTS | {"scans": 1024, "nodes": 4, "gpus_per_node": 2, "store_gbyte_per_second": 400}


def test_the_page_has_the_programs_tables(repository: Path) -> None:
    """The tables of stages 2 and 3 and of the simulation take a minute and are left out."""
    page = (repository / "docs" / "scale.md").read_text(encoding="utf-8")
    for make in (scale.given, scale.preparation, scale.limits):
        assert scale.with_table(page, make.__name__, make(INPUTS)) == page
    with pytest.raises(ValueError, match="has no line <!-- loader -->"):
        scale.with_table("nothing", "loader", [[]])


def test_work_of_stage_1_is_that_of_its_encoders() -> None:
    """The text encoder takes six operations for each weight and token; the rest is the image encoder's."""
    long, short = (scale.work_of("stage1_siglip", tokens)[0] for tokens in (256, 128))
    weights = 6 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert (long - short) / 128 == pytest.approx(6 * weights, rel=0.1)


def test_nodes_read_what_the_sampler_gives_their_processes() -> None:
    rows = rows_of_nodes(1000, 4, 2, epoch=1)
    sampler = WholeBatches(1000, 8 * BATCH, seed=0)
    sampler.set_epoch(1)
    order = list(sampler)
    for rank in range(8):
        own = OwnRows(BATCH, 8, rank)
        expected = [row for place, row in enumerate(order) if place in own]
        found = rows[:, rank // 2, rank % 2 * BATCH : (rank % 2 + 1) * BATCH]
        assert found.flatten().tolist() == expected
    shards = rows_of_nodes(1024, 4, 2, 0, own_shards=True)
    assert sorted(shards.flatten()) == list(range(1024)) and all((shards[:, node] % 4 == node).all() for node in range(4))


def test_simulated_times_by_hand() -> None:
    """Every fetch takes the same time, and a node's sixteen connections fetch the sixteen volumes of its step together."""
    even = SMALL | {"assumed": SMALL["assumed"] | {"latency_spread": 0.0}}
    each, steps = fetch_seconds(even), 1024 / (8 * BATCH)
    found = simulate(even, gpu_seconds=0.01, cache_share=0.0, ahead=0)
    assert found["ideal"] == pytest.approx(steps * BATCH * 0.01)
    assert found["seconds"] == pytest.approx(steps * (BATCH * 0.01 + each))
    assert found["fetched"] == 1024 * SMALL["measured"]["prepared_bytes"]["m3d"]
    slow = simulate(even, gpu_seconds=1.0, cache_share=0.0, ahead=128)
    assert slow["seconds"] == pytest.approx(slow["ideal"])  # fetched while the GPUs compute
    fast = simulate(even, gpu_seconds=1e-6, cache_share=0.0, ahead=128)
    assert fast["seconds"] == pytest.approx(steps * each, rel=0.05)  # the connections bound it
    own = simulate(even, gpu_seconds=0.01, cache_share=0.25, ahead=128, own_shards=True)
    assert own["fetched"] == 0 and own["seconds"] == pytest.approx(own["ideal"])
    whole = simulate(even, gpu_seconds=0.01, cache_share=1.0, ahead=128)
    share = whole["fetched"] / found["fetched"]
    assert 0.6 < share < 0.9 and not math.isclose(share, 1)  # a node has seen a quarter of all
    assert np.isfinite(whole["seconds"])

"""`python -m benchmarks.search` at a small size: its figures measure what their names say."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.search import TOP, Space, measure
from med3dvlm.search.vectors import Nearest, Vectors


@pytest.mark.slow
def test_every_method_is_measured(shell: Callable[..., str], tmp_path: Path) -> None:
    small = ("--count", 5001, "--width", 64, "--spread", 0.6, "--queries", 6, "--others", "--output", tmp_path)
    said = shell("python", "-m", "benchmarks.search", *small)
    results = json.loads((tmp_path / "search.json").read_text())
    assert (tmp_path / "search.md").read_text() in said
    assert {path.name for path in tmp_path.iterdir()} == {"search.json", "search.md", "shell.log"}  # no embeddings, no index
    ways = results["ways"]
    assert ways["exact"]["recall_scan"] == ways["exact"]["recall_text"] == 1
    assert (
        ways["index, 128 cells looked at"]["recall_scan"] > 0.99
    )  # of 71, so all; 8 bits a number cost nothing, as 100 are compared exactly
    assert ways["signs, 200 candidates"]["recall_scan"] <= ways["signs, 5000 candidates"]["recall_scan"] and len(ways) == 1 + 4 + 3 + 2
    assert all(row["milliseconds"] > 0 for row in ways.values())
    for values in results["similarity"].values():
        assert values["nearest"] > values["tenth"] > values["any"]


def test_recall_is_the_share_that_was_found() -> None:
    def half(query: Vectors) -> Nearest:
        return np.arange(5, 5 + TOP), np.ones(TOP)

    query, truth = np.ones((2, 4), np.float32), (np.arange(TOP), np.ones(TOP))
    assert measure(half, {"scan": query}, {"scan": [truth, truth]})["recall_scan"] == 0.5


def test_text_embeddings_are_generated_apart_from_images() -> None:
    space = Space(64, 0.6)
    scans, others, texts = space.draw(300), space.draw(300), space.draw(300, text=True)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([scans, texts]), axis=1), 1, atol=1e-6)
    assert (scans @ others.T).mean() > (scans @ texts.T).mean() + 0.02

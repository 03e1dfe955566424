"""Figures of the log: volumes, tokens and waiting time, counted by hand and as passed to a tracker."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from med3dvlm.models.vlm_processor import branch_mask
from med3dvlm.training.throughput import Throughput, count, figures
from tests.training.toy import train

TRACKER = """
import json
class SummaryWriter:
    def __init__(self, log_dir=None, **_):
        self.file = open({path!r}, "a")
    def add_scalar(self, name, value, step, *_, **__):
        print(json.dumps([name, float(value), int(step)]), file=self.file, flush=True)
    def add_text(self, *_, **__): pass
    def add_hparams(self, *_, **__): pass
    def flush(self): pass
    def close(self): self.file.close()
"""


def test_counts_of_batches() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert count({"pixel_values": torch.zeros(3, 1, 2, 2, 2)}) == (3, 0)
    assert [int(number) for number in count({"image_features": (torch.zeros(2, 5, 4), torch.zeros(2, 1, 4)), "attention_mask": mask})] == [
        2,
        7,
    ]
    branches = torch.tensor([[0, 0, 1, 2, -1], [0, 1, 1, -1, -1]])
    positions = torch.tensor([[0, 1, 2, 2, 0], [0, 1, 2, 0, 0]])
    packed = {"pixel_values": torch.zeros(2, 1), "attention_mask": branch_mask(branches), "position_ids": positions}
    assert [int(number) for number in count(packed)] == [2, 7]


def test_waiting_is_separated_from_computing_and_pauses() -> None:
    def slow() -> Iterator[dict[str, Any]]:
        for _ in range(3):
            time.sleep(0.1)
            yield {"pixel_values": torch.zeros(2, 1)}

    meter = Throughput()
    batches = slow()
    for _ in range(3):
        next(meter.timed(batches))
        time.sleep(0.1)
    with meter.paused():
        time.sleep(0.4)
    assert next(meter.timed(batches), None) is None
    totals = meter.totals()
    assert totals[:2].tolist() == [6, 0] and 0.6 <= totals[2] < 0.9 and 0.3 <= totals[3] < 0.45
    assert figures(totals, 1) == {"volumes_per_second": round(6 / float(totals[2]), 3), "data_wait": round(float(totals[3] / totals[2]), 4)}
    assert meter.totals()[:2].tolist() == [0, 0]
    # Two processes of one second each, waiting for 0.2 s and 0.4 s: twice the volumes a second, and the mean of the shares.
    assert figures(torch.tensor([12.0, 50.0, 2.0, 0.6]), 2) == {"volumes_per_second": 12.0, "tokens_per_second": 50.0, "data_wait": 0.3}


def test_a_tracker_gets_every_figure_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses transformers' callback for TensorBoard, with a stand-in for the writer where that is not installed."""
    written = tmp_path / "written.jsonl"
    (tmp_path / "tensorboardX.py").write_text(TRACKER.format(path=str(written)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    train(tmp_path / "run", report_to=["tensorboard"])
    found = [json.loads(line) for line in written.read_text().splitlines()]
    lines = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    for name in ("loss", "learning_rate", "data_wait"):
        assert [[f"train/{name}", line[name], line["step"]] for line in lines] == [one for one in found if one[0] == f"train/{name}"]
    assert len(lines) == 10 and all(0 <= line["data_wait"] <= 1 for line in lines)

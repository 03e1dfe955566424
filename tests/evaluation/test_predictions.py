"""Predictions on disk by several simulated and real processes, continued after interruptions."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from med3dvlm.evaluation import in_batches, predictions
from med3dvlm.evaluation.cases import predict
from tests.launching import launch

CASES = list(range(11))


class Killed(BaseException):
    pass


class Worker:
    """Answers with the case and its batch, and counts its calls; from call `dies_at` on it raises Killed."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.calls: list[list[int]] = []
        self.dies_at = dies_at

    def __call__(self, batch: Sequence[int]) -> list[dict[str, Any]]:
        if len(self.calls) == self.dies_at:
            raise Killed
        self.calls.append(list(batch))
        return [{"id": f"c{case}", "beside": list(batch), "said": "ü\u2028 "} for case in batch]


def about(case: int) -> dict[str, Any]:
    return {"id": f"c{case}"}


def run(folder: Path, worker: Worker, size: int = 2, process: tuple[int, int] = (0, 1)) -> bool:
    """Run one of several processes by itself."""
    folder.mkdir(exist_ok=True)
    if not (folder / "run.json").exists():
        (folder / "run.json").write_text('{"seconds": 1.0}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("med3dvlm.evaluation.cases.processes", lambda: process)
        patch.setattr("med3dvlm.evaluation.cases.distributed.barrier", lambda: None)
        return predict(folder / "predictions.jsonl", in_batches(CASES, size), worker, about)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    assert run(tmp_path / "whole", Worker())
    return (tmp_path / "whole" / "predictions.jsonl").read_bytes()


def test_one_process(tmp_path: Path, whole: bytes) -> None:
    rows = predictions(tmp_path / "whole" / "predictions.jsonl", [about(case) for case in CASES], lambda row: ["said"])
    assert [row["id"] for row in rows] == [f"c{case}" for case in CASES] and rows[10]["beside"] == [10]
    timings = [json.loads(line) for line in (tmp_path / "whole" / "timings.jsonl").read_text().splitlines()]
    assert [line["id"] for line in timings] == [row["id"] for row in rows] and all(line["seconds"] >= 0 for line in timings)
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["seconds"] >= 1


def test_three_processes_share_the_batches(tmp_path: Path, whole: bytes) -> None:
    workers = [Worker() for _ in range(3)]
    went_on = [run(tmp_path / "out", workers[rank], process=(rank, 3)) for rank in (2, 1, 0)]
    assert went_on == [False, False, True]
    assert sorted(sum((worker.calls for worker in workers), [])) == in_batches(CASES, 2)
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == whole
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predictions.jsonl", "run.json", "timings.jsonl"}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_several_killed_processes_are_continued_by_another_number(tmp_path: Path, whole: bytes, count: int) -> None:
    """The first of two was killed in its second batch; the other left half a line."""
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(out, Worker(dies_at=1), process=(0, 2))
    run(out, Worker(), process=(1, 2))
    part = out / "predictions.1of2.part"
    part.write_bytes(part.read_bytes()[:-20])
    kept = sum(1 for path in out.glob("*.part") for line in path.read_bytes().split(b"\n")[:-1])
    workers = [Worker() for _ in range(count)]
    for rank in reversed(range(count)):
        run(out, workers[rank], process=(rank, count))
    assert (out / "predictions.jsonl").read_bytes() == whole and not list(out.glob("*.part"))
    assert sum(len(worker.calls) for worker in workers) == len(in_batches(CASES, 2)) - kept


def test_one_killed_process_is_continued_by_several(tmp_path: Path, whole: bytes) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "out", Worker(dies_at=2))
    path = tmp_path / "out" / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-5])  # three cases and half of one
    workers = [Worker(), Worker()]
    for rank in (1, 0):
        run(tmp_path / "out", workers[rank], process=(rank, 2))
    assert path.read_bytes() == whole
    assert sorted(workers[0].calls + workers[1].calls) == in_batches(CASES, 2)[1:]


def test_lines_of_other_cases_are_refused(tmp_path: Path, whole: bytes) -> None:
    first, second, *_ = whole.split(b"\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.jsonl").write_bytes(second + b"\n" + first + b"\n")
    with pytest.raises(ValueError, match="line 1 is about c1, but c0 is expected there; delete it or choose another --output"):
        run(tmp_path / "out", Worker())
    (tmp_path / "out" / "predictions.jsonl").write_bytes(b'"a text"\n')
    with pytest.raises(ValueError, match="line 1 is about None"):
        run(tmp_path / "out", Worker())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["vqa", "report_gen", "retrieval"])
def test_two_real_processes_write_the_same_as_one(
    demo: SimpleNamespace, run_whole: Callable[..., None], tmp_path: Path, script: str
) -> None:
    model, length = (demo.clip, ()) if script == "retrieval" else (demo.model, ("--max-new-tokens", 6))
    arguments = ["--model", model, "--data", demo.root / "prepared", "--batch-size", 1, *length, "--output"]
    log = tmp_path / "log"
    assert launch("torchrun", 2, f"eval/{script}.py", *arguments, tmp_path / "two", log=log) == [0, 0], log.read_text()
    run_whole(script, *arguments, tmp_path / "one")
    for path in (tmp_path / "one").iterdir():
        if path.name not in ("run.json", "timings.jsonl"):
            assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}

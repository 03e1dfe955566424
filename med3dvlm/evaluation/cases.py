"""Predictions on disk: one line a case, written as they are made, by one process or several, and continued where they were cut short.

    predictions.jsonl           the cases in order; a run started again continues after the last whole line
    timings.jsonl               seconds of each case, its share of its batch; apart, since they are other ones in every run
    predictions.<n>of<m>.part   of several processes (torchrun, accelerate launch): what each has made, a batch a line; gone at the end

Cases are distributed by whole batches, so that a case is always computed beside the same others: predictions.jsonl has the same bytes
whatever the number of processes and however often the run was stopped.
"""

import atexit
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed
from tqdm import tqdm

from med3dvlm.files import json_lines, read_lines, write_json

Case = TypeVar("Case")
Record = dict[str, Any]
ELSEWHERE = "delete it or choose another --output"


def processes() -> tuple[int, int]:
    """Return the number of this process, from 0, and how many there are, as torchrun or accelerate launch started them."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=timedelta(days=7))  # processes wait for the slowest
        atexit.register(distributed.destroy_process_group)
    return distributed.get_rank(), distributed.get_world_size()


def is_first() -> bool:
    """Return whether this process scores: the only one, or the first of several."""
    return processes()[0] == 0


def wait_for_all() -> None:
    """Wait until every process has called this."""
    if processes()[1] > 1:
        distributed.barrier()


def predict(
    path: Path,
    batches: Sequence[Sequence[Case]],
    answer: Callable[[Sequence[Case]], list[Record]],
    expected: Callable[[Case], Record],
) -> bool:
    """Write one line a case to `path`, a batch at a time, after the lines that an earlier run left there.

    Args:
        batches: all cases in order. A batch of which some lines are there is computed again as a whole.
        answer: a batch -> one record a case.
        expected: a case -> the fields of its record that say what it is about, "id" first.

    Returns:
        `is_first()`: whether this is the process that goes on to score.

    Raises:
        ValueError: the lines that are there belong to other cases.
    """
    rank, count = processes()
    started = time.perf_counter()
    cases = [case for batch in batches for case in batch]
    firsts = [sum(map(len, batches[:place])) for place in range(len(batches))]
    if count > 1:
        done, there = len(read_lines(path)), _parts(path)
        wait_for_all()  # until all have read what is there
        missing = [
            (first, batch)
            for first, batch in zip(firsts, batches, strict=True)
            if first + len(batch) > done and (first, len(batch)) not in there
        ]
        share = missing[len(missing) * rank // count : len(missing) * (rank + 1) // count]  # neighbours, which may have work in common
        own = path.with_name(f"{path.stem}.{rank}of{count}.part")
        read_lines(own, repair=True)
        with own.open("a", encoding="utf-8") as file:
            for first, batch in tqdm(share, unit="batch", desc=path.parent.name, disable=rank > 0):
                file.write(json_lines([{"first": first, **_timed(answer, batch)}]))
                file.flush()
        wait_for_all()
        if rank:
            return False

    records = read_lines(path, repair=True)
    _check(path, records, [expected(case) for case in cases])
    there = _parts(path)
    timings = path.with_name("timings.jsonl")
    read_lines(timings, repair=True)
    with (
        path.open("a", encoding="utf-8") as file,
        timings.open("a", encoding="utf-8") as times,
        tqdm(total=len(cases), initial=len(records), unit="case", desc=path.parent.name) as progress,
    ):
        for first, batch in zip(firsts, batches, strict=True):
            missing_cases = range(max(len(records) - first, 0), len(batch))
            if not missing_cases:
                continue
            made = there.get((first, len(batch))) or _timed(answer, batch)
            kept = made["records"][missing_cases.start :]
            _check(path, kept, [expected(case) for case in batch[missing_cases.start :]], first + missing_cases.start)
            file.write(json_lines(kept))
            file.flush()
            times.write(json_lines({"id": record["id"], "seconds": made["seconds"]} for record in kept))
            progress.update(len(missing_cases))
    for part in _part_files(path):
        part.unlink()
    record = json.loads((path.parent / "run.json").read_text(encoding="utf-8-sig"))
    write_json(path.parent / "run.json", record | {"seconds": round(record["seconds"] + time.perf_counter() - started, 1)})
    return True


def predictions(path: Path, expected: Sequence[Record], texts: Callable[[Record], Iterable[str]] = lambda record: ()) -> list[Record]:
    """Return the records of all cases.

    Args:
        expected: for each case the fields that say what it is about, as for `predict`.
        texts: a record -> its fields that must hold a text, which may be empty.

    Raises:
        FileNotFoundError, ValueError: there are none, not all, those of other cases, or a record without its prediction.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run the same command without --score-only")
    records = read_lines(path)
    _check(path, records, expected)
    if len(records) < len(expected):
        raise ValueError(f"{path} holds {len(records)} of {len(expected)} cases; run the same command without --score-only, it continues")
    for number, record in enumerate(records, start=1):
        if wrong := [name for name in texts(record) if not isinstance(record.get(name), str)]:
            raise ValueError(f"{path} line {number}, about {record['id']}, has no text as {wrong[0]!r}; {ELSEWHERE}")
    return records


def in_batches(cases: Sequence[Case], size: int) -> list[Sequence[Case]]:
    """Return consecutive runs of `size` cases; the last may be shorter."""
    return [cases[first : first + size] for first in range(0, len(cases), size)]


def _timed(answer: Callable[[Sequence[Case]], list[Record]], batch: Sequence[Case]) -> Record:
    started = time.perf_counter()
    records = answer(batch)
    return {"seconds": round((time.perf_counter() - started) / len(batch), 4), "records": records}


def _part_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.*of*.part"))


def _parts(path: Path) -> dict[tuple[int, int], Record]:
    """Return the lines of several processes by the place of a batch's first case and the batch's size."""
    return {(line["first"], len(line["records"])): line for part in _part_files(path) for line in read_lines(part)}


def _check(path: Path, records: Sequence[Record], expected: Sequence[Mapping[str, Any]], before: int = 0) -> None:
    """Raise ValueError unless the records, which `before` others precede, are about the first of the expected cases."""
    for number, (record, case) in enumerate(zip(records, expected, strict=False), start=before + 1):
        found = record if isinstance(record, dict) else {}
        for name, value in case.items():
            if found.get(name) == value:
                continue
            if name == "id":
                raise ValueError(f"{path} line {number} is about {found.get('id')}, but {value} is expected there; {ELSEWHERE}")
            raise ValueError(f"{path} line {number}, about {case['id']}, has another {name} than the data; {ELSEWHERE}")
    if len(records) > len(expected):
        raise ValueError(f"{path} holds {len(records)} cases, but {len(expected)} are asked for; {ELSEWHERE}")

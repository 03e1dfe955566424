"""Record what a run has done on disk, so that a run that was killed continues.

    <out>/run.json         which models with which settings and versions; another run is refused
    <out>/progress.jsonl   a line a scan once its cases are written: their ids, or why there are none, and the state of its files
    <out>/cases/ID.json    a case
    <out>/masks/ID/        its masks

The lines of progress.jsonl belong to this machine and this run; everything else has the same bytes however often the run was stopped.
"""

import base64
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.files import differences, json_lines, read_lines, write_json
from med3dvlm.formats import state_of
from med3dvlm.worklist.scans import Scan

ELSEWHERE = "delete it or choose another --out"


class Journal:
    """The last line about each scan, and the folder of results. Lock the folder first (`locked`)."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / "progress.jsonl"
        self.lines = {line["scan"]: line for line in read_lines(self.path, repair=True)}

    def is_done(self, scan: Scan) -> bool:
        """Return whether all cases of the scan are there, made from its present files."""
        line = self.lines.get(scan.id)
        if line is None or line["failures"] or line["questions"] != list(scan.questions) or line["reading"] != _as_json(scan.reading):
            return False
        return line["state"] == state(scan) and all(self.file(id).is_file() for id in line["cases"])

    def file(self, id: str) -> Path:
        """Return the path of a case's file."""
        return self.out / "cases" / f"{id}.json"

    def masks(self, id: str) -> Path:
        return self.out / "masks" / id

    def case(self, id: str) -> dict[str, Any]:
        return dict(json.loads(self.file(id).read_text(encoding="utf-8-sig")))

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add lines about scans whose cases are written. Delete cases that an earlier run wrote for a scan and this one did not."""
        for line in lines:
            for id in set(self.lines.get(line["scan"], line)["cases"]) - set(line["cases"]):
                self.file(id).unlink(missing_ok=True)
                shutil.rmtree(self.masks(id), ignore_errors=True)
            self.lines[line["scan"]] = line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_lines(lines))
            file.flush()
            os.fsync(file.fileno())


def line_of(
    scan: Scan,
    seen: str | None,
    ids: Sequence[str],
    failures: Sequence[dict[str, str]],
    embeddings: dict[str, NDArray[np.float32]],
    seconds: float,
) -> dict[str, Any]:
    """Return the journal's line about a scan; `seen` is the state of its files before they were read."""
    packed = {id: base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode() for id, vector in embeddings.items()}
    about = {"scan": scan.id, "state": seen, "questions": list(scan.questions), "reading": _as_json(scan.reading)}
    return about | {"cases": list(ids), "failures": list(failures), "embeddings": packed, "seconds": round(seconds, 3)}


def embedding_in(line: dict[str, Any], id: str) -> NDArray[np.float32]:
    """Return the embedding (P,) float32 of a case."""
    return np.frombuffer(base64.b64decode(line["embeddings"][id]), "<f4")


def state(scan: Scan) -> str | None:
    """Return the state of a scan's files; None where they cannot be looked at."""
    try:
        return state_of(scan.path) if scan.path.exists() else None
    except OSError:
        return None


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other runs out of the folder, which is made if it does not exist.

    Raises:
        FileExistsError, ValueError: the folder holds something else, or another run writes into it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not any((out / name).exists() for name in ("run.json", ".lock")):
        raise FileExistsError(f"{out} exists and is not a folder of results; {ELSEWHERE}")
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run writes into {out}; wait for its end, or choose another --out") from None
        yield


def settle(out: Path, record: dict[str, Any]) -> None:
    """Write run.json, or check that existing results are of the same run.

    Raises:
        ValueError: models, settings or versions differ.
    """
    path = out / "run.json"
    if not path.is_file():
        write_json(path, record)
        return
    before = json.loads(path.read_text(encoding="utf-8-sig"))
    flat, other = (
        {**each.get("models", {}), **each.get("settings", {}), "versions": each.get("versions")} for each in (before, _as_json(record))
    )
    if different := differences(flat, other):
        raise ValueError(f"{out} holds results that were made with another {' and '.join(different)}; {ELSEWHERE}")

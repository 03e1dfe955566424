"""Parts of a preparation, claimed by whoever comes: jobs of a cluster share the work without being counted.

    <destination>/.claims/<job>/<part>         somebody works on this part; the file's time is renewed as long as that process lives
    <destination>/.claims/<job>/<part>.done    it is finished, or what is left of it has failed

A claim that was not renewed for `stale` seconds is a dead process's, and is taken over. Times are those of the file system, so that clocks of
machines may differ. Should two processes ever hold one claim, both do the same work and write the same bytes.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from med3dvlm.datasets.engines import open_engine
from med3dvlm.datasets.preparation import Failure, check_studies, prepare, prepare_volumes, settle
from med3dvlm.files import checksum
from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.records import Question, Study

STALE = 300.0  # seconds
WAIT = 5.0  # seconds until a process that has nothing to do looks again
CLAIMED = 16  # studies of one claim
FINISH = "finish"  # the last part: records, index, summary


class Claims:
    """Claims in a folder that all processes see."""

    def __init__(self, folder: Path, stale: float = STALE) -> None:
        self.folder, self.stale = folder, stale
        folder.mkdir(parents=True, exist_ok=True)

    def is_done(self, name: str) -> bool:
        return (self.folder / f"{name}.done").is_file()

    def take(self, name: str) -> bool:
        """Claim a part; False where it is done or somebody who lives has it."""
        path = self.folder / name
        if self.is_done(name):
            return False
        try:
            with path.open("x") as file:
                file.write(f"{socket.gethostname()} {os.getpid()}\n")
        except FileExistsError:
            if not self._is_stale(path):
                return False
            os.utime(path)  # from now on it is this process's
        return not self.is_done(name)

    def _is_stale(self, path: Path) -> bool:
        probe = self.folder / f".{uuid.uuid4().hex}"
        probe.touch()
        try:
            return probe.stat().st_mtime - path.stat().st_mtime > self.stale
        except FileNotFoundError:  # it was done in this moment
            return False
        finally:
            probe.unlink()

    def clear(self, kept: str) -> None:
        """Delete all claims but one that is done."""
        for path in self.folder.iterdir():
            if path.name != f"{kept}.done":
                path.unlink(missing_ok=True)

    @contextmanager
    def held(self, names: Sequence[str]) -> Iterator[None]:
        """Renew claims while something works, and mark them as done at its end, unless it failed."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(self.stale / 5):
                for name in names:
                    with suppress(FileNotFoundError):
                        os.utime(self.folder / name)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            raise
        finally:
            ended.set()
            thread.join()
        for name in names:
            (self.folder / f"{name}.done").touch()
            (self.folder / name).unlink(missing_ok=True)


def prepare_claimed(
    source: str | Path,
    studies: Sequence[Study],
    questions: Sequence[Question],
    processor: VolumeProcessor,
    destination: str | Path,
    workers: int = 2,
    failures: Sequence[Failure] = (),
    verify: bool = False,
    stale: float = STALE,
) -> dict[str, Any] | None:
    """Prepare volumes together with whoever else calls this, any number of processes on any machines, and finish when all are there.

    Each process claims some studies at a time. One that finds nothing left waits for the others, to take over the studies of one that dies.

    Args:
        stale: seconds after which the claim of a process that no longer renews it is taken over.

    Returns:
        What `prepare` returns, to the one process that finished; None to the others. Other arguments and errors are those of `prepare`.
    """
    source, destination = Path(source), Path(destination)
    check_studies(source, destination, studies)
    settings = settle(processor, destination)
    job = (settings, os.environ.get("SLURM_ARRAY_JOB_ID", ""), *(study.id for study in studies))
    claims = Claims(destination / ".claims" / checksum("\n".join(job).encode()), stale)
    parts = {str(start): studies[start : start + CLAIMED] for start in range(0, len(studies), CLAIMED)}
    left = list(parts)
    if claims.is_done(FINISH):  # by jobs of before: what has changed since is made anew
        return prepare(source, studies, questions, processor, destination, workers, failures, verify)
    with open_engine("local", workers) as run:
        while left and not claims.is_done(FINISH):
            mine: list[str] = []
            for name in left:
                if len(mine) * CLAIMED < workers and claims.take(name):
                    mine.append(name)
            if mine:
                with claims.held(mine):
                    prepare_volumes(source, [study for name in mine for study in parts[name]], processor, destination, run, verify)
            left = [name for name in left if not claims.is_done(name)]
            if left and not mine:
                time.sleep(min(stale / 5, WAIT))
    while not claims.is_done(FINISH):
        if claims.take(FINISH):
            with claims.held([FINISH]):
                summary = prepare(source, studies, questions, processor, destination, workers, failures)
            claims.clear(FINISH)
            return summary
        time.sleep(min(stale / 5, WAIT))
    return None

"""Parts of a preparation, claimed by whoever comes: jobs of a cluster share the work without being counted.

    <destination>/.claims/<job>/<part>         somebody works on this part; the file's time is renewed as long as that process lives
    <destination>/.claims/<job>/<part>.done    it is finished, or what is left of it has failed

A claim that is not renewed for `stale` seconds while another process watches it is a dead process's, and is taken over. Nobody compares clocks,
which may differ between machines. Should two processes ever hold one claim, both do the same work and write the same bytes.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from med3dvlm.datasets.engines import open_engine
from med3dvlm.datasets.outputs import RemoteVolumes, Volumes, open_volumes
from med3dvlm.datasets.preparation import check_studies, prepare, prepare_volumes, settle
from med3dvlm.datasets.sources import Scans, open_scans
from med3dvlm.files import checksum
from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.records import Records, Study
from med3dvlm.remote.files import Files

logger = logging.getLogger(__name__)

STALE = 300.0  # seconds
WAIT = 5.0  # seconds until a process that has nothing to do looks again
CLAIMED = 16  # studies of one claim
FINISH = "finish"  # the last part: records, index, summary


def _who() -> bytes:
    return f"{socket.gethostname()} {os.getpid()}\n".encode()


class Place(Protocol):
    """Where claims are files. `state` is another one when a file was renewed, and None where it is not there."""

    def has(self, name: str) -> bool: ...

    def create(self, name: str, content: bytes) -> bool: ...

    def renew(self, name: str) -> None: ...

    def state(self, name: str) -> object: ...

    def names(self) -> list[str]: ...

    def remove(self, name: str) -> None: ...


class Folder:
    """A folder that all processes see."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def create(self, name: str, content: bytes) -> bool:
        try:
            with (self.root / name).open("xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def renew(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.utime(self.root / name)

    def state(self, name: str) -> object:
        try:
            return (self.root / name).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        return [path.name for path in self.root.iterdir()]

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)


class Bucket:
    """A folder at an address. A store that cannot refuse to write what is there already lets two processes claim one part: see above."""

    def __init__(self, address: Files, root: str) -> None:
        self.address, self.root = address, root

    def has(self, name: str) -> bool:
        return self.address.look(f"{self.root}/{name}") is not None

    def create(self, name: str, content: bytes) -> bool:
        return self.address.create(f"{self.root}/{name}", content)

    def renew(self, name: str) -> None:
        if self.has(name):
            self.address.overwrite(f"{self.root}/{name}", _who())

    def state(self, name: str) -> object:
        return self.address.state(f"{self.root}/{name}")

    def names(self) -> list[str]:
        try:
            return [name.removeprefix(f"{self.root}/") for name in self.address.listing(self.root)]
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        self.address.remove(f"{self.root}/{name}")


class Claims:
    """Claims of one job, in a folder or a place that all processes see."""

    def __init__(self, place: Path | Place, stale: float = STALE) -> None:
        self.place: Place = Folder(place) if isinstance(place, Path) else place
        self.stale = stale
        self._watched: dict[str, tuple[object, float]] = {}  # others' claims: their last state, and since when it is that

    def is_done(self, name: str) -> bool:
        return self.place.has(f"{name}.done")

    def take(self, name: str) -> bool:
        """Claim a part; False where it is done or somebody who lives has it."""
        if self.is_done(name):
            return False
        if not self.place.create(name, _who()):
            if not self._is_stale(name):
                return False
            self.place.renew(name)  # from now on it is this process's
        return not self.is_done(name)

    def _is_stale(self, name: str) -> bool:
        """Return whether nobody has renewed a claim since this process saw it first, for longer than `stale`."""
        state, now = self.place.state(name), time.monotonic()
        if state is None:  # it was done in this moment
            return False
        if self._watched.get(name, (None, now))[0] != state:
            self._watched[name] = (state, now)
        return now - self._watched[name][1] > self.stale

    def clear(self, kept: str) -> None:
        """Delete all claims but one that is done."""
        for name in self.place.names():
            if name != f"{kept}.done":
                self.place.remove(name)

    @contextmanager
    def held(self, names: Sequence[str]) -> Iterator[None]:
        """Renew claims while something works, and mark them as done at its end, unless it failed."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(self.stale / 5):
                try:
                    for name in names:
                        self.place.renew(name)
                except OSError as error:  # if it lasts, somebody else takes the parts over, too
                    logger.warning("claims on studies could not be renewed, so another job may prepare them too: %s", error)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        done = False
        try:
            yield
            done = True
        finally:
            ended.set()
            thread.join()  # before the claims go: it would write them again
            for name in names:
                if done:
                    self.place.create(f"{name}.done", b"")
                self.place.remove(name)


def prepare_claimed(
    source: str | Path | Scans,
    records: Records,
    processor: VolumeProcessor,
    destination: str | Path | Volumes,
    workers: int = 2,
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
    volumes = open_volumes(destination)
    with open_scans(source, at_a_time=workers) as scans:
        check_studies(scans, volumes, records.studies)
        settings = settle(processor, volumes)
        job = (settings, os.environ.get("SLURM_ARRAY_JOB_ID", ""), *(study.id for study in records.studies))
        root = f".claims/{checksum(chr(10).join(job).encode())}"
        claims = Claims(Bucket(volumes.address, root) if isinstance(volumes, RemoteVolumes) else Path(volumes.name) / root, stale)
        if claims.is_done(FINISH):  # by jobs of before: what has changed since is made anew
            return prepare(scans, records, processor, volumes, workers, verify)
        with open_engine("local", workers) as run:
            _take_turns(claims, records.studies, workers, lambda mine: prepare_volumes(scans, mine, processor, volumes, run, verify))
        while not claims.is_done(FINISH):
            if claims.take(FINISH):
                with claims.held([FINISH]):
                    summary = prepare(scans, records, processor, volumes, workers)
                claims.clear(FINISH)
                return summary
            time.sleep(min(stale / 5, WAIT))
    return None


def _take_turns(claims: Claims, studies: Sequence[Study], workers: int, work: Callable[[list[Study]], object]) -> None:
    """Claim parts of the studies and work on them, until all are done, by this process or others."""
    parts = {str(start): studies[start : start + CLAIMED] for start in range(0, len(studies), CLAIMED)}
    left = list(parts)
    while left and not claims.is_done(FINISH):
        mine: list[str] = []
        for name in left:
            if len(mine) * CLAIMED < workers and claims.take(name):
                mine.append(name)
        if mine:
            with claims.held(mine):
                work([study for name in mine for study in parts[name]])
        there = set(claims.place.names())
        left = [name for name in left if f"{name}.done" not in there]
        if left and not mine:
            time.sleep(min(claims.stale / 5, WAIT))

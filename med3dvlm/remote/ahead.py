"""A process that fetches volumes into the cache before the sampler comes to them.

It is a process of its own, so that no thread is there when a loader forks its workers, and downloads take no time of the training's. What
it cannot fetch it leaves to the worker that needs it, which says why.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from med3dvlm.remote.cache import Cache
from med3dvlm.remote.store import AT_ONCE, RemoteStore, Sums

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What the process has to know of a RemoteStore."""

    address: str
    folder: str
    size: str
    volume_size: int

    @classmethod
    def of(cls, store: RemoteStore) -> "Source":
        return cls(store.address.address, str(store.cache.folder), store.cache.size_text, store.volume_size)

    def connect(self) -> RemoteStore:
        return RemoteStore(self.address, Cache(self.folder, self.size), self.volume_size)


class FetchAhead:
    """The process, which starts at once and ends with this one."""

    def __init__(self, store: RemoteStore) -> None:
        self.queued = 0
        package = Path(__file__).resolve().parents[2]
        paths = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], env=os.environ | {"PYTHONPATH": paths}, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, start_new_session=True,  # Ctrl+C is for the training
        )  # fmt: skip
        self._tell(asdict(Source.of(store)))

    def want(self, studies: Sequence[tuple[str, Sums]], passed: int) -> None:
        """Queue volumes, after the first `passed` of all that were ever queued are no longer wanted."""
        self.queued += len(studies)
        if self._process.poll() is None:
            self._tell({"passed": passed, "studies": [[study, dict(sums)] for study, sums in studies]})

    def _tell(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            logger.warning("the process that fetches volumes ahead has ended; they are now fetched one by one, which is slower")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main(lines: IO[str]) -> None:
    """Fetch what the lines ask for until there are no more: then nobody waits for it."""
    store = Source(**json.loads(lines.readline())).connect()
    queue, ready = _Queue(), threading.Semaphore(0)

    def work() -> None:
        while True:
            ready.acquire()
            if (next_one := queue.take()) is not None:
                try:
                    store.volume(*next_one)
                except (OSError, ValueError) as error:
                    logger.warning("%s", error)

    for _ in range(AT_ONCE):
        threading.Thread(target=work, daemon=True).start()
    for line in lines:
        news = json.loads(line)
        queue.add(news["passed"], news["studies"])
        ready.release(len(news["studies"]) or 1)


class _Queue:
    def __init__(self) -> None:
        self.studies: deque[tuple[int, str, Sums]] = deque()
        self.count = self.passed = 0
        self.lock = threading.Lock()

    def add(self, passed: int, studies: Iterable[tuple[str, Sums]]) -> None:
        with self.lock:
            self.passed = passed
            for study, sums in studies:
                self.studies.append((self.count, study, sums))
                self.count += 1

    def take(self) -> tuple[str, Sums] | None:
        with self.lock:
            while self.studies:
                number, study, sums = self.studies.popleft()
                if number >= self.passed:
                    return study, sums
        return None


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    main(sys.stdin)
    os._exit(0)  # downloads that are under way are left as they are

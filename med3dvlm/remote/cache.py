"""A folder of files that were fetched from elsewhere: all processes of a machine share it, and they never outgrow its size.

    <folder>/<store>/volumes/...   the files, of which those not used for longest are deleted where room is needed
    <folder>/<store>/...           records of the store, which stay: they are few
    <folder>/<store>/features/     what a training has computed and reads until it ends: results, which are neither counted nor deleted
    <folder>/locks/                each file is fetched under a lock, once for all processes; the system frees the lock of one that dies
    <folder>/used                  bytes of all files, so that nobody has to count them

A file takes its name when it is whole. A process that is killed leaves a part, which counts as used until the files are counted anew:
that is where room is needed.
"""

import argparse
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock

from med3dvlm.files import PART

SIZE = "50GB"  # of a cache
LIMIT = "most that its volumes may take, as 50GB or 2TB; records, and features that a training keeps there, are not counted"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
LOCKS = 1024  # two files of one lock wait for each other: rarely
KEPT = 0.9  # share of the size that is left full where room is made, so that files are counted seldom
ABANDONED = 3600  # seconds after which a part is a killed process's
FULL = (errno.ENOSPC, errno.EDQUOT)


class CacheFullError(OSError):
    """Nothing more can be fetched, whatever it is."""


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Raise CacheFullError in the place of an error of a full disk, on which `folder` is."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise CacheFullError(
            f"{folder}, the cache of the data, lies on a disk that is full; free some space, or name another by --data-cache"
        ) from error


def parse_bytes(text: str) -> int:
    """Parse "50GB", "800 MB", "1.5T" or "1000" to bytes.

    Raises:
        ValueError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", text.strip().upper())
    if not found or not float(found[1]):
        raise ValueError(f"{text!r} is no size; write a number and a unit, as 50GB, 800MB or 2TB")
    return int(float(found[1]) * UNITS[found[2]])


def default_folder() -> Path:
    """Return a folder in the user's folder of caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "med3dvlm" / "data"


class Cache:
    """Such a folder.

    Args:
        folder: on a disk of this machine; `default_folder` where it is empty.
        size: most bytes of the volumes in it, as `parse_bytes` takes it. What is being fetched may go beyond it by a file for each process.

    Raises:
        ValueError: the size is none.
    """

    def __init__(self, folder: str | Path = "", size: str = SIZE) -> None:
        self.folder = Path(folder).expanduser() if folder else default_folder()
        self.size, self.size_text = parse_bytes(size), size

    def require(self, needed: int, at_once: int) -> None:
        """Make the folder and see whether it can be used.

        Args:
            needed: bytes of all files that could be kept.
            at_once: bytes of the files that are in use at one time.

        Raises:
            OSError: it cannot be made or written.
            ValueError: its size, or the disk, is too small.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self.folder / f".{uuid.uuid4().hex}{PART}"
        probe.touch()
        probe.unlink()
        if self.size < at_once:
            raise ValueError(
                f"--data-cache-size is {self.size_text}, but the volumes that are read at a time take {gigabytes(at_once)}; pass a larger one, "
                "fewer workers or a smaller batch"
            )
        with self._lock("used"):
            free, used = shutil.disk_usage(self.folder).free, self._used()
        if free + used < min(self.size, needed):
            raise ValueError(
                f"{self.folder}, the cache of the data, has {gigabytes(free + used)} of disk, but --data-cache-size is {self.size_text}; pass a "
                "smaller one, free some space, or name a folder of another disk by --data-cache"
            )

    def get(self, name: str, fetch: Callable[[Path], object], expected: int = 0) -> Path:
        """Return the file of this name, made by `fetch` where it is missing, once for all processes and threads.

        It may be gone when it is opened, if the cache is so small that others need its room at once: then ask again.

        Args:
            fetch: (path to write to); what it raises is raised.
            expected: bytes, roughly.

        Raises:
            OSError: the disk is full of what is not of this cache, or the cache too small for what is fetched at the same time.
        """
        path = self.folder / name
        if _touch(path):
            return path
        with self._lock(name):
            if _touch(path):
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._fetch(path, fetch, expected)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                self._make_room(expected or 1)
                with full_disk_named(self.folder):
                    self._fetch(path, fetch, expected)
        return path

    def _fetch(self, path: Path, fetch: Callable[[Path], object], expected: int) -> None:
        aside = path.with_name(f".{uuid.uuid4().hex}{PART}")
        reserved = 0
        try:
            reserved += self._reserve(expected)
            fetch(aside)
            reserved += self._reserve(aside.stat().st_size - expected)
            aside.replace(path)
            reserved = 0
        finally:
            aside.unlink(missing_ok=True)
            self._reserve(-reserved)

    def drop(self, name: str) -> None:
        """Delete a file, one that is damaged say."""
        path = self.folder / name
        with self._lock(name), suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            self._reserve(-size)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        number = "used" if name == "used" else f"{xxhash.xxh3_64_intdigest(name.encode()) % LOCKS:04d}"
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / number):
            yield

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Lock a name for one process or thread of this machine; used for records."""
        with self._lock(name):
            yield

    def _reserve(self, size: int) -> int:
        """Count so many bytes as used, after room was made for them; gives the number."""
        if size:
            with self._lock("used"):
                used = self._used()
                if size > 0 and used + size > self.size:
                    used = self._evict(int(KEPT * self.size) - size)
                    if used + size > self.size:
                        raise OSError(
                            f"{self.folder}, the cache of the data, may hold {self.size_text} and others are using all of it; raise "
                            "--data-cache-size"
                        )
                self._set_used(used + size)
        return size

    def _make_room(self, size: int) -> None:
        """Delete files of so many bytes, and a tenth of all: the disk is full although the cache is not."""
        with self._lock("used"):
            used = sum(file.stat().st_size for file in self._files())
            self._set_used(self._evict(min(used - size, int(KEPT * used))))

    def _used(self) -> int:
        try:
            return int((self.folder / "used").read_text(encoding="utf-8-sig"))
        except (FileNotFoundError, ValueError):  # of a new cache, or of a machine that lost power
            return self._evict(self.size)

    def _set_used(self, used: int) -> None:
        (self.folder / "used").write_text(str(max(0, used)))

    def _files(self) -> list[Any]:
        return [entry for store in os.scandir(self.folder) if store.is_dir() for entry in _below(Path(store.path) / "volumes")]

    def _evict(self, goal: int) -> int:
        """Count all files and delete the least recently used of them until they take at most `goal` bytes; gives what they take."""
        states = []
        for entry in self._files():
            with suppress(FileNotFoundError):
                states.append((entry.stat(), entry.path))
        states.sort(key=lambda one: one[0].st_mtime_ns)
        used = sum(state.st_size for state, _ in states)
        for state, path in states:
            if path.endswith(PART):
                if time.time() - state.st_mtime < ABANDONED:
                    continue  # somebody is writing it
            elif used <= goal:
                continue
            with suppress(FileNotFoundError):
                os.unlink(path)
            used -= state.st_size
        return used


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a cache."""
    parser.add_argument(
        "--data-cache", default="", metavar="DIR", help="folder for volumes of data at an address (default: ~/.cache/med3dvlm/data)"
    )
    parser.add_argument("--data-cache-size", default=SIZE, metavar="SIZE", help=f"{LIMIT} (default: %(default)s)")


def cache_of(arguments: argparse.Namespace) -> Cache:
    """Return the cache that these flags describe."""
    return Cache(arguments.data_cache, arguments.data_cache_size)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 10**8 else f"{size / 1e6:.3g} MB"


def _touch(path: Path) -> bool:
    """Whether there is such a file, which is the one used last from now on."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _below(folder: Path) -> Iterator[Any]:
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir():
            yield from _below(Path(entry.path))
        else:
            yield entry

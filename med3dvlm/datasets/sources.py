"""Where a preparation reads scans: a folder of this machine, or an address (s3://, gs://, https://, see docs/cluster.md).

Of scans at an address this machine gets a folder with the data set's tables and texts, and empty files in place of the scans, so that the
layouts are read as from a disk. A scan is fetched into a folder of its own by the process that prepares it, which deletes it then.
"""

import bisect
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from med3dvlm.datasets.outputs import Line, require_seen, scratch_folder, sweep_scratch
from med3dvlm.files import checksum
from med3dvlm.formats import FORMATS, state_of
from med3dvlm.remote.address import is_address
from med3dvlm.remote.cache import Cache, full_disk_named
from med3dvlm.remote.files import Files, Listed, at_once, state_of_all

TEXTS = (".json", ".jsonl", ".csv", ".tsv", ".txt")  # what layouts read
SLICES = (".png", ".jpg", ".jpeg", ".dcm")  # no layout looks for a single one of them


class Scans(Protocol):
    """Scans that are prepared. `name` is what the user calls them; the data set's tables are read in `folder`."""

    name: str
    folder: Path

    def require(self) -> None: ...

    def path(self, file: str) -> PurePosixPath: ...

    def with_address(self, text: str) -> str: ...

    def files(self, names: Sequence[str]) -> dict[str, Listed]: ...

    def unchanged(self, names: Sequence[str], line: Line) -> bool: ...

    def here(self, files: Mapping[str, Listed]) -> Any: ...


class LocalScans:
    """Scans in a folder that all processes see."""

    def __init__(self, root: Path) -> None:
        self.name, self.folder = str(root), root
        self._resolved = root.resolve()

    def require(self) -> None:
        require_seen(self.folder)

    def path(self, file: str) -> PurePosixPath:
        return PurePosixPath(self._resolved, file)

    def with_address(self, text: str) -> str:
        """Return a text with the user's address in place of the local folder of the tables."""
        return text

    def files(self, names: Sequence[str]) -> dict[str, Listed]:
        """Return no files, as nothing has to be fetched."""
        return {}

    def unchanged(self, names: Sequence[str], line: Line) -> bool:
        """Whether the scan's files are those of a line of the index; what they hold is looked at where they are others, as after a copy."""
        return bool(line.get("untouched") == states(self.folder, names) or line["files"] == states(self.folder, names, contents=True))

    @contextmanager
    def here(self, files: Mapping[str, Listed]) -> Iterator[tuple[Path, str | None]]:
        """Yield the folder of the scan's files, and their state where it is not asked of the files."""
        yield self.folder, None


class RemoteScans:
    """Scans at an address. A pickled one does not know the list of files; each scan comes with its own."""

    def __init__(self, address: Files, folder: Path, scratch: Path, known: Mapping[str, Listed]) -> None:
        self.name, self.folder, self.address, self.scratch = address.address, folder, address, scratch
        self.known: Mapping[str, Listed] = known
        self._names = sorted(known)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"known": {}, "_names": []}

    def require(self) -> None:
        """Every machine sees an address."""

    def path(self, file: str) -> PurePosixPath:
        return PurePosixPath(self.name, file)

    def with_address(self, text: str) -> str:
        return text.replace(str(self.folder), self.name)

    def files(self, names: Sequence[str]) -> dict[str, Listed]:
        """Return the files of a scan and its masks: for each name the file itself, all files below a folder, or a header and its voxels beside it."""
        found: dict[str, Listed] = {}
        for name in names:
            prefixes = [f"{name}/"]
            if (suffix := PurePosixPath(name).suffix.lower()) in FORMATS and FORMATS[suffix].files_of:
                prefixes.append(name.removesuffix(PurePosixPath(name).suffix) + ".")
            found |= {name: self.known[name]} if name in self.known else {}
            for prefix in prefixes:
                for place in range(bisect.bisect_left(self._names, prefix), len(self._names)):
                    if not self._names[place].startswith(prefix):
                        break
                    found[self._names[place]] = self.known[self._names[place]]
        return found

    def unchanged(self, names: Sequence[str], line: Line) -> bool:
        return bool(line.get("untouched") == state_of_all(self.files(names)))

    @contextmanager
    def here(self, files: Mapping[str, Listed]) -> Iterator[tuple[Path, str | None]]:
        """Fetch the files; raises FileNotFoundError, PermissionError, CacheFullError, OSError: one sentence."""
        with scratch_folder(self.scratch) as root:
            _fetch_all(self.address, files, root)
            for name in files:  # a header that names its voxels otherwise
                suffix = PurePosixPath(name).suffix.lower()
                for path in FORMATS[suffix].files_of(root / name) if suffix in FORMATS and FORMATS[suffix].files_of else ():  # type: ignore[misc]
                    other = path.relative_to(root).as_posix()
                    if not path.exists() and (known := self.address.state(other)) is not None:
                        _fetch_all(self.address, {other: known}, root)
            yield root, state_of_all(files)


@contextmanager
def open_scans(source: str | Path | Scans, cache: Cache | None = None, at_a_time: int = 1) -> Iterator[Scans]:
    """Open scans in a folder or at an address. Messages of what is done within name the address, not the folder of its tables.

    Args:
        cache: its folder takes the scans while they are prepared, and no more of them than its size.
        at_a_time: scans.

    Raises:
        FileNotFoundError, PermissionError, OSError: the address cannot be read; ValueError: the cache is too small.
    """
    if not (isinstance(source, str) and is_address(source)):
        yield source if not isinstance(source, str | Path) else LocalScans(Path(source))
        return
    address, cache = Files(source), cache or Cache()
    try:
        known = address.listing()
    except FileNotFoundError:
        known = {}
    if not known:
        more = "; its server must give a list of files, as a page of links, for each folder" if address.http else ""
        raise FileNotFoundError(f"{address.address} holds no files{more}; check the address")
    cache.require(at_a_time * _largest(known), at_a_time * _largest(known))
    scratch = cache.folder / "scans"
    sweep_scratch(scratch)
    with scratch_folder(scratch) as folder:
        texts = {name: entry for name, entry in known.items() if name.lower().endswith(TEXTS)}
        _fetch_all(address, texts, folder)
        for name in known.keys() - texts.keys():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() not in SLICES:
                path.touch()
        try:
            yield RemoteScans(address, folder, scratch, known)
        except (OSError, ValueError) as error:
            if str(folder) not in str(error):
                raise
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError if isinstance(error, OSError) else ValueError
            raise kind(str(error).replace(str(folder), address.address)) from error


def _largest(known: Mapping[str, Listed]) -> int:
    """Return the bytes of the largest scan: a file, or the slices of a folder."""
    sizes: Counter[str] = Counter()
    for name, entry in known.items():
        path = PurePosixPath(name)
        sizes[str(path.parent) if path.suffix.lower() in ("", *SLICES) else name] += entry.size or 0
    return max(sizes.values(), default=0)


def _fetch_all(address: Files, files: Mapping[str, Listed], root: Path) -> None:
    at_once(partial(_fetch, address, root), files.items())


def _fetch(address: Files, root: Path, one: tuple[str, Listed]) -> None:
    name, known = one
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_named(root.parent):
        address.fetch_listed(name, path, known)
    os.utime(path, ns=(known.changed, known.changed))


def states(root: Path, names: Iterable[str], contents: bool = False) -> str:
    """Return the state of the local files of a scan and its masks."""
    found = [state_of(root / name, contents) for name in names]
    return found[0] if len(found) == 1 else checksum(" ".join(found).encode())

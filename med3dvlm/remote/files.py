"""The files at an address: listed, read in part, written whole and deleted.

A store of objects (s3://, gs://, az://) shows an object when all of it has arrived. Elsewhere a file is written under a hidden name and
renamed.
"""

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from med3dvlm.files import PART, checksum
from med3dvlm.remote.address import FIRST_TRIES, TRIES, Address

S = TypeVar("S")
T = TypeVar("T")

OBJECTS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory")
OWN = "memory"  # of one process
ASKED_AT_ONCE = 32  # questions of a few bytes each
FEW = 1000  # files that are asked for one by one; more are looked up in a list of all
TIMES = ("LastModified", "last_modified", "mtime", "Last-Modified", "updated", "created")  # in the words of different file systems
VERSIONS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "blob_id")


class Listed(NamedTuple):
    """A file: bytes, when it was changed (ns since 1970; 0 where nobody says), and a version of its content where the server has one."""

    size: int | None
    changed: int
    version: str

    def state(self, name: str) -> str:
        return json.dumps([name, *self])


class Files(Address):
    """Such files."""

    @property
    def whole_objects(self) -> bool:
        """Whether a file is seen only when all of it has arrived."""
        return self.address.split("://")[0] in OBJECTS

    def listing(self, below: str = "") -> dict[str, Listed]:
        """Return all files below one of its folders, by their names.

        Raises:
            FileNotFoundError: there is none; PermissionError, OSError: it cannot be listed.
        """
        found = self.patiently(below, lambda: self._found(below), FIRST_TRIES)
        if self.http:  # whose lists are pages of links
            looked = zip(found, at_once(self.look, found), strict=True)
            found = {name: info for name, info in looked if info is not None}
        return {name: _listed(info) for name, info in found.items()}

    def _found(self, below: str) -> dict[str, dict[str, Any]]:
        self._file_system()[0].invalidate_cache()
        root = self.place("")
        found = self.ask("find", self.place(below), detail=True, expected=10**8)
        names = {path.removeprefix(root).lstrip("/"): info for path, info in found.items() if path.startswith(root)}
        if self.http:
            names = {unquote(name): info for name, info in names.items() if not set("?#") & set(name)}
        return {name: info for name, info in names.items() if name and not {"..", "."} & set(PurePosixPath(name).parts)}

    def look(self, name: str) -> dict[str, Any] | None:
        """Return the file system's description of a file; None where it does not exist."""

        def info() -> dict[str, Any]:
            self._file_system()[0].invalidate_cache()
            return dict(self.ask("info", self.place(name)))

        try:
            return self.patiently(name, info)
        except FileNotFoundError:
            return None

    def state(self, name: str) -> Listed | None:
        """Return a file as in a listing; None where it does not exist."""
        found = self.look(name)
        return None if found is None else _listed(found)

    def there(self, names: Iterable[str], below: str) -> set[str]:
        """Return those names that exist, all below one of its folders."""
        names = list(names)
        if len(names) <= FEW:
            return {name for name, found in zip(names, at_once(self.look, names), strict=True) if found is not None}
        try:
            return set(names) & self.listing(below).keys()
        except FileNotFoundError:
            return set()

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes | None:
        """Return the bytes of a file, from `start` to `end` where given; None where it does not exist."""
        try:
            return bytes(self.patiently(name, lambda: self.ask("cat_file", self.place(name), start=start, end=end), FIRST_TRIES))
        except FileNotFoundError:
            return None

    def fetch_listed(self, name: str, path: Path, known: Listed) -> None:
        """Write a file that was listed to `path`, with its time; raises as `fetch`."""

        def check(path: Path) -> None:
            if known.size is not None and (size := path.stat().st_size) != known.size:
                raise ValueError(f"only {size} of {known.size} bytes arrived")

        self.fetch(name, path, check, known.size or 0)

    def put(self, path: Path, name: str) -> None:
        """Write a file whole; raises PermissionError, OSError: one sentence."""
        size = path.stat().st_size

        def write() -> None:
            place = self.place(name)
            if self.whole_objects:
                self.ask("put_file", str(path), place, expected=size)
                return
            folder = place.rpartition("/")[0]
            aside = f"{folder}/.{uuid.uuid4().hex}{PART}"
            self.ask("makedirs", folder, exist_ok=True)
            try:
                self.ask("put_file", str(path), aside, expected=size)
                self._file_system()[0].mv(aside, place)
            except BaseException:
                with suppress(OSError):
                    self.ask("rm_file", aside)
                raise

        self.patiently(name, write)

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file; False where one of this name is there."""
        self._make_folder(name)
        try:
            self.patiently(name, lambda: self.ask("pipe_file", self.place(name), content, mode="create"))
        except FileExistsError:
            return False
        return True

    def overwrite(self, name: str, content: bytes, tries: int = TRIES) -> None:
        """Write a small file."""
        self._make_folder(name)
        self.patiently(name, lambda: self.ask("pipe_file", self.place(name), content), tries)

    def _make_folder(self, name: str) -> None:
        if not self.whole_objects:
            self.ask("makedirs", self.place(name).rpartition("/")[0], exist_ok=True)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with suppress(FileNotFoundError):
            self.patiently(name, lambda: self.ask("rm_file", self.place(name)))

    def require_writable(self) -> None:
        """Write a file and delete it.

        Raises:
            ValueError: this kind of address is not written to; PermissionError, OSError: this one cannot be.
        """
        scheme = self.address.split("://")[0]
        if self.http or scheme == OWN:
            why = "can be read but not written" if self.http else "is the memory of this process, which no other sees"
            raise ValueError(f"{self.address} {why}; write to s3://, gs:// or a folder")
        probe = f".writable{PART}"  # of one name, so that the next run deletes what a killed one has left
        try:
            self.overwrite(probe, b"", FIRST_TRIES)
            self.remove(probe)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.address} cannot be written, as there is no such bucket or place; check the address") from error
        except NotImplementedError as error:
            raise ValueError(f"{self.address} can be read but not written; write to s3://, gs:// or a folder") from error


def at_once(function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """Return the function's result for each item, many at a time."""
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(pool.map(function, items))


def state_of_all(files: Mapping[str, Listed]) -> str:
    """Return 16 hexadecimal digits that change when any of the files does."""
    return checksum("\n".join(known.state(name) for name, known in sorted(files.items())).encode())


def _listed(info: Mapping[str, Any]) -> Listed:
    version = next((str(info[name]).strip('"') for name in VERSIONS if info.get(name)), "")
    changed = next((info[name] for name in TIMES if info.get(name)), None)
    size = info.get("size")
    return Listed(None if size is None else int(size), _nanoseconds(changed), version)


def _nanoseconds(time: object) -> int:
    """Convert a time in any form of file systems to nanoseconds."""
    if isinstance(time, int | float):
        return round(time * 10**6) * 1000
    if isinstance(time, str):
        time = _written_time(time)
    if not isinstance(time, datetime):
        return 0
    aware = time if time.tzinfo else time.replace(tzinfo=timezone.utc)
    return round(aware.timestamp() * 10**6) * 1000


def _written_time(text: str) -> datetime | None:
    try:
        return parsedate_to_datetime(text)  # HTTP's
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None

"""Where a preparation writes volumes and records: a folder of this machine, or an address (s3://, gs://, see docs/cluster.md)."""

import json
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from med3dvlm.files import PART, atomic_file
from med3dvlm.remote.address import is_address
from med3dvlm.remote.cache import ABANDONED, Cache
from med3dvlm.remote.files import Files, at_once

HEAD = 2**16  # bytes at the start of a volume that hold its header, nearly always

Line = dict[str, Any]  # of the index


class Volumes(Protocol):
    """Where volumes and records are written. `name` is what the user calls it; a volume, too, is a file of a name."""

    name: str

    def require(self) -> None: ...

    def require_writable(self) -> None: ...

    def path(self, file: str) -> PurePosixPath: ...

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, content: bytes) -> None: ...

    def there(self, names: Sequence[str]) -> set[str]: ...

    def lines(self, names: Sequence[str]) -> dict[str, Line]: ...

    def sizes(self) -> dict[str, int]: ...

    def here(self, name: str) -> Any: ...

    def remove(self, name: str) -> None: ...

    def sweep(self) -> None: ...


class LocalVolumes:
    """Volumes in a folder that all processes see."""

    def __init__(self, root: Path) -> None:
        self.name, self.root = str(root), root
        self._resolved = root.resolve()

    def require(self) -> None:
        require_seen(self.root / "preprocessor_config.json")

    def require_writable(self) -> None:
        """Make the folder and check that files can be written there, before anything that takes time."""
        self.root.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=self.root):
            pass

    def path(self, file: str) -> PurePosixPath:
        return PurePosixPath(self._resolved, file)

    def read(self, name: str) -> bytes | None:
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, content: bytes) -> None:
        with atomic_file(self.root / name) as aside:
            aside.write_bytes(content)

    def there(self, names: Sequence[str]) -> set[str]:
        return {name for name in names if (self.root / name).is_file()}

    def lines(self, names: Sequence[str]) -> dict[str, Line]:
        """Return the line stored in each volume; missing and foreign volumes have none."""
        return {name: line for name in names if (line := _line(self.root / name)) is not None}

    def sizes(self) -> dict[str, int]:
        """Return the bytes of all volumes."""
        files = (self.root / "volumes").rglob("*.safetensors")
        return {file.relative_to(self.root).as_posix(): file.stat().st_size for file in files}

    @contextmanager
    def here(self, name: str) -> Iterator[Path]:
        """Yield the path of a file to read."""
        yield self.root / name

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what killed processes have left."""
        for leftover in (self.root / "volumes").rglob(f".*{PART}"):
            with suppress(FileNotFoundError):  # another process has ended writing it
                if time.time() - leftover.stat().st_mtime > ABANDONED:
                    leftover.unlink()


class RemoteVolumes:
    """Volumes at an address."""

    def __init__(self, address: Files, scratch: Path) -> None:
        self.name, self.address, self.scratch = address.address, address, scratch

    def require(self) -> None:
        """Every machine sees an address."""

    def require_writable(self) -> None:
        self.address.require_writable()

    def path(self, file: str) -> PurePosixPath:
        return PurePosixPath(self.name, file)

    def read(self, name: str) -> bytes | None:
        return self.address.read(name)

    def write(self, name: str, content: bytes) -> None:
        with scratch_folder(self.scratch) as folder:
            path = folder / "file"
            path.write_bytes(content)
            self.address.put(path, name)

    def there(self, names: Sequence[str]) -> set[str]:
        return self.address.there(names, "volumes")

    def lines(self, names: Sequence[str]) -> dict[str, Line]:
        names = sorted(self.there(names))
        found = zip(names, at_once(self._line, names), strict=True)
        return {name: line for name, line in found if line is not None}

    def _line(self, name: str) -> Line | None:
        head = self.address.read(name, 0, HEAD)
        if head is None or len(head) < 8:
            return None
        length = int.from_bytes(head[:8], "little")
        if 8 + length > len(head):
            head = self.address.read(name, 0, 8 + min(length, 100 * HEAD)) or b""
        try:
            return dict(json.loads(json.loads(head[8 : 8 + length])["__metadata__"]["line"]))
        except (KeyError, TypeError, ValueError):
            return None

    def sizes(self) -> dict[str, int]:
        try:
            found = self.address.listing("volumes")
        except FileNotFoundError:
            return {}
        return {name: known.size or 0 for name, known in found.items() if name.endswith(".safetensors")}

    @contextmanager
    def here(self, name: str) -> Iterator[Path]:
        with scratch_folder(self.scratch) as folder:
            path = folder / PurePosixPath(name).name
            self.address.fetch(name, path)
            yield path

    def remove(self, name: str) -> None:
        self.address.remove(name)

    def sweep(self) -> None:
        sweep_scratch(self.scratch)
        if self.address.whole_objects:  # there is nothing half-written
            return
        with suppress(FileNotFoundError):
            for name, known in self.address.listing("volumes").items():
                if name.endswith(PART) and known.changed and time.time() - known.changed / 1e9 > ABANDONED:
                    self.address.remove(name)


def open_volumes(destination: str | Path | Volumes, cache: Cache | None = None) -> Volumes:
    """Return the folder, or the address, that volumes are written to."""
    if isinstance(destination, str) and is_address(destination):
        return RemoteVolumes(Files(destination), (cache or Cache()).folder / "scans")
    return LocalVolumes(Path(destination)) if isinstance(destination, str | Path) else destination


@contextmanager
def scratch_folder(scratch: Path) -> Iterator[Path]:
    """Yield a new folder that only this user reads, as it may hold scans; it is deleted at the end."""
    scratch.mkdir(parents=True, exist_ok=True)
    folder = scratch / f".{uuid.uuid4().hex}{PART}"
    folder.mkdir(0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_scratch(scratch: Path) -> None:
    """Delete folders of killed processes."""
    for folder in scratch.glob(f".*{PART}"):
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def _line(path: Path) -> Line | None:
    """Return a volume's line from its own file; None where there is no such file or none of ours."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()["line"]))
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None


def require_seen(path: Path) -> None:
    """Raise FileNotFoundError on a machine that does not see the folders."""
    if not path.exists():
        raise FileNotFoundError(f"machine {socket.gethostname()} does not see {path}; put it on a disk that all machines share")

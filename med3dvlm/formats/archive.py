"""A .zip of a DICOM folder, of numbered pictures or of one scan file: unpacked into a temporary folder, read and removed.

An archive comes from anywhere, so nothing it says is trusted. Nothing is written outside the temporary folder, no link is made, and
number, sizes and growth are bounded: by what the archive states before anything is written, and by what really comes out meanwhile.
Names inside are never shown, as they may name a patient.
"""

import io
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from med3dvlm.formats.base import Parts, VolumeError, damaged

MAX_ENTRIES = 20_000
MAX_LISTING = 400 * MAX_ENTRIES  # bytes of the list of names, which are 46 bytes and a path an entry
MAX_BYTES = 8 * 2**30  # unpacked
MAX_GROWTH, SMALL = 100, 2**28  # times the archive's size, for what unpacks to more than 256 MiB; scans shrink to a half or a tenth
CHUNK = 2**20
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others need memory without bound to unpack
JUNK = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")


def read(path: Path, source: str, series: int | None = None) -> Parts:
    """Read the scan in a .zip: the one scan file in it, or else what `formats.read` finds in it as a folder.

    Raises:
        VolumeError: the archive is damaged, encrypted, hostile or too large (see the module's text), or holds no scan or several.
    """
    from med3dvlm import formats  # which imports this module

    with opened(path, source) as inside:
        return formats.read(inside, source, series)


@contextmanager
def opened(path: Path, source: str) -> Iterator[Path]:
    """Yield the scan file or the folder that `read` reads, unpacked, and delete it afterwards. Raises VolumeError as `read` does."""
    from med3dvlm import formats

    with unpacked(path, source) as folder:
        files = [file for file in folder.rglob("*") if file.is_file()]
        endings = tuple(ending for ending in formats.READERS if ending != ".dcm")
        scans = [file for file in files if file.name.lower().endswith(endings)]
        if len(scans) > 1 or (scans and any(formats.dicom.is_dicom(file) for file in files)):
            raise VolumeError(f"{source}: the archive holds several scans; unpack it and give one.")
        inside = scans[0] if scans else folder
        while inside.is_dir() and len(below := list(inside.iterdir())) == 1 and below[0].is_dir():
            inside = below[0]
        yield inside


@contextmanager
def unpacked(path: Path, source: str) -> Iterator[Path]:
    """Yield a folder with the archive's files, without junk and nested archives; it is deleted afterwards.

    Raises:
        VolumeError: as `read`, where the archive itself is at fault.
    """
    with tempfile.TemporaryDirectory(prefix="med3dvlm-", ignore_cleanup_errors=True) as folder:
        try:
            with Bounded(path, source) as file, zipfile.ZipFile(file) as archive:
                entries = _checked(archive.infolist(), source)
                if not entries:
                    raise VolumeError(f"{source}: the archive holds no files other than archives; unpack these and give one scan.")
                _unpack(archive, entries, path.stat().st_size, Path(folder), source)
        except (VolumeError, MemoryError):
            raise
        except OSError as error:  # its own text would name the file inside
            raise VolumeError(f"{source}: the archive cannot be unpacked ({error.strerror}); unpack it and give the folder.") from error
        except Exception as error:  # zipfile and zlib raise many kinds on damaged bytes
            raise damaged(source, "a zip archive") from error
        yield Path(folder)


class Bounded(io.BufferedReader):
    """A file that refuses to read more at once than a list of names may take.

    zipfile reads that list in one go and makes an object of each entry: a million take seconds and a gigabyte.
    """

    def __init__(self, path: Path, source: str) -> None:
        super().__init__(io.FileIO(path))
        self.source = source

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_LISTING:
            raise too_many(self.source)
        return super().read(size)


def too_many(source: str) -> VolumeError:
    """Return the error for an archive of more entries than a scan has."""
    return VolumeError(f"{source}: the archive has more than {MAX_ENTRIES} entries; zip the folder of one scan.")


def _checked(entries: list[zipfile.ZipInfo], source: str) -> list[zipfile.ZipInfo]:
    """Return the files to unpack.

    Raises:
        VolumeError: there are too many or too large ones, or one that is encrypted, leads outside, is a link or packed in a rare way.
    """
    if len(entries) > MAX_ENTRIES:
        raise too_many(source)
    chosen = []
    for entry in entries:
        name = _name(entry)
        if name.is_absolute() or re.match("[A-Za-z]:", str(name)) or ".." in name.parts:
            raise VolumeError(
                f"{source}: the archive has entries that would be written outside of it, which no scan needs; do not trust it."
            )
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise VolumeError(f"{source}: the archive has links or devices, which are not followed; zip the files themselves.")
        if entry.is_dir() or name.suffix.lower() == ".zip" or name.name.startswith("._") or any(part in JUNK for part in name.parts):
            continue
        if entry.flag_bits & 0x1:
            raise VolumeError(f"{source}: the archive is encrypted; unpack it with its password and give the folder.")
        if entry.compress_type not in PACKINGS:
            raise VolumeError(f"{source}: the archive is packed in a way other than Deflate; unpack it and give the folder.")
        chosen.append(entry)
    if sum(entry.file_size for entry in chosen) > MAX_BYTES:
        raise _too_large(source)
    return chosen


def _name(entry: zipfile.ZipInfo) -> PurePosixPath:
    return PurePosixPath(entry.filename.replace("\\", "/"))


def _unpack(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], size: int, folder: Path, source: str) -> None:
    """Write `entries` of an archive of `size` bytes below `folder`.

    Raises:
        VolumeError: more comes out than is allowed.
        Exception: the archive is damaged.
    """
    written = 0
    for entry in entries:
        target = folder / _name(entry)
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as packed, target.open("xb") as file:
            while chunk := packed.read(CHUNK):
                written += len(chunk)
                if written > MAX_BYTES or written > max(SMALL, MAX_GROWTH * size):
                    raise _too_large(source)
                file.write(chunk)


def _too_large(source: str) -> VolumeError:
    limits = f"more than {MAX_BYTES // 2**30} GiB or {MAX_GROWTH} times its size"
    return VolumeError(f"{source}: the archive unpacks to {limits}; if it is trusted, unpack it and give the folder.")

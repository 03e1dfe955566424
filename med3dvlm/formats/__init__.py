"""Scan files, one module a family of formats. `read` finds the reader; `read_volume` makes a checked Volume of what it returns.

To add a format, write a reader of (path, source) that returns `Parts` and give it a line in FORMATS: reading, archives, preparation, the
tables of own data and the chat's uploads take the endings from there.
"""

import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import xxhash

from med3dvlm.formats import archive, arrays, dicom, folders, metaimage, nifti, nrrd
from med3dvlm.formats.base import Parts, VolumeError
from med3dvlm.formats.dicom_header import MAX_FILES
from med3dvlm.formats.hu import HU_POLICIES
from med3dvlm.formats.packed import GZIP

__all__ = ["FORMATS", "HU_POLICIES", "READERS", "VERSION", "Format", "Parts", "VolumeError", "read", "scan_files", "state_of"]

VERSION = 2  # raised when a file is read otherwise than before: prepared volumes are then made anew
SAMPLE = 16384  # bytes at the start, in the middle and at the end of a file; checksums and identifiers stand at its ends


class Format(NamedTuple):
    """A scan format: its name in words and its reader.

    `signature` is where in a file without an ending which bytes tell the format. `files_of` gives the files beside a header that hold its
    voxels; a header that is always so is `detached`. `has_series`: the reader takes the number of a series, too.
    """

    title: str
    read: Callable[..., Parts]
    signature: tuple[int, bytes] | None = None
    files_of: Callable[[Path], list[Path]] | None = None
    detached: bool = False
    has_series: bool = False


FORMATS: dict[str, Format] = {
    ".nii": Format("NIfTI", nifti.read, (344, b"n+1\0")),
    ".nii.gz": Format("NIfTI", nifti.read, (0, GZIP)),
    ".nrrd": Format("NRRD", nrrd.read, (0, b"NRRD"), nrrd.files_of),
    ".nhdr": Format("NRRD", nrrd.read, None, nrrd.files_of, detached=True),
    ".mha": Format("MetaImage", metaimage.read, (0, b"ObjectType"), metaimage.files_of),
    ".mhd": Format("MetaImage", metaimage.read, None, metaimage.files_of, detached=True),
    ".npy": Format("NumPy array", arrays.read_npy),
    ".npz": Format("NumPy array", arrays.read_npz),
    ".dcm": Format("DICOM", dicom.read, has_series=True),
    ".zip": Format("zip archive", archive.read, (0, b"PK\x03\x04"), has_series=True),
}
READERS = tuple(FORMATS)


def read(path: Path, source: str, series: int | None = None) -> Parts:
    """Read a scan: a file by its ending in `READERS` or as DICOM, a folder or an archive by its content.

    `source` names the path in messages. `series` picks one of several DICOM series, from 1; None is the likeliest.

    Raises:
        VolumeError: the format is unknown, or the reader finds no scan.
    """
    if path.is_dir():
        return folders.read(path, source, series)
    ending = next((ending for ending in READERS if path.name.lower().endswith(ending)), None)
    if path.stat().st_size == 0:
        raise VolumeError(f"{source}: the file is empty (0 bytes); copy or download it again.")
    if ending is None and dicom.is_dicom(path):
        ending = ".dcm"  # a scanner's files often have none
    if ending is None:
        known = f"{', '.join(READERS)}, a folder that holds one DICOM series or a folder of numbered PNG or JPEG slices"
        raise VolumeError(f"{source}: the ending {path.suffix!r} is not a known scan format; use {known}.")
    if FORMATS[ending].has_series:
        return FORMATS[ending].read(path, source, series)
    folders.no_series(series, source)
    return FORMATS[ending].read(path, source)


def scan_files(scan: Path) -> list[Path]:
    """Return the files that reading `scan` may open: the file and those that its header names, or all below a folder, as reading searches
    them.
    """
    if scan.is_dir():
        below = (Path(folder, name) for folder, _, names in os.walk(scan) for name in names)
        return sorted(file for file in islice(below, MAX_FILES + 1) if file.is_file())  # more are refused
    files_of = FORMATS[scan.suffix.lower()].files_of if scan.suffix.lower() in FORMATS else None
    return [scan, *(file for file in (files_of(scan) if files_of else ()) if file.is_file())]


def state_of(scan: Path, contents: bool = False) -> str:
    """Return 16 hexadecimal digits that change when any of the scan's files is added, removed, renamed, written or replaced.

    Without `contents` the file system answers, by name, size, inode and times, of which the time of change (ctime) cannot be set back: so a
    file of the same size and date is seen, too. A copy on another machine has another such state. With `contents`, name, size, date and
    three samples of what a file holds stand for it, which a copy keeps.

    Raises:
        OSError: a file cannot be looked at.
    """
    digest = xxhash.xxh3_64()
    for file in scan_files(scan):
        state = file.stat()
        found = [os.path.relpath(file, scan), state.st_size, state.st_mtime_ns]
        digest.update(json.dumps(found if contents else [*found, state.st_ctime_ns, state.st_ino]).encode())
        if contents:
            with file.open("rb") as content:
                for place in sorted({0, max(0, state.st_size // 2), max(0, state.st_size - SAMPLE)}):
                    content.seek(place)
                    digest.update(content.read(SAMPLE))
    return digest.hexdigest()

"""Which files a scan is read from, and in which state they are."""

import json
import os
from itertools import islice
from pathlib import Path

import xxhash

from med3dvlm.formats import metaimage, nrrd
from med3dvlm.formats.dicom_header import MOST_FILES

HEADERS = {".mhd": metaimage.files_of, ".mha": metaimage.files_of, ".nrrd": nrrd.files_of, ".nhdr": nrrd.files_of}
SAMPLE = 16384  # bytes at the start, in the middle and at the end of a file; checksums and identifiers stand at its ends


def scan_files(scan: Path) -> list[Path]:
    """The files that reading `scan` may open: the file and those that its header names, or all below a folder, as reading looks for them."""
    if scan.is_dir():
        below = (Path(folder, name) for folder, _, names in os.walk(scan) for name in names)
        return sorted(file for file in islice(below, MOST_FILES + 1) if file.is_file())  # more are refused
    named = HEADERS[scan.suffix.lower()](scan) if scan.suffix.lower() in HEADERS else []
    return [scan, *(file for file in named if file.is_file())]


def state_of(scan: Path, contents: bool = False) -> str:
    """16 hexadecimal digits that differ once any of the scan's files was added, removed, renamed, written or replaced.

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

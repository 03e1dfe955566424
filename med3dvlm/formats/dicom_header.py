"""What the headers of DICOM files say: every slice below a folder, before any pixel is decoded.

dicom_slices.py says what a header means.
"""

import os
import re
import zlib
from pathlib import Path
from typing import Any, NoReturn

from med3dvlm.formats.base import VolumeError
from med3dvlm.formats.dicom_slices import KEYWORDS, Slice, slices_of

MOST_FILES = 50_000  # in a folder and its subfolders; more is an archive of many studies
MOST_SLICES = 50_000  # in all files
MOST_INFLATED = 2**30  # bytes of a file that is packed as a whole


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does, with or without the 128 bytes and "DICM" before its first element."""
    with path.open("rb") as file:
        start = file.read(132)
    little = start[:2] in (b"\x02\0", b"\x08\0") and start[3:4] == b"\0"
    return start[128:] == b"DICM" or little or start[:3] == b"\0\x08\0"


def read_headers(path: Path, source: str) -> tuple[list[Slice], list[str]]:
    """Every slice in the file or below the folder `path`, and warnings. Of files that are copies one counts.

    Raises:
        VolumeError: there is no image, or the header of one is damaged.
    """
    slices: list[Slice] = []
    seen: dict[str, Path] = {}  # by SOPInstanceUID
    copies = 0
    files, damaged = dicom_files(path, source)
    for file in files:
        try:
            header = _header(file)
            if header is None:
                continue
            other = seen.setdefault(str(header.get("SOPInstanceUID") or file), file)
            if other is not file and other.read_bytes() == file.read_bytes():
                copies += 1
            else:
                slices += slices_of(file, header)
        except Exception:  # pydicom raises nearly anything on damaged bytes; they are counted and refused
            damaged += 1
        if len(slices) > MOST_SLICES:
            raise VolumeError(f"{source}: there are more than {MOST_SLICES} slices; give the folder of one study.")
    if damaged:
        raise damaged_slices(damaged, source)
    if not slices and path.is_file():
        raise VolumeError(f"{source}: this is no DICOM image but a report, a directory or the like; give the folder with the slices.")
    if not slices:
        raise VolumeError(f"{source}: the folder holds no DICOM images; give the folder with the slices.")
    return slices, [f"{copies} files are exact copies of others and are left out."] if copies else []


def damaged_slices(count: int, source: str) -> VolumeError:
    """The error for slices that cannot be read."""
    return VolumeError(f"{source}: {count} of the DICOM slices are damaged or cut short; copy them again.")


def dicom_files(path: Path, source: str) -> tuple[list[Path], int]:
    """The DICOM files at or below a path, in the order of their names, and how many others have a DICOM slice's name.

    Those are empty, zeroed or dangling links, as an interrupted copy leaves them. Links to folders are not followed.

    Raises:
        VolumeError: something below cannot be read, or there are too many files.
    """
    if path.is_file():
        return [path], 0

    def unreadable(error: OSError) -> NoReturn:  # its own text would name what lies below
        raise VolumeError(f"{source}: something below cannot be read ({error.strerror}); ask for access or copy it again.") from error

    found: list[Path] = []
    others: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=unreadable):
        folders.sort()
        for file in (Path(folder, name) for name in sorted(names)):
            try:
                (found if file.is_file() and is_dicom(file) else others).append(file)
            except OSError as error:
                unreadable(error)
        if len(found) + len(others) > MOST_FILES:
            raise VolumeError(f"{source}: there are more than {MOST_FILES} files below; give the folder of one study.")
    forms = {_form(file) for file in found}
    visible = [file for file in others if not file.name.startswith(".")]
    return found, sum(file.suffix.lower() in (".dcm", ".ima") or _form(file) in forms for file in visible)


def _form(file: Path) -> str:
    """A file's name without its numbers, which the slices of a series have in common."""
    return re.sub(r"\d+", "0", file.name.lower())


def _header(file: Path) -> Any:
    """The pydicom dataset of an image without its pixels; None for DICOM that is no image, such as a report or a directory.

    Raises:
        Exception: the header is damaged.
    """
    import pydicom

    with file.open("rb") as stream:
        certain = stream.read(132)[128:] == b"DICM"
    try:
        _check_inflated(file)
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*KEYWORDS], force=True)
        stored = pydicom.uid.UID(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
    except Exception:
        if certain:
            raise
        return None
    if "Rows" in header and "Columns" in header:
        return header
    if certain and (not stored or "Image Storage" in stored.name):
        raise ValueError("an image that was cut short")
    return None


def _check_inflated(file: Path) -> None:
    """Raises an Exception where a file that is packed as a whole unpacks to too much; pydicom would unpack it into memory."""
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    with file.open("rb") as stream:
        read_preamble(stream, True)
        meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag >> 16 != 2)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        inflater, size, packed = zlib.decompressobj(-zlib.MAX_WBITS), 0, stream.read()
    while packed and not inflater.eof:
        size += len(inflater.decompress(packed, 2**20))
        packed = inflater.unconsumed_tail
        if size > MOST_INFLATED:
            raise ValueError("too much to unpack")

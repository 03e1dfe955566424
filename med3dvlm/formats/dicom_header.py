"""Read the headers of all DICOM slices below a folder, before any pixel is decoded.

dicom_slices.py says what a header means. Each file is opened once here, and once more for its pixels.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

from med3dvlm.formats.base import VolumeError
from med3dvlm.formats.dicom_elements import DAMAGED, Header, PixelElement, Unusable, elements_before, reason, unusable
from med3dvlm.formats.dicom_pixels import DEFLATED, PIXELS, inflated
from med3dvlm.formats.dicom_slices import KEYWORDS, Slice, series_of, slices_of

MAX_FILES = 50_000  # in a folder and its subfolders; more is an archive of many studies
MAX_SLICES = 50_000  # in all files
BUFFER = 2**15  # bytes; most headers are shorter


def is_dicom(path: Path) -> bool:
    """Return whether a file begins as DICOM does, with or without the 128 bytes and "DICM" before its first element."""
    with path.open("rb") as file:
        return _begins_as_dicom(file.read(132))


def _begins_as_dicom(start: bytes) -> bool:
    little = start[:2] in (b"\x02\0", b"\x08\0") and start[3:4] == b"\0"
    return start[128:132] == b"DICM" or little or start[:3] == b"\0\x08\0"


def read_headers(path: Path, source: str) -> tuple[list[Slice], list[str]]:
    """Return every slice in the file or below the folder `path`, and warnings. Copies of a file count once.

    Raises:
        VolumeError: there is no image, or slices are damaged or cannot be read.
    """
    slices: list[Slice] = []
    seen: dict[str, Path] = {}  # by SOPInstanceUID
    problems = Counter[tuple[str, str]]()
    odd: list[tuple[tuple[str, str], str]] = []  # problem and series of what is whole but cannot be read
    found: list[Path] = []
    others: list[Path] = []
    copies = 0
    for file in _files(path, source):
        header = None
        try:
            with _opened(file, source) as stream:
                if stream is None or not (_begins_as_dicom(stream.read(132)) or file == path):
                    others.append(file)
                    continue
                found.append(file)
                header = _header(stream, file)
            if header is None:
                continue
            other = seen.setdefault(str(header.get("SOPInstanceUID") or file), file)
            if other is not file and other.read_bytes() == file.read_bytes():
                copies += 1
                continue
            those = list(slices_of(file, header))
            slices += [each._replace(notes=(*each.notes, *header.notes)) for each in those] if header.notes else those
        except VolumeError:
            raise
        except Exception as error:
            if header is not None and isinstance(error, Unusable):
                odd.append((reason(error), series_of(header)))
            else:
                problems[reason(error)] += 1
        if len(slices) > MAX_SLICES:
            raise VolumeError(f"{source}: there are more than {MAX_SLICES} slices; give the folder of one study.")
    problems[DAMAGED] += _left_by_a_copy(found, others)
    read = {each.series[-1] for each in slices}
    problems.update(problem for problem, series in odd if series in read or not slices)
    if problems.total():
        raise unusable(problems, source)
    if not slices and path.is_file():
        raise VolumeError(f"{source}: this is not a DICOM image but a report, a directory or the like; give the folder with the slices.")
    if not slices:
        raise VolumeError(f"{source}: the folder holds no DICOM images; give the folder with the slices.")
    left = Counter(problem for (problem, _), series in odd if series not in read)
    warnings = [f"{count} DICOM slices of other series {problem}; they are left out." for problem, count in left.items()]
    return slices, [*warnings, *([f"{copies} files are exact copies of others and are left out."] if copies else [])]


def dicom_files(path: Path, source: str) -> list[Path]:
    """Return the DICOM files at or below a path, in the order of their names. Links to folders are not followed.

    Raises:
        VolumeError: something below cannot be read, or there are too many files.
    """
    found = []
    for file in _files(path, source):
        with _opened(file, source) as stream:
            if stream is not None and _begins_as_dicom(stream.read(132)):
                found.append(file)
    return found


def _files(path: Path, source: str) -> Iterator[Path]:
    """Yield the files at or below a path, in the order of names."""
    if path.is_file():
        yield path
        return

    def unreadable(error: OSError) -> NoReturn:
        raise _unreadable(error, source) from error

    count = 0
    for folder, folders, names in os.walk(path, onerror=unreadable):
        folders.sort()
        count += len(names)
        if count > MAX_FILES:
            raise VolumeError(f"{source}: there are more than {MAX_FILES} files below; give the folder of one study.")
        yield from (Path(folder, name) for name in sorted(names))


@contextmanager
def _opened(file: Path, source: str) -> Iterator[BinaryIO | None]:
    """Open a file; None for anything else, such as a dangling link."""
    try:
        stream = open(file, "rb", buffering=BUFFER) if file.is_file() else None
    except OSError as error:
        raise _unreadable(error, source) from error
    if stream is None:
        yield None
        return
    with stream:
        yield stream


def _unreadable(error: OSError, source: str) -> VolumeError:
    """Return an error without the original one's text, which would name files below."""
    return VolumeError(f"{source}: something below cannot be read ({error.strerror}); ask for access or copy it again.")


def _left_by_a_copy(found: list[Path], others: list[Path]) -> int:
    """Count the other files with a DICOM slice's name: empty, zeroed or dangling links, as an interrupted copy leaves them."""
    forms = {_form(file) for file in found}
    visible = [file for file in others if not file.name.startswith(".")]
    return sum(file.suffix.lower() in (".dcm", ".ima") or _form(file) in forms for file in visible)


def _form(file: Path) -> str:
    """Return a file's name without its numbers, which the slices of a series share."""
    return re.sub(r"\d+", "0", file.name.lower())


def _header(stream: BinaryIO, file: Path) -> Header | None:
    """Read the header of an image, with the place of its pixels; None for DICOM that is no image, such as a report or a directory.

    Raises:
        Exception: it is damaged.
    """
    stream.seek(0)
    certain = stream.read(132)[128:] == b"DICM"
    try:
        header, stored = _read(stream, file, 132 if certain else 0)
    except Exception:
        if certain:
            raise
        return None
    if header.pixels is None and certain and _is_image(stored):
        if header.get("Rows") and header.get("Columns"):  # to the end of an element: nobody can tell which of both
            raise Unusable("have no pixels, as they were cut short or exported without them", "copy or export them again")
        raise EOFError("an image that was cut short")
    return None if header.pixels is None else header


def _is_image(stored: str) -> bool:
    """Return whether an object of this kind (SOP class) has pixels; a truncated one without a kind may have."""
    from pydicom.uid import UID

    return not stored or "Image Storage" in UID(stored).name


def _read(stream: BinaryIO, file: Path, start: int) -> tuple[Header, str]:
    """Read the elements of a file up to its pixels, and its kind (SOP class).

    How they are written is seen from the first of them, whatever transfer syntax the file states.
    """
    stream.seek(start)
    meta, _ = elements_before(stream, lambda tag: tag >> 16 != 2, ["TransferSyntaxUID", "MediaStorageSOPClassUID"], False, True)
    syntax = str(Header(meta).get("TransferSyntaxUID", ""))
    packed_from = stream.tell() if syntax == DEFLATED else None
    body = stream if packed_from is None else inflated(stream)
    if _next(body, 2) == b"\0\0":  # elements of a message, as a network leaves them
        elements_before(body, lambda tag: tag >> 16 != 0, [], True, True)
    first = _next(body, 6)
    little_endian = first[:1] != b"\0"
    explicit = first[4:].isalpha() and first[4:].isupper()
    elements, pixels = elements_before(body, lambda tag: tag in PIXELS, KEYWORDS, not explicit, little_endian)
    header = Header(elements)
    if pixels is not None:
        header.pixels = PixelElement(file, syntax, pixels.tag, pixels.length, pixels.place, little_endian, packed_from)
    return header, str(header.get("SOPClassUID") or Header(meta).get("MediaStorageSOPClassUID") or "")


def _next(stream: BinaryIO, count: int) -> bytes:
    """Return the next bytes without consuming them."""
    place = stream.tell()
    content = stream.read(count)
    stream.seek(place)
    return content

"""What the headers of DICOM files say: every slice below a folder, before any pixel is decoded.

A :class:`Slice` is one frame of one file. Values of a multi-frame file come from its functional groups where it has them. Patient and
UIDs are kept to be compared; nothing here or after shows them.
"""

import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from med3dvlm.formats.base import VolumeError

MOST_FILES = 50_000  # in a folder and its subfolders; more is an archive of many studies
MOST_FRAMES = 20_000  # in one file
MOST_SLICES = 50_000  # in all files
MOST_INFLATED = 2**30  # bytes of a file that is packed as a whole
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")  # transfer syntaxes of pixels that are not packed
COLOUR, SECONDARY, SCOUT = "colour image", "secondary capture", "scout (localizer)"
SECONDARY_CAPTURES, SEGMENTATIONS = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.66."  # where their SOP classes begin
# FrameIncrementPointer to FrameTime, FrameTimeVector, TimeSlotVector, PhaseVector, AngularViewVector: frames that are no slices
NO_SLICES = {0x00181063, 0x00181065, 0x00540070, 0x00540100, 0x00540090}
KEYWORDS = """SOPClassUID SOPInstanceUID ImageType Modality PatientID SeriesInstanceUID InstanceNumber ImagePositionPatient
    ImageOrientationPatient SamplesPerPixel PhotometricInterpretation NumberOfFrames FrameIncrementPointer Rows Columns BitsAllocated
    PixelRepresentation PixelSpacing ImagerPixelSpacing SpacingBetweenSlices PixelPaddingValue PixelPaddingRangeLimit RescaleSlope
    RescaleIntercept RescaleType ModalityLUTSequence SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence""".split()


class Slice(NamedTuple):
    """One frame, as its header describes it."""

    path: Path
    syntax: str  # transfer syntax, by which the pixels are decoded
    series: tuple[str, ...]  # patient and series, to be compared only
    kind: str  # "" for a slice of a scan, else why it is none
    modality: str
    size: tuple[int, int]  # rows, columns
    notes: tuple[str, ...]  # warnings that a stack with this slice deserves
    frame: int = 0  # within its file
    number: int | None = None  # InstanceNumber
    position: tuple[float, ...] | None = None  # of the first voxel, LPS mm
    orientation: tuple[float, ...] | None = None  # unit vectors along a row and along a column, LPS
    spacing: tuple[float, ...] | None = None  # between rows, between columns, mm
    distance: float | None = None  # SpacingBetweenSlices, mm
    rescale: tuple[float, float] | None = None  # slope, intercept
    hu: bool = False  # the header says that they lead to HU
    padding: tuple[int, int] | None = None  # lowest and highest stored value that stand for "no image here"


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
                slices += _slices(file, header)
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


def _slices(file: Path, header: Any) -> Iterator[Slice]:
    """The slices of an image file.

    Raises:
        Exception: the header is damaged.
    """
    modality, notes = str(header.get("Modality") or "unknown"), []
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        notes.append("the images are meant to be displayed inverted (MONOCHROME1); the values are kept as they are.")
    if "ModalityLUTSequence" in header:
        notes.append("a table of values (Modality LUT) is not applied; the values are those stored.")
    series = str(header.get("PatientID")), str(header.get("SeriesInstanceUID"))
    size = int(header.Rows), int(header.Columns)
    constant = Slice(file, _syntax(header), series, _kind(header, modality), modality, size, tuple(notes))
    if constant.kind not in ("", SECONDARY):  # what else its header says is not needed, nor always sound
        yield constant
        return
    frames = int(header.get("NumberOfFrames") or 1)
    shared, groups = header.get("SharedFunctionalGroupsSequence") or [{}], header.get("PerFrameFunctionalGroupsSequence")
    if not 1 <= frames <= MOST_FRAMES or (groups and len(groups) != frames) or min(size) < 1:
        raise ValueError("no such number of frames, rows or columns")
    if constant.syntax in NATIVE and frames * math.prod(size) * int(header.BitsAllocated) > 8 * file.stat().st_size:
        raise ValueError("more pixels than the file can hold")
    number = header.get("InstanceNumber")
    constant = constant._replace(number=None if number is None else int(number), padding=_padding(header))
    for frame in range(frames):
        if frame == 0 or groups:
            # What the file says of a position is the first frame's alone.
            described = _of_frame(constant, [groups[frame] if groups else {}, shared[0], header], positions=3 if frames == 1 else 2)
        yield described._replace(frame=frame)


def _of_frame(constant: Slice, places: Sequence[Any], positions: int) -> Slice:
    """A slice with what its file says in `places`: functional groups of the frame, those of all frames, the header itself.

    Positions count in the first so many of them.
    """
    orientation = _numbers(_stated(places, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)
    orientation = orientation if orientation and _is_direction(orientation) else None
    position = _numbers(_stated(places[:positions], "PlanePositionSequence", "ImagePositionPatient"), 3)
    spacing = _numbers(_stated(places, "PixelMeasuresSequence", "PixelSpacing"), 2)
    distance = _numbers(_stated(places, "PixelMeasuresSequence", "SpacingBetweenSlices"), 1)
    slope, intercept, meaning = (
        _stated(places, "PixelValueTransformationSequence", keyword) for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType")
    )
    rescale = None if slope is None and intercept is None else (float(1 if slope is None else slope), float(intercept or 0))
    if rescale and not (math.isfinite(rescale[0]) and rescale[0] and math.isfinite(rescale[1])):
        raise ValueError("slope and intercept are no numbers to rescale with")
    frame_type = [_stated(places[:2], f"{name}ImageFrameTypeSequence", "FrameType") for name in ("CT", "MR")]
    return constant._replace(
        kind=SCOUT if any("LOCALIZER" in (each or ()) for each in frame_type) else constant.kind,
        position=position if orientation else None,
        orientation=orientation,
        spacing=spacing if spacing and min(spacing) > 0 else None,
        distance=distance[0] if distance and distance[0] > 0 else None,
        rescale=rescale,
        hu=constant.modality == "CT" and rescale is not None and str(meaning or "HU").strip().upper() == "HU",
    )


def _stated(places: Sequence[Any], sequence: str, keyword: str) -> Any:
    """The first value of a keyword: in the functional group `sequence` of a frame, of all frames, or in the header itself."""
    for place in places:
        inner = place.get(sequence)
        value = (inner[0] if inner else place).get(keyword)
        if value is not None and value != "":
            return value
    return None


def _kind(header: Any, modality: str) -> str:
    """Why an image is no slice of a scan, in words; "" if it may be one."""
    stored, pointer = str(header.get("SOPClassUID", "")), header.get("FrameIncrementPointer")
    pointers = () if pointer is None else (pointer,) if isinstance(pointer, int) else pointer
    if modality == "SEG" or stored.startswith(SEGMENTATIONS):
        return "segmentation (SEG)"
    if modality.startswith("RT"):
        return f"radiotherapy object ({modality[:8]})"
    if int(header.get("SamplesPerPixel") or 1) > 1 or header.get("PhotometricInterpretation") == "PALETTE COLOR":
        return COLOUR
    if NO_SLICES & {int(tag) for tag in pointers}:
        return "film (frames in time, not in space)"
    if "LOCALIZER" in (header.get("ImageType") or ()):
        return SCOUT
    return SECONDARY if stored.startswith(SECONDARY_CAPTURES) else ""


def _syntax(header: Any) -> str:
    """The transfer syntax; where a file states none, the one that its header was found to be written in."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = header.original_encoding
    found = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    return str(header.file_meta.get("TransferSyntaxUID") or found)


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers of a header; None for fewer, more or others."""
    numbers = () if value is None else tuple(float(each) for each in (value if hasattr(value, "__len__") else (value,)))
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _is_direction(orientation: Sequence[float]) -> bool:
    """Whether these are two vectors of length 1 at a right angle."""
    row, column = np.reshape(orientation, (2, 3))
    return np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=0.01)


def _padding(header: Any) -> tuple[int, int] | None:
    """PixelPaddingValue, or the range to its limit, as the pixels store it (headers may write -2000 as 63536 and vice versa)."""
    value, limit = header.get("PixelPaddingValue"), header.get("PixelPaddingRangeLimit")
    if value is None:
        return None
    bits, signed = int(header.BitsAllocated), bool(header.get("PixelRepresentation"))
    stored = [int(each) % 2**bits for each in (value, value if limit is None else limit)]
    if signed:
        stored = [each - 2**bits if each >= 2 ** (bits - 1) else each for each in stored]
    return min(stored), max(stored)

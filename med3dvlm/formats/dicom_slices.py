"""What the header of a DICOM image says of its slices: where they lie, what belongs to them, and what is no slice of a scan."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MOST_FRAMES = 20_000  # in one file
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")  # transfer syntaxes of pixels that are not packed
COLOUR, SECONDARY, SCOUT = "colour image", "secondary capture", "scout (localizer)"
SECONDARY_CAPTURES, SEGMENTATIONS = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.66."  # where their SOP classes begin
# FrameIncrementPointer to FrameTime, FrameTimeVector, TimeSlotVector, PhaseVector, AngularViewVector: frames that are no slices
NO_SLICES = {0x00181063, 0x00181065, 0x00540070, 0x00540100, 0x00540090}
KEYWORDS = """SOPClassUID SOPInstanceUID ImageType Modality PatientID SeriesInstanceUID InstanceNumber ImagePositionPatient
    ImageOrientationPatient SamplesPerPixel PhotometricInterpretation NumberOfFrames FrameIncrementPointer Rows Columns BitsAllocated
    PixelRepresentation PixelSpacing ImagerPixelSpacing SpacingBetweenSlices PixelPaddingValue PixelPaddingRangeLimit RescaleSlope
    RescaleIntercept RescaleType ModalityLUTSequence WindowCenter WindowWidth SharedFunctionalGroupsSequence
    PerFrameFunctionalGroupsSequence""".split()


class Slice(NamedTuple):
    """One frame of one file, as its header describes it. Patient and UIDs are kept to be compared; nothing here or after shows them."""

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
    window: tuple[float, float] | None = None  # lowest and highest value, rescaled, that the header wants shown


def slices_of(file: Path, header: Any) -> Iterator[Slice]:
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
        window=_window(places),
    )


def _window(places: Sequence[Any]) -> tuple[float, float] | None:
    """The first window that a header states; one that is no pair of numbers is nothing to refuse a scan for."""
    with suppress(ValueError, TypeError):
        centre, width = (
            float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)
            for value in (_stated(places, "FrameVOILUTSequence", keyword) for keyword in ("WindowCenter", "WindowWidth"))
        )
        if math.isfinite(centre) and 0 < width < math.inf:
            return centre - width / 2, centre + width / 2
    return None


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

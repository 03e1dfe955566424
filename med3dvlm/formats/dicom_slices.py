"""What the header of a DICOM image says of its slices: where they lie, what belongs to them, and what is no slice of a scan."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from med3dvlm.formats.dicom_elements import Header, Unusable, stated
from med3dvlm.formats.dicom_pixels import Packing, packing_of
from med3dvlm.formats.dicom_quantity import Quantity, padding_of, quantity_of

MOST_FRAMES = 20_000  # in one file
COLOUR, SECONDARY, SCOUT = "colour image", "secondary capture", "scout (localizer)"
SECONDARY_CAPTURES, SEGMENTATIONS = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.66."  # where their SOP classes begin
# FrameIncrementPointer to FrameTime, FrameTimeVector, TimeSlotVector, PhaseVector, AngularViewVector: frames that are no slices
NO_SLICES = {0x00181063, 0x00181065, 0x00540070, 0x00540100, 0x00540090}
KEYWORDS = """SOPClassUID SOPInstanceUID ImageType Modality PatientID SeriesInstanceUID InstanceNumber ImagePositionPatient
    ImageOrientationPatient SamplesPerPixel PhotometricInterpretation NumberOfFrames FrameIncrementPointer Rows Columns BitsAllocated
    BitsStored HighBit PixelRepresentation PixelSpacing ImagerPixelSpacing SpacingBetweenSlices PixelPaddingValue PixelPaddingRangeLimit
    RescaleSlope RescaleIntercept RescaleType Units RealWorldValueMappingSequence ModalityLUTSequence WindowCenter WindowWidth
    SharedFunctionalGroupsSequence
    PerFrameFunctionalGroupsSequence""".split()


class Slice(NamedTuple):
    """One frame of one file, as its header describes it. Patient and UIDs are kept to be compared; nothing here or after shows them."""

    path: Path
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
    pixels: Packing | None = None  # None for what is no slice of a scan
    quantity: Quantity = Quantity()
    padding: tuple[int, int] | None = None  # lowest and highest stored value that stand for "no image here"
    window: tuple[float, float] | None = None  # lowest and highest value, rescaled, that the header wants shown


def slices_of(file: Path, header: Header) -> Iterator[Slice]:
    """The slices of an image file.

    Raises:
        Exception: the header cannot be read; an Unusable where it is whole.
    """
    modality, notes = str(header.get("Modality") or "unknown"), []
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        notes.append("the images are meant to be displayed inverted (MONOCHROME1); the values are kept as they are.")
    series = str(header.get("PatientID")), str(header.get("SeriesInstanceUID"))
    size = int(header.Rows), int(header.Columns)
    constant = Slice(file, series, _kind(header, modality), modality, size, tuple(notes))
    if constant.kind not in ("", SECONDARY):  # what else its header says is not needed, nor always sound
        yield constant
        return
    frames = int(header.get("NumberOfFrames") or 1)
    shared, groups = header.get("SharedFunctionalGroupsSequence") or [{}], header.get("PerFrameFunctionalGroupsSequence")
    if not 1 <= frames <= MOST_FRAMES or min(size) < 1:
        raise Unusable(f"state {frames} frames of {size[0]} x {size[1]} pixels (NumberOfFrames, Rows, Columns)")
    if groups and len(groups) != frames:
        raise Unusable(f"state {frames} frames (NumberOfFrames) and describe {len(groups)}")
    number = header.get("InstanceNumber")
    number = None if number is None else int(number)
    constant = constant._replace(number=number, padding=padding_of(header), pixels=packing_of(header, frames))
    for frame in range(frames):
        if frame == 0 or groups:
            # What the file says of a position is the first frame's alone.
            described = _of_frame(constant, [groups[frame] if groups else {}, shared[0], header], positions=3 if frames == 1 else 2)
        yield described._replace(frame=frame)


def _of_frame(constant: Slice, places: Sequence[Any], positions: int) -> Slice:
    """A slice with what its file says in `places`: functional groups of the frame, those of all frames, the header itself.

    Positions count in the first so many of them.
    """
    orientation = _numbers(stated(places, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)
    orientation = orientation if orientation and _is_direction(orientation) else None
    position = _numbers(stated(places[:positions], "PlanePositionSequence", "ImagePositionPatient"), 3)
    spacing = _numbers(stated(places, "PixelMeasuresSequence", "PixelSpacing"), 2)
    distance = _numbers(stated(places, "PixelMeasuresSequence", "SpacingBetweenSlices"), 1)
    frame_type = [stated(places[:2], f"{name}ImageFrameTypeSequence", "FrameType") for name in ("CT", "MR")]
    return constant._replace(
        kind=SCOUT if any("LOCALIZER" in (each or ()) for each in frame_type) else constant.kind,
        position=position if orientation else None,
        orientation=orientation,
        spacing=spacing if spacing and min(spacing) > 0 else None,
        distance=distance[0] if distance and distance[0] > 0 else None,
        quantity=quantity_of(places, constant.modality),
        window=_window(places),
    )


def _window(places: Sequence[Any]) -> tuple[float, float] | None:
    """The first window that a header states; one that is no pair of numbers is nothing to refuse a scan for."""
    with suppress(ValueError, TypeError):
        centre, width = (
            float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)
            for value in (stated(places, "FrameVOILUTSequence", keyword) for keyword in ("WindowCenter", "WindowWidth"))
        )
        if math.isfinite(centre) and 0 < width < math.inf:
            return centre - width / 2, centre + width / 2
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


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers of a header; None for fewer, more or others."""
    numbers = () if value is None else tuple(float(each) for each in (value if hasattr(value, "__len__") else (value,)))
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _is_direction(orientation: Sequence[float]) -> bool:
    """Whether these are two vectors of length 1 at a right angle."""
    row, column = np.reshape(orientation, (2, 3))
    return np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=0.01)

"""Describe the slices of a DICOM image by its header: where they lie, which series they belong to, and which are no slices of a scan."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from med3dvlm.formats import dicom_attributes
from med3dvlm.formats.dicom_attributes import Attributes, attributes_of, texts_of
from med3dvlm.formats.dicom_elements import Header, Unusable, stated
from med3dvlm.formats.dicom_pixels import Packing, packing_of
from med3dvlm.formats.dicom_quantity import Quantity, padding_of, quantity_of

MAX_FRAMES = 20_000  # in one file
COLOUR, SECONDARY, SCOUT = "colour image", "secondary capture", "scout (localizer)"
CLASSES = "1.2.840.10008.5.1.4.1.1."  # SOP classes of storage begin so
# Roots of SOP classes: CT, MR, US and X-ray in 3D, PET; radiographs, ultrasound, angiography, photographs
VOLUMES, PLANAR = ("2", "4", "6.2", "13.1", "128", "130"), ("1", "3", "6", "12", "77.1")
RADIOGRAPHS = {"CR", "DR", "DX", "IO", "MG", "PX", "RF", "RG", "XA"}
PICTURES = {"ES", "GM", "OP", "SM", "US", "XC"}
PROJECTIONS = {"STATIC", "DYNAMIC", "GATED", "WHOLE BODY", "TOMO", "GATED TOMO"}  # ImageType of nuclear medicine that is no volume
# FrameIncrementPointer to FrameTime, FrameTimeVector, TimeSlotVector, PhaseVector, AngularViewVector: frames that are no slices
NO_SLICES = {0x00181063, 0x00181065, 0x00540070, 0x00540100, 0x00540090}
KEYWORDS = """SOPClassUID SOPInstanceUID ImageType Modality PatientID SeriesInstanceUID InstanceNumber ImagePositionPatient
    ImageOrientationPatient SamplesPerPixel PhotometricInterpretation NumberOfFrames FrameIncrementPointer Rows Columns BitsAllocated
    BitsStored HighBit PixelRepresentation PixelSpacing ImagerPixelSpacing SpacingBetweenSlices SliceLocation SliceLocationVector
    PixelPaddingValue PixelPaddingRangeLimit RescaleSlope RescaleIntercept RescaleType Units RealWorldValueMappingSequence
    ModalityLUTSequence WindowCenter WindowWidth SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence""".split()
KEYWORDS = sorted({*KEYWORDS, *dicom_attributes.KEYWORDS})


class Slice(NamedTuple):
    """One frame of one file, as its header describes it. Patient and UIDs are kept to be compared; nothing here or after shows them."""

    path: Path
    series: tuple[str, ...]  # patient, study and series, to be compared only
    kind: str  # "" for a slice of a scan, else why it is none
    modality: str
    size: tuple[int, int]  # rows, columns
    notes: tuple[str, ...]  # warnings that a stack with this slice deserves
    frame: int = 0  # within its file
    instance: str = ""  # SOPInstanceUID, to be compared only
    number: int | None = None  # InstanceNumber
    location: float | None = None  # SliceLocation, mm
    position: tuple[float, ...] | None = None  # of the first voxel, LPS mm
    orientation: tuple[float, ...] | None = None  # unit vectors along a row and along a column, LPS
    spacing: tuple[float, ...] | None = None  # between rows, between columns, mm
    distance: float | None = None  # SpacingBetweenSlices, mm
    pixels: Packing | None = None  # None for what is no slice of a scan
    quantity: Quantity = Quantity()
    padding: tuple[int, int] | None = None  # lowest and highest stored value that stand for "no image here"
    window: tuple[float, float] | None = None  # lowest and highest value, rescaled, that the header wants shown
    attributes: Attributes = {}  # what may tell it from others at its place: see dicom_attributes.py


Stack = list[Slice]


def slices_of(file: Path, header: Header) -> Iterator[Slice]:
    """Yield the slices of an image file.

    Raises:
        Exception: the header cannot be read; an Unusable where it is whole.
    """
    modality, notes = str(header.get("Modality") or "unknown"), []
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        notes.append("the images are meant to be displayed inverted (MONOCHROME1); the values are kept as they are.")
    identity = str(header.get("PatientID")), str(header.get("StudyInstanceUID")), series_of(header)
    size = int(header.Rows), int(header.Columns)
    constant = Slice(file, identity, _kind(header, modality), modality, size, tuple(notes))
    if constant.kind not in ("", SECONDARY):  # what else its header says is not needed, nor always sound
        yield constant
        return
    frames = int(header.get("NumberOfFrames") or 1)
    shared, groups = header.get("SharedFunctionalGroupsSequence") or [], header.get("PerFrameFunctionalGroupsSequence")
    if not 1 <= frames <= MAX_FRAMES or min(size) < 1:
        raise Unusable(f"state {frames} frames of {size[0]} x {size[1]} pixels (NumberOfFrames, Rows, Columns)")
    if groups and len(groups) != frames:
        raise Unusable(f"state {frames} frames (NumberOfFrames) and describe {len(groups)}")
    number, instance = header.get("InstanceNumber"), str(header.get("SOPInstanceUID") or "")
    number = None if number is None else int(number)
    constant = constant._replace(number=number, instance=instance, padding=padding_of(header), pixels=packing_of(header, frames))
    if frames == 1 or not groups:
        first = _of_frame(constant, [*(groups or [])[:1], *shared[:1], header], in_groups=False)
        yield from [first] if frames == 1 else _following(first, header, frames)
        return
    for frame in range(frames):
        yield _of_frame(constant._replace(frame=frame), [groups[frame], *shared[:1], header], in_groups=True)


def series_of(header: Header) -> str:
    """Return what identifies a series; where de-identification removed its UID, its number serves."""
    return str(header.get("SeriesInstanceUID") or f"number {header.get('SeriesNumber')}")


def _following(first: Slice, header: Any, frames: int) -> Iterator[Slice]:
    """Yield the frames of a file that states position and distance once, for the first of them."""
    locations = _numbers(header.get("SliceLocationVector"), frames)
    distance = _numbers(header.get("SpacingBetweenSlices"), 1)
    between = distance or _numbers(header.get("SliceThickness"), 1)
    first = first._replace(location=None, attributes={**first.attributes, "file": str(first.path)})
    if first.position is None or first.orientation is None or not (locations or between):
        for frame in range(frames):
            yield first._replace(frame=frame, position=None, location=locations[frame] if locations else None)
        return
    note = "the file states the position of its first frame alone; the others are taken to follow along the normal"
    note += "." if locations or distance else ", one slice thickness apart."
    row, column = np.reshape(first.orientation, (2, 3))
    offsets = np.subtract(locations, locations[0]) if locations else np.arange(frames) * (between or (0.0,))[0]
    positions = np.array(first.position) + np.outer(offsets, np.cross(row, column))
    for frame, position in enumerate(positions.tolist()):
        yield first._replace(frame=frame, position=tuple(position), notes=(*first.notes, note))


def _of_frame(constant: Slice, places: Sequence[Any], in_groups: bool) -> Slice:
    """Make a slice from `places`: functional groups of the frame, those of all frames, the header itself.

    `in_groups`: its position stands in the former alone.
    """
    orientation = _numbers(stated(places, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)
    orientation = orientation if orientation and _is_direction(orientation) else None
    position = _numbers(stated(places[:-1] if in_groups else places, "PlanePositionSequence", "ImagePositionPatient"), 3)
    location = _numbers(places[-1].get("SliceLocation"), 1)
    spacing = _numbers(stated(places, "PixelMeasuresSequence", "PixelSpacing"), 2)
    distance = _numbers(stated(places, "PixelMeasuresSequence", "SpacingBetweenSlices"), 1)
    attributes = attributes_of(places)
    if position and orientation:
        attributes["field"] = f"{_dot(orientation[:3], position):.0f} {_dot(orientation[3:], position):.0f}"
    return constant._replace(
        kind=SCOUT if "LOCALIZER" in attributes.get("type", "").split("\\") else constant.kind,
        location=location[0] if location and not in_groups else None,
        position=position if orientation else None,
        orientation=orientation,
        spacing=spacing if spacing and min(spacing) > 0 else None,
        distance=distance[0] if distance and distance[0] > 0 else None,
        quantity=quantity_of(places, constant.modality),
        window=_window(places),
        attributes=attributes | ({"file": str(constant.path)} if in_groups else {}),
    )


def _window(places: Sequence[Any]) -> tuple[float, float] | None:
    """Return the first window that a header states, None where it is not a pair of numbers, for which no scan is refused."""
    with suppress(ValueError, TypeError):
        centre, width = (
            float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)
            for value in (stated(places, "FrameVOILUTSequence", keyword) for keyword in ("WindowCenter", "WindowWidth"))
        )
        if math.isfinite(centre) and 0 < width < math.inf:
            return centre - width / 2, centre + width / 2
    return None


def _kind(header: Any, modality: str) -> str:
    """Say why an image is no slice of a scan; "" if it may be one."""
    stored, types = str(header.get("SOPClassUID") or ""), set(texts_of(header.get("ImageType")))
    pointer = header.get("FrameIncrementPointer")
    pointers = () if pointer is None else (pointer,) if isinstance(pointer, int) else pointer

    def stored_as(roots: Sequence[str]) -> bool:
        return any(f"{stored}.".startswith(f"{CLASSES}{root}.") for root in roots)

    if modality == "SEG" or stored_as(["66.4", "66.7"]):
        return "segmentation (SEG)"
    if modality.startswith("RT"):
        return f"radiotherapy object ({modality[:8]})"
    if int(header.get("SamplesPerPixel") or 1) > 1 or header.get("PhotometricInterpretation") == "PALETTE COLOR":
        return COLOUR
    if NO_SLICES & {int(tag) for tag in pointers}:
        return "film (frames in time, not in space)"
    if types & {"LOCALIZER", "SCOUT", "TOPOGRAM"}:
        return SCOUT
    if "MOSAIC" in types:
        return "mosaic (many slices in one picture)"
    if not stored_as(VOLUMES) and "ImagePositionPatient" not in header:
        if stored_as(["20"]) and types & PROJECTIONS:
            return "projection of nuclear medicine"
        if stored_as(PLANAR) or (modality in RADIOGRAPHS | PICTURES and "SharedFunctionalGroupsSequence" not in header):
            return "picture" if modality in PICTURES else "radiograph"
    return SECONDARY if stored_as(["7"]) else ""


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """Return `count` finite numbers of a header; None for fewer, more or others."""
    numbers = () if value is None else tuple(float(each) for each in (value if hasattr(value, "__len__") else (value,)))
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _is_direction(orientation: Sequence[float]) -> bool:
    """Return whether these are two vectors of length 1 at a right angle."""
    row, column = orientation[:3], orientation[3:]
    return max(abs(_dot(row, row) - 1), abs(_dot(column, column) - 1), abs(_dot(row, column))) < 0.01


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))

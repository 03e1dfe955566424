"""DICOM: one file or a folder of them, in any of the compressions that scanners and archives use.

dicom_header.py reads the headers, dicom_slices.py says what they mean, dicom_stacks.py finds which slices make one scan,
dicom_geometry.py where they lie, and dicom_pixels.py decodes their pixels by pydicom and its plugins.

What would give a wrong volume is refused (several images at one place, mixed orientations, damaged slices); what a reader of the scan
has to know is a warning (missing slices, gantry tilt, padding); and what is no scan (scouts, secondary captures, colour pictures,
segmentations, radiotherapy objects) is left out and counted.
"""

import math
import warnings as python_warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.base import MOST_VOXELS, Parts, VolumeError
from med3dvlm.formats.dicom_geometry import geometry_of
from med3dvlm.formats.dicom_header import damaged_slices, is_dicom, read_headers
from med3dvlm.formats.dicom_pixels import pictures
from med3dvlm.formats.dicom_slices import Slice
from med3dvlm.formats.dicom_stacks import Stack, chosen, described, stacks_of

__all__ = ["is_dicom", "read", "stack_of"]


def read(path: Path, source: str, series: int | None = None) -> Parts:
    """The scan in a DICOM file, or in a folder and its subfolders: the largest stack, or number `series` of `Parts.series`.

    Slices run along the normal (row x column direction), rows and columns as stored. Slope and intercept of each slice are applied
    once; values are int16 where slopes and intercepts are whole and none lies beyond it, else float32. MONOCHROME1 concerns the display and changes
    none. Padding that lies beyond the image's own values is set to the lowest of these.

    Raises:
        VolumeError: there is no single sound stack of slices; the message says what there is instead.
    """
    with python_warnings.catch_warnings():  # pydicom's quote values, which may tell who the patient is
        python_warnings.simplefilter("ignore")
        slices, warnings = read_headers(path, source)
        stacks = stacks_of(slices, source, warnings)
        stack = chosen(stacks, series, source)
        stack, geometry = geometry_of(stack, source, warnings)
        stored = _decoded(stack, source)
    array = _values(stored, stack, warnings)
    warnings += sorted({note for each in stack for note in each.notes})
    lines = [f"{number}: {described(each)}" for number, each in enumerate(stacks, start=1)]
    lines.insert(0, lines.pop(0 if series is None else series - 1))
    first = stack[0]
    rescale = None if first.rescale == (1, 0) else first.rescale
    if len({each.rescale for each in stack}) > 1:
        rescale = (math.nan, math.nan)
    hu = all(each.hu for each in stack)
    window = stack[len(stack) // 2].window
    said: dict[str, Any] = {"warnings": tuple(warnings), "rescale": rescale, "hu": hu, "series": tuple(lines), "window": window}
    return Parts(array, modality=first.modality, **said, **geometry)


def stack_of(path: Path, source: str, series: int | None = None) -> Stack:
    """The slices of the scan that `read` gives for the same arguments, in its order.

    Raises:
        VolumeError: as `read`, where headers are damaged or hold no stack of slices.
    """
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        slices, warnings = read_headers(path, source)
        return geometry_of(chosen(stacks_of(slices, source, warnings), series, source), source, warnings)[0]


def _decoded(stack: Stack, source: str) -> list[NDArray[Any]]:
    """The stored values of each slice (H, W), in the stack's order.

    Raises:
        VolumeError: slices are damaged, or there are too many voxels.
    """
    if len(stack) * math.prod(stack[0].size) > MOST_VOXELS:
        raise VolumeError(f"{source}: {described(stack)} are more than the {MOST_VOXELS} voxels that are read; crop or resample the scan.")
    wanted: dict[Path, list[int]] = defaultdict(list)  # places in the stack, by file
    for place, each in enumerate(stack):
        wanted[each.path].append(place)
    found: dict[int, NDArray[Any]] = {}
    for places in wanted.values():
        places.sort(key=lambda place: stack[place].frame)
        file, frames = stack[places[0]], [stack[place].frame for place in places]
        try:
            for place, picture in zip(places, pictures(file.path, file.syntax, frames), strict=False):
                if picture.shape == file.size:
                    found[place] = picture
        except Exception:  # pydicom and its plugins raise nearly anything on damaged pixels; what is missing is counted
            continue
    if damaged := len(stack) - len(found):
        raise damaged_slices(damaged, source)
    return [found[place] for place in range(len(stack))]


def _values(stored: list[NDArray[Any]], stack: Stack, warnings: list[str]) -> NDArray[Any]:
    """Slope and intercept of each slice applied to its stored values: (D, H, W), int16 where that loses nothing, else float32."""
    rescales = [each.rescale or (1.0, 0.0) for each in stack]
    lowest, highest, padded = math.inf, -math.inf, 0
    for picture, each, (slope, intercept) in zip(stored, stack, rescales, strict=True):
        padding = _padding(picture, each)
        real = picture if padding is None else picture[~padding]
        padded += picture.size - real.size
        if real.size:
            ends = [slope * float(real.min()) + intercept, slope * float(real.max()) + intercept]
            lowest, highest = min(lowest, *ends), max(highest, *ends)

    whole = all(slope.is_integer() and intercept.is_integer() for slope, intercept in rescales)
    exact = whole and all(picture.dtype.kind in "iu" for picture in stored) and -32768 <= lowest <= highest <= 32767
    array = np.empty((len(stored), *stored[0].shape), np.int16 if exact else np.float32)
    replaced, example = 0, 0.0
    for place, (picture, each, (slope, intercept)) in enumerate(zip(stored, stack, rescales, strict=True)):
        values = picture * np.float64(slope) + intercept
        if padded and lowest <= highest and (padding := _padding(picture, each)) is not None:
            beyond = padding & ((values < lowest) | (values > highest))
            if beyond.any():
                replaced, example = replaced + int(beyond.sum()), float(values[beyond][0])
                values[beyond] = lowest
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and that is refused later
            array[place] = values
    if replaced:
        warnings.append(
            f"{replaced} voxels are padding ({example:g}), beyond the image's own values; they are set to its lowest, {lowest:g}."
        )
    return array


def _padding(picture: NDArray[Any], header: Slice) -> NDArray[np.bool_] | None:
    """Where the stored values (H, W) stand for "no image here"."""
    return None if header.padding is None else (picture >= header.padding[0]) & (picture <= header.padding[1])

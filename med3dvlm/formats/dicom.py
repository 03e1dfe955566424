"""DICOM: one file or a folder of them, in any of the compressions that scanners and archives use.

pydicom and its plugins decode the pixels; which slices make one scan, their order and their geometry are found here. Slices belong to
one stack if patient, series, modality, size, orientation and pixel spacing agree; the largest stack is the scan. Its slices are
ordered by their positions along the normal of their plane, never by name.

What would give a wrong volume is refused (several images at one place, mixed orientations, damaged slices); what a reader of the scan
has to know is a warning (missing slices, gantry tilt, padding); and what is no scan (scouts, secondary captures, colour pictures,
segmentations, radiotherapy objects) is left out and counted.
"""

import math
import re
import warnings as python_warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.base import MOST_VOXELS, Parts, VolumeError, colour
from med3dvlm.formats.dicom_header import COLOUR, SECONDARY, Slice, damaged_slices, is_dicom, read_headers
from med3dvlm.formats.dicom_pixels import pictures

__all__ = ["files_of", "is_dicom", "read"]
SAME_PLACE = 0.001  # mm along the normal
SHIFTED = 1.0  # mm by which slices may lie beside the straight line through the stack
TILTED = 1.0  # degrees
Stack = list[Slice]


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
        stacks = _stacks(slices, source, warnings)
        stack = _chosen(stacks, series, source)
        stack, geometry = _geometry(stack, source, warnings)
        stored = _decoded(stack, source)
    array = _values(stored, stack, warnings)
    warnings += sorted({note for each in stack for note in each.notes})
    lines = [f"{number}: {_described(each)}" for number, each in enumerate(stacks, start=1)]
    lines.insert(0, lines.pop(0 if series is None else series - 1))
    first = stack[0]
    rescale = None if first.rescale == (1, 0) else first.rescale
    if len({each.rescale for each in stack}) > 1:
        rescale = (math.nan, math.nan)
    hu = all(each.hu for each in stack)
    return Parts(array, modality=first.modality, warnings=tuple(warnings), rescale=rescale, hu=hu, series=tuple(lines), **geometry)


def files_of(path: Path, source: str, series: int | None = None) -> list[Path]:
    """The files that hold the slices of the scan that `read` gives for the same arguments, by name.

    Raises:
        VolumeError: as `read`, where headers are damaged or hold no stack of slices.
    """
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        slices, warnings = read_headers(path, source)
        return sorted({each.path for each in _chosen(_stacks(slices, source, warnings), series, source)})


# Which slices


def _stacks(slices: list[Slice], source: str, warnings: list[str]) -> list[Stack]:
    """The stacks that may be scans, the largest first; what is left out goes into `warnings`.

    Raises:
        VolumeError: there is none.
    """
    alike: dict[Any, list[Stack]] = defaultdict(list)
    for each in slices:
        stated = each.orientation is None, each.position is None, each.spacing is None
        groups = alike[each.series, each.kind, each.modality, each.size, stated]
        # The last of them only, so that thousands of orientations take no hours.
        group = next((group for group in groups[-50:] if _same_plane(group[0], each)), None)
        if group is None:
            groups.append(group := [])
        group.append(each)
    stacks = sorted((group for groups in alike.values() for group in groups), key=lambda group: (-len(group), group[0].series))
    chosen = [stack for stack in stacks if len(stack) > 1 and not stack[0].kind]
    if not chosen:  # some archives know nothing but secondary captures
        chosen = [stack for stack in stacks if len(stack) > 1 and stack[0].kind == SECONDARY]
    left = Counter[str]()
    for stack in stacks:
        if not any(stack is each for each in chosen):
            left[stack[0].kind or "single image of another series, size or orientation"] += len(stack)
    counts = ", ".join(f"{count} x {kind}" for kind, count in left.most_common())
    if not chosen:
        raise _no_scan(stacks, counts, source)
    if counts:
        warnings.append(f"left out as no part of the scan: {counts}.")
    if (patients := len({stack[0].series[0] for stack in chosen})) > 1:
        warnings.append(f"the scans found are of {patients} patients.")
    return chosen


def _same_plane(one: Slice, other: Slice) -> bool:
    """Whether orientation and pixel spacing agree to 0.001."""
    pairs = zip((one.orientation or ()) + (one.spacing or ()), (other.orientation or ()) + (other.spacing or ()), strict=True)
    return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3) for a, b in pairs)


def _no_scan(stacks: list[Stack], counts: str, source: str) -> VolumeError:
    kinds = {stack[0].kind for stack in stacks}
    if kinds == {COLOUR}:
        return colour(source)
    if kinds != {""}:
        return VolumeError(f"{source}: there is no scan here but {counts}; give the folder of the scan itself.")
    if len(stacks) == 1:
        rows, columns = stacks[0][0].size
        return VolumeError(f"{source}: this is a 2D image ({rows}x{columns}); give the folder with all slices of the scan.")
    orientations = "series, sizes or orientations are mixed, so no two make a stack"
    return VolumeError(f"{source}: these are {len(stacks)} single 2D images ({orientations}); give the folder with all slices of one scan.")


def _chosen(stacks: list[Stack], series: int | None, source: str) -> Stack:
    """Number `series` from 1, or the first.

    Raises:
        VolumeError: there is no such number, or the first is a small part of a series that mixes orientations.
    """
    listed = "; ".join(f"{number}: {_described(stack)}" for number, stack in enumerate(stacks, start=1))
    if series is not None and not 1 <= series <= len(stacks):
        raise VolumeError(f"{source}: there is no series {series}; choose one of {listed}.")
    if series is not None:
        return stacks[series - 1]
    siblings = [stack for stack in stacks if stack[0].series == stacks[0][0].series and stack[0].orientation is not None]
    if siblings and 2 * len(stacks[0]) <= sum(map(len, siblings)):
        raise VolumeError(f"{source}: one series mixes {len(siblings)} orientations or sizes; choose one with series=, of {listed}.")
    return stacks[0]


def _described(stack: Stack) -> str:
    rows, columns = stack[0].size
    return f"{len(stack)} slices of {rows} x {columns}, {stack[0].modality[:16]}{', ' + stack[0].kind if stack[0].kind else ''}"


# Where they lie


def _geometry(stack: Stack, source: str, warnings: list[str]) -> tuple[Stack, dict[str, Any]]:
    """The stack in order, and what is known of the fields axes, spacing and direction of `Parts`."""
    first = stack[0]
    if first.spacing is None:
        warnings.append("the DICOM files state no PixelSpacing (ImagerPixelSpacing would be that of the detector, not of the patient).")
    if first.position is None or first.orientation is None:
        distinct = len({(each.number, each.frame) for each in stack}) == len(stack)
        order = "instance and frame numbers" if distinct else "file names"
        warnings.append(f"the DICOM files state no slice positions; the order of the slices is that of their {order}.")
        stack = sorted(stack, key=lambda each: (each.number or 0, _natural(each.path), each.frame))
        return stack, {"spacing": (first.distance, *first.spacing)} if first.distance and first.spacing else {}

    row, column = np.reshape(first.orientation, (2, 3))
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    stack = sorted(stack, key=lambda each: float(np.dot(each.position or (), normal)))
    distance = _distance(np.array([each.position for each in stack]), normal, source, warnings)
    direction = np.diag([-1.0, -1.0, 1.0]) @ np.stack([row, column, normal], axis=1)  # from LPS to RAS
    if first.spacing is None:
        return stack, {"direction": direction}
    return stack, {"axes": direction * (first.spacing[1], first.spacing[0], distance)}


def _natural(path: Path) -> list[Any]:
    """A key that sorts 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def _distance(positions: NDArray[np.float64], normal: NDArray[np.float64], source: str, warnings: list[str]) -> float:
    """The usual distance in mm between neighbouring slices at `positions` (slices, 3), in order; oddities go into `warnings`.

    Raises:
        VolumeError: several slices lie at one place.
    """
    heights = positions @ normal
    gaps = np.diff(heights)
    if gaps.min() < SAME_PLACE:
        starts = np.flatnonzero(np.diff(heights, prepend=-np.inf) >= SAME_PLACE)
        times = set(np.diff(starts, append=len(heights)).tolist())
        kind = (
            f"a 4D series, {times.pop()} times each (phases, echoes or time points)" if len(times) == 1 else "duplicates or several scans"
        )
        count = f"{len(heights)} slices at {len(starts)} places are no single stack"
        raise VolumeError(f"{source}: {count} but {kind}; put one stack in a folder of its own.")

    usual = float(np.median(gaps))
    missing = np.rint(gaps / usual).astype(int) - 1
    missing[np.abs(gaps / usual - missing - 1) > 0.1] = 0
    if gaps.max() - gaps.min() > 0.1 * usual:
        spread = f"slice distances vary from {gaps.min():.2f} to {gaps.max():.2f} mm"
        if missing.any():
            places = np.flatnonzero(missing)
            after = ", ".join(f"{missing[place]} after slice {place + 1}" for place in places[:5]) + (", ..." if len(places) > 5 else "")
            spread += f", as {missing.sum()} of {len(heights) + missing.sum()} slices seem to be missing ({after})"
        warnings.append(f"{spread}; {usual:.2f} mm is used for all and nothing is filled in.")
    path = positions[-1] - positions[0]
    if (tilt := math.degrees(math.acos(min(1.0, abs(path @ normal) / np.linalg.norm(path))))) > TILTED:
        warnings.append(f"the gantry was tilted by {tilt:.0f} degrees; slices are stacked without correcting that.")
    line = positions[0] + np.outer((heights - heights[0]) / (heights[-1] - heights[0]), path)
    if (aside := np.linalg.norm(positions - line, axis=1).max()) > SHIFTED:
        warnings.append(f"slices are shifted within their plane by up to {aside:.1f} mm against each other, which is not corrected.")
    return usual


# What they hold


def _decoded(stack: Stack, source: str) -> list[NDArray[Any]]:
    """The stored values of each slice (H, W), in the stack's order.

    Raises:
        VolumeError: slices are damaged, or there are too many voxels.
    """
    if len(stack) * math.prod(stack[0].size) > MOST_VOXELS:
        raise VolumeError(f"{source}: {_described(stack)} are more than the {MOST_VOXELS} voxels that are read; crop or resample the scan.")
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

"""Where the slices of a DICOM stack lie: their order along the normal of their plane, never by name, and their distances."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.base import VolumeError
from med3dvlm.formats.dicom_stacks import Stack

SAME_PLACE = 0.001  # mm along the normal
SHIFTED = 1.0  # mm by which slices may lie beside the straight line through the stack
TILTED = 1.0  # degrees


def geometry_of(stack: Stack, source: str, warnings: list[str]) -> tuple[Stack, dict[str, Any]]:
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

"""Geometry of a DICOM stack: the order of slices along the normal of their plane, never by file name, and the steps between them."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.dicom_slices import MAX_FRAMES, Stack

SAME_PLACE = 0.1  # pixels along the normal
SAME_PLACE_MM = 0.01  # where the size of a pixel is unknown
BY_NUMBER = 0.5  # where numbers stand for places
UNEVEN = 0.1  # of the usual distance
SHIFTED = 1.0  # mm by which slices may lie beside the straight line through the stack
TURNED = 0.05  # degrees by which slices of one stack may be turned without a word
SLAB = 3  # so many long distances of one length in a row are a thicker part of the scan, not missing slices
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def heights_of(stack: Stack) -> tuple[NDArray[np.float64], float] | None:
    """Return the position of each slice (slices,) along the normal in mm, and the distance below which two slices lie at one place.

    By SliceLocation where there are no positions; by the instance and frame numbers where there is neither, which count as 1 apart; None
    where nothing says.
    """
    first = stack[0]  # positions and orientations are stated in all slices of a stack or in none
    near = SAME_PLACE * min(first.spacing) if first.spacing else SAME_PLACE_MM
    if first.position is not None and first.orientation is not None:
        return np.array([each.position for each in stack]) @ _plane(stack)[2], near
    locations = [each.location for each in stack if each.location is not None]
    if len(locations) == len(stack) and np.ptp(locations) > near:
        return np.array(locations), near
    numbers = [each.number * MAX_FRAMES + each.frame for each in stack if each.number is not None]
    if len(numbers) == len(stack) and np.ptp(numbers) > 0:
        return np.array(numbers, dtype=np.float64), BY_NUMBER
    return None


def places_of(heights: NDArray[np.float64], near: float) -> NDArray[np.intp]:
    """Return the number of each slice's place from 0, upwards; slices less than `near` above the next share one."""
    order = np.argsort(heights, kind="stable")
    places = np.empty(len(heights), dtype=np.intp)
    places[order] = np.cumsum(np.diff(heights[order], prepend=heights[order[0]]) >= near)
    return places


def uneven(heights: NDArray[np.float64]) -> int:
    """Count how often, from slice to slice, the distance to the next changes: never in an even stack, once between two slabs."""
    gaps = np.diff(np.sort(heights))
    return int((np.abs(np.diff(gaps)) > UNEVEN * np.minimum(gaps[1:], gaps[:-1])).sum())


def geometry_of(stack: Stack, warnings: list[str]) -> tuple[Stack, dict[str, Any]]:
    """Return the stack in order, and those of the fields axes, origin, spacing, direction and slice_positions of `Parts` that are known.

    Slices run along the normal of their plane (row x column direction). The axis from slice to slice is the true one: with a tilted gantry it
    leaves the normal. No two slices may lie at one place.
    """
    first = stack[0]
    if first.spacing is None:
        warnings.append("the DICOM files state no PixelSpacing (ImagerPixelSpacing would be that of the detector, not of the patient).")
    found = heights_of(stack)
    if first.position is None and (found is None or found[1] == BY_NUMBER):
        distinct = len({(each.number, each.frame) for each in stack}) == len(stack)
        order = "instance and frame numbers" if distinct else "file names"
        warnings.append(f"the DICOM files state no slice positions; the order of the slices is that of their {order}.")
        stack = sorted(stack, key=lambda each: (each.number or 0, natural_key(each.path), each.frame))
        return stack, {"spacing": (first.distance, *first.spacing)} if first.distance and first.spacing else {}

    assert found is not None
    heights, plane = found[0], None if first.orientation is None else _plane(stack)
    if first.position is None:
        towards = "" if plane is None else ", taken to grow towards the head, the back or the left"
        warnings.append(f"the DICOM files state no slice positions; SliceLocation is used instead{towards}.")
        if plane is not None and plane[2][np.abs(plane[2]).argmax()] < 0:
            heights = -heights
    upwards = np.argsort(heights, kind="stable")
    stack, heights = [stack[place] for place in upwards], heights[upwards]
    distance, positions = _distance(heights, warnings)
    if plane is None:
        return stack, {"spacing": (distance, *first.spacing), "slice_positions": positions} if first.spacing else {}

    row, column, normal = plane
    drift = normal
    if first.position is not None:
        drift = _drift(np.array([each.position for each in stack]), heights, normal, found[1], warnings)
    _check_turns(stack, plane, warnings)
    if first.spacing is None:
        return stack, {"direction": LPS_TO_RAS @ np.stack([row, column, drift / np.linalg.norm(drift)], axis=1)}
    axes = LPS_TO_RAS @ np.stack([row * first.spacing[1], column * first.spacing[0], drift * distance], axis=1)
    origin = None if stack[0].position is None else LPS_TO_RAS @ np.array(stack[0].position, dtype=np.float64)
    return stack, {"axes": axes, "origin": origin, "slice_positions": positions}


def _plane(stack: Stack) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean directions of rows and columns and their normal, of length 1, in LPS."""
    row, column = np.array([each.orientation for each in stack], dtype=np.float64).mean(axis=0).reshape(2, 3)
    normal = np.cross(row, column)
    return row / np.linalg.norm(row), column / np.linalg.norm(column), normal / np.linalg.norm(normal)


def natural_key(path: Path) -> list[Any]:
    """Return a key that sorts 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def _distance(heights: NDArray[np.float64], warnings: list[str]) -> tuple[float, tuple[float, ...] | None]:
    """Return one distance in mm for all slices at `heights`, in order, and the heights themselves where distances differ.

    It is the usual one where slices are missing, which is told, else the mean, which leaves the stack's length as it is.
    """
    gaps = np.diff(heights)
    usual, mean = float(np.median(gaps)), float(gaps.mean())
    if gaps.max() - gaps.min() <= UNEVEN * usual:
        return mean, None
    missing = np.rint(gaps / usual).astype(int) - 1
    places = np.flatnonzero(missing)
    slabs = any((missing[place : place + SLAB] == missing[place]).sum() == SLAB for place in places)
    positions = tuple((heights - heights[0]).tolist())
    if slabs or missing.min() < 0 or (np.abs(gaps / usual - missing - 1) > UNEVEN).any():
        return mean, positions
    after = ", ".join(f"{missing[place]} after slice {place + 1}" for place in places[:5]) + (", ..." if len(places) > 5 else "")
    warnings.append(f"{missing.sum()} of {len(heights) + missing.sum()} slices seem to be missing ({after}).")
    return usual, positions


def _drift(
    positions: NDArray[np.float64], heights: NDArray[np.float64], normal: NDArray[np.float64], near: float, warnings: list[str]
) -> NDArray[np.float64]:
    """Return the way (3,) in LPS that the stack goes per mm along the normal: the usual one between distant slices, so that outliers do not
    count.
    """
    half = len(heights) // 2
    drift = np.median((positions[half:] - positions[:-half]) / (heights[half:] - heights[:-half])[:, None], axis=0)
    drift += (1 - drift @ normal) * normal
    if np.linalg.norm(drift - normal) * (heights[-1] - heights[0]) < near:  # no more than the rounding of the positions
        drift = normal
    beside = positions - np.outer(heights, drift)
    if (shift := np.linalg.norm(beside - np.median(beside, axis=0), axis=1).max()) > SHIFTED:
        warnings.append(f"slices are shifted within their plane by up to {shift:.1f} mm against each other, which is not corrected.")
    return drift


def _check_turns(stack: Stack, plane: tuple[NDArray[np.float64], ...], warnings: list[str]) -> None:
    """Warn where the orientations of the slices differ."""
    cosines = np.array([each.orientation for each in stack]).reshape(-1, 2, 3) * np.stack(plane[:2])
    turn = math.degrees(math.acos(min(1.0, float(cosines.sum(axis=-1).min()))))
    if turn > TURNED:
        warnings.append(f"the orientations of the slices differ from their mean by up to {turn:.1f} degrees; the mean is used.")

"""Where the axes of a scan lead in the patient, and the way from tilted or unevenly spaced slices to a regular grid.

Directions are vectors in the RAS+ frame (x towards Right, y Anterior, z Superior); the columns of a 3x3 direction matrix are those of
D, H and W, of length 1. They need not be at right angles: a CT gantry may be tilted against the table, which shears the stack of slices.

Shapes: D, H, W voxels.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

POSITIVE, NEGATIVE = "RAS", "LPI"  # the letters towards which x, y and z grow and fall
SHEARED = 0.5  # degrees; less is rounding in a header
UNEVEN = 0.01  # of the usual distance between slices, by which distances may differ
SECOND_LETTER = 15.0  # degrees off an axis from which on a direction has a second letter
MOST_SLICES = 4  # times as many as there were, when uneven ones are resampled to the smallest distance


def is_geometry(columns: NDArray[np.float64]) -> bool:
    """Whether three vectors, the columns of a 3x3 matrix, span a space: finite, none of them 0, no two parallel."""
    lengths = np.linalg.norm(columns, axis=0)
    return bool(np.isfinite(lengths).all() and lengths.min() > 0 and abs(np.linalg.det(columns / lengths)) > 0.01)


def nearest_letters(direction: NDArray[np.float64]) -> str:
    """The anatomical letter nearest to each column, each axis of the patient used once, such as "SPL"."""
    from nibabel.orientations import aff2axcodes

    affine = np.eye(4)
    affine[:3, :3] = direction
    return "".join(aff2axcodes(affine))


def letters_towards(vector: NDArray[np.float64]) -> str:
    """Where a vector of length 1 leads, in one to three letters, the nearest first: "L", or "LA" for left and less to the front."""
    named = [(abs(part), (POSITIVE if part > 0 else NEGATIVE)[axis]) for axis, part in enumerate(vector)]
    least = min(math.sin(math.radians(SECOND_LETTER)), max(named)[0])
    return "".join(letter for part, letter in sorted(named, key=lambda pair: -round(pair[0], 6)) if part >= least)


def shear(direction: NDArray[np.float64]) -> float:
    """Degrees by which a stack is sheared: of its D axis off the normal of its slices, or of rows and columns off a right angle."""
    along, down, across = direction.T
    normal = np.cross(down, across)
    return max(degrees(abs(along @ normal) / np.linalg.norm(normal)), 90 - degrees(abs(down @ across)))


def turn(direction: NDArray[np.float64]) -> tuple[float, float]:
    """Degrees between the normal of the slices and the anatomical axis nearest to it, and the largest of any axis against its own."""
    axes = [POSITIVE.find(letter) if letter in POSITIVE else NEGATIVE.find(letter) for letter in nearest_letters(direction)]
    normal = np.cross(direction[:, 1], direction[:, 2])
    angles = [degrees(abs(column[axis])) for column, axis in zip(direction.T, axes, strict=True)]
    return degrees(abs(normal[axes[0]]) / np.linalg.norm(normal)), max(angles)


def degrees(cosine: Any) -> float:
    """The angle of a cosine."""
    return math.degrees(math.acos(min(1.0, float(cosine))))


def straightened(
    array: NDArray[Any], spacing: Sequence[float], direction: NDArray[np.float64], heights: Sequence[float] | None = None
) -> tuple[NDArray[Any], tuple[float, float, float], NDArray[np.float64]]:
    """A sheared or unevenly spaced stack, resampled to a regular grid at right angles.

    Columns keep their direction, rows are turned to a right angle where they have none, slices are moved within their plane to where they
    were in the patient, which makes the pictures larger; between the heights of slices and between voxels values are linear. What no
    slice has seen gets the lowest value. Uneven slices come to lie at a distance that only one in ten is shorter than, and at most
    `MOST_SLICES` times as many; where the distances are even, each slice keeps its height.

    Args:
        array: (D, H, W), int16 or float32.
        spacing: (z, y, x) in mm, along the axes as they lead.
        direction: 3x3, see the module's text.
        heights: (D,) in mm along the normal of the slices, growing, where their distances differ.

    Returns:
        The array (D', H', W') of the same type, its spacing and its direction.
    """
    along, down, across = direction.T
    square = down - (down @ across) * across
    square /= np.linalg.norm(square)
    normal = np.cross(square, across)
    normal *= np.sign(along @ normal)
    depth = len(array)
    rise = along @ normal
    at = spacing[0] * rise * np.arange(depth) if heights is None else np.asarray(heights, dtype=np.float64) - heights[0]
    short = np.percentile(np.diff(at), 10, method="lower")  # a slab, and not a single slice that lies close to another
    step = float(max(short, at[-1] / (MOST_SLICES * (depth - 1))))
    wanted = step * np.arange(round(at[-1] / step) + 1)

    # Within the slices' plane, in voxels along (square, across): where a step along rows and columns leads, and where each slice begins.
    rows_apart = down @ square
    skew = (down @ across) * spacing[1] / spacing[2]
    drift = at[:, None] * [along @ square / (rise * spacing[1]), along @ across / (rise * spacing[2])]  # (D, 2)
    height, width = array.shape[1] - 1, array.shape[2] - 1
    ends = [(y * rows_apart, y * skew + x) + begin for y in (0, height) for x in (0, width) for begin in drift[[0, -1]]]
    first = np.floor(np.min(ends, axis=0) + 1e-3)  # whole, so that a slice that need not move keeps its values
    size = (np.ceil(np.max(ends, axis=0) - 1e-3) - first + 1).astype(int)

    lowest, moved = array.min(), dict[int, NDArray[np.float32]]()
    result = np.empty((len(wanted), *size), array.dtype)
    for place, index in enumerate(np.interp(wanted, at, np.arange(depth))):
        below = int(index + 1e-6)
        share = np.float32(index - below)
        needed = [below, below + 1] if share > 1e-6 else [below]
        for number in needed:
            if number not in moved:
                rows, columns = (np.arange(count) + start for count, start in zip(size, first - drift[number], strict=True))
                moved[number] = _moved(array[number], rows / rows_apart, columns, skew / rows_apart * rows)
        moved = {number: moved[number] for number in needed}
        values = moved[below]
        if len(needed) > 1:
            above = moved[below + 1]
            values = np.where(np.isnan(values), above, np.where(np.isnan(above), values, (1 - share) * values + share * above))
        values = np.where(np.isnan(values), lowest, values)
        result[place] = np.rint(values) if array.dtype.kind == "i" else values
    return result, (step, float(spacing[1]), float(spacing[2])), np.stack([normal, square, across], axis=1)


def _moved(
    picture: NDArray[Any], rows: NDArray[np.float64], columns: NDArray[np.float64], skew: NDArray[np.float64]
) -> NDArray[np.float32]:
    """A slice (H, W) at `rows` (H',) and, in each of these, at `columns` (W',) less the row's `skew` (H',); NaN beyond it."""
    height, width = picture.shape
    inside = np.clip(rows, 0, height - 1)
    below = np.minimum(inside.astype(int), height - 2)
    share = (inside - below).astype(np.float32)[:, None]
    values = picture[below] * (1 - share) + picture[below + 1] * share  # (H', W)
    places = columns - skew[:, None]  # (H', W')
    if places.shape[1] != width or np.abs(places - np.arange(width)).max() > 1e-6:
        values = np.stack([np.interp(place, np.arange(width), row) for place, row in zip(places, values, strict=True)]).astype(np.float32)
    seen_rows = (rows >= -0.5) & (rows <= height - 0.5)
    values[~(seen_rows[:, None] & (places >= -0.5) & (places <= width - 0.5))] = np.nan
    return values

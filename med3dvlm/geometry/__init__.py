"""Where the axes of a scan lead in the patient: directions, their letters and angles. Beside it `straightening.py`, from tilted or unevenly
spaced slices to a regular grid, and `sampling.py`, from one grid to another.

Directions are vectors in the RAS+ frame (x towards Right, y Anterior, z Superior); the columns of a 3x3 direction matrix are those of
D, H and W, of length 1. They need not be at right angles: a CT gantry may be tilted against the table, which shears the stack of slices.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

POSITIVE, NEGATIVE = "RAS", "LPI"  # the letters towards which x, y and z grow and fall
SHEARED = 0.5  # degrees; less is rounding in a header
UNEVEN = 0.01  # of the usual distance between slices, by which distances may differ
SECOND_LETTER = 15.0  # degrees off an axis from which on a direction has a second letter


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


def direction_of(letters: str) -> NDArray[np.float64]:
    """The direction of axes that lead exactly where three letters such as "SPL" say."""
    return np.stack([np.eye(3)[POSITIVE.find(one)] if one in POSITIVE else -np.eye(3)[NEGATIVE.find(one)] for one in letters], axis=1)


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

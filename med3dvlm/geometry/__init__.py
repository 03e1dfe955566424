"""Geometry of scans: the angles between their axes and the patient's. `orientation.py` has axis letters and display conventions,
`straightening.py` resamples tilted or unevenly spaced slices to a regular grid, `sampling.py` from one grid to another.

Directions are vectors in the RAS+ frame (x towards Right, y Anterior, z Superior); the columns of a 3x3 direction matrix are those of
D, H and W, of length 1. They need not be at right angles: a CT gantry may be tilted against the table, which shears the stack of slices.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.geometry.orientation import NEGATIVE, POSITIVE, nearest_letters

SHEARED = 0.5  # degrees; less is rounding in a header
UNEVEN = 0.01  # of the usual distance between slices, by which distances may differ


def is_geometry(columns: NDArray[np.float64]) -> bool:
    """Return whether three vectors, the columns of a 3x3 matrix, span a space: finite, none of them 0, no two parallel."""
    lengths = np.linalg.norm(columns, axis=0)
    return bool(np.isfinite(lengths).all() and lengths.min() > 0 and abs(np.linalg.det(columns / lengths)) > 0.01)


def shear(direction: NDArray[np.float64]) -> float:
    """Return the degrees by which a stack is sheared: its D axis off the normal of its slices, or rows and columns off a right angle."""
    along, down, across = direction.T
    normal = np.cross(down, across)
    return max(degrees(abs(along @ normal) / np.linalg.norm(normal)), 90 - degrees(abs(down @ across)))


def turn(direction: NDArray[np.float64]) -> tuple[float, float]:
    """Return the degrees between the slices' normal and the nearest anatomical axis, and the largest of any axis against its own."""
    axes = [POSITIVE.find(letter) if letter in POSITIVE else NEGATIVE.find(letter) for letter in nearest_letters(direction)]
    normal = np.cross(direction[:, 1], direction[:, 2])
    angles = [degrees(abs(column[axis])) for column, axis in zip(direction.T, axes, strict=True)]
    return degrees(abs(normal[axes[0]]) / np.linalg.norm(normal)), max(angles)


def degrees(cosine: Any) -> float:
    """Return the angle of a cosine."""
    return math.degrees(math.acos(min(1.0, float(cosine))))

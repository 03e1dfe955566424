"""Orientation of a scan's axes in the patient, and how slices are turned for a screen.

An orientation is three letters, one for each of D, H and W: where its index grows towards, of Right or Left, Anterior or Posterior, Superior
or Inferior, as "SPL". Directions are vectors in the RAS+ frame, see `med3dvlm.geometry`.
"""

import math

import numpy as np
from numpy.typing import NDArray

POSITIVE, NEGATIVE = "RAS", "LPI"  # the letters towards which x, y and z grow and fall
OPPOSITE = dict(zip(POSITIVE + NEGATIVE, NEGATIVE + POSITIVE, strict=True))
PLANES = {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "L": "sagittal", "R": "sagittal"}  # that an axis cuts
SCREEN = "IPL"  # down the page go feet, else back; to its right the patient's left, else back
SECOND_LETTER = 15.0  # degrees off an axis from which on a direction has a second letter


def is_orientation(letters: str) -> bool:
    """Return whether the text is one letter each of L/R, A/P and I/S."""
    return sorted(PLANES.get(letter, "") for letter in letters) == ["axial", "coronal", "sagittal"]


def nearest_letters(direction: NDArray[np.float64]) -> str:
    """Return the nearest anatomical letter for each column, using each axis of the patient once, such as "SPL"."""
    from nibabel.orientations import aff2axcodes

    affine = np.eye(4)
    affine[:3, :3] = direction
    return "".join(aff2axcodes(affine))


def direction_of(letters: str) -> NDArray[np.float64]:
    """Return the direction matrix of axes that lead exactly where three letters such as "SPL" say."""
    return np.stack([np.eye(3)[POSITIVE.find(one)] if one in POSITIVE else -np.eye(3)[NEGATIVE.find(one)] for one in letters], axis=1)


def letters_towards(vector: NDArray[np.float64]) -> str:
    """Return where a vector of length 1 leads, in one to three letters, the nearest first: "L", or "LA" for left and less to the front."""
    named = [(abs(part), (POSITIVE if part > 0 else NEGATIVE)[axis]) for axis, part in enumerate(vector)]
    least = min(math.sin(math.radians(SECOND_LETTER)), max(named)[0])
    return "".join(letter for part, letter in sorted(named, key=lambda pair: -round(pair[0], 6)) if part >= least)


def for_screen(letters: str | None) -> tuple[tuple[int, int, int], tuple[slice, slice, slice]]:
    """Return the order of axes along SCREEN, and the slices that flip those growing the other way: `array.transpose(order)[flips]`.

    A scan of unknown orientation stays as it is.
    """
    stored = letters or SCREEN
    order = tuple(next(axis for axis, letter in enumerate(stored) if letter in (to, OPPOSITE[to])) for to in SCREEN)
    flips = tuple(slice(None, None, 1 if stored[axis] == to else -1) for axis, to in zip(order, SCREEN, strict=True))
    return order, flips  # type: ignore[return-value]


def slice_axes(cut: int, letters: str | None) -> tuple[int, int, bool, bool]:
    """Return for a slice across the axis `cut` the axes that go down and across the page, and whether each is flipped."""
    down, across = [(axis, flip.step == -1) for axis, flip in zip(*for_screen(letters), strict=True) if axis != cut]
    return down[0], across[0], down[1], across[1]

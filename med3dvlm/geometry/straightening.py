"""Resample tilted or unevenly spaced slices to a regular grid at right angles, and map voxels to it.

Shapes: D, H, W voxels of the stack; D', H', W' of the regular grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SLICES = 4  # times as many as there were, when uneven ones are resampled to the smallest distance


@dataclass(frozen=True)
class Straightening:
    """The regular grid of a stack, and how the stack lies in it.

    Columns keep their direction, rows are turned to a right angle where they have none, slices are moved within their plane to where they
    were in the patient, which makes the pictures larger. Uneven slices come to lie at a distance that only one in ten is shorter than, and
    at most `MAX_SLICES` times as many; where the distances are even, each slice keeps its height.

    - `shape`: (D', H', W').
    - `spacing`: (z, y, x) in mm, and `direction`, 3x3 with the axes as columns, of the regular grid.
    - `slices`: (D,), the place of each slice along D', not always whole.
    - `starts`: (D, 2), where the first voxel of each slice lies along H' and W'.
    - `rows`, `skew`: how far a step along H leads along H' and along W'. A step along W is one along W'.
    - `offset`: (3,) mm in RAS from the stack's first voxel to that of the regular grid.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    direction: NDArray[np.float64]
    slices: NDArray[np.float64]
    starts: NDArray[np.float64]
    rows: float
    skew: float
    offset: NDArray[np.float64]

    @classmethod
    def of(
        cls, shape: Sequence[int], spacing: Sequence[float], direction: NDArray[np.float64], heights: Sequence[float] | None = None
    ) -> "Straightening":
        """
        Args:
            shape: (D, H, W).
            spacing: (z, y, x) in mm, along the axes as they lead.
            direction: 3x3, see the module's text.
            heights: (D,) in mm along the normal of the slices, growing, where their distances differ.
        """
        along, down, across = direction.T
        square = down - (down @ across) * across
        square /= np.linalg.norm(square)
        normal = np.cross(square, across)
        normal *= np.sign(along @ normal)
        depth = shape[0]
        rise = along @ normal
        at = spacing[0] * rise * np.arange(depth) if heights is None else np.asarray(heights, dtype=np.float64) - heights[0]
        short = np.percentile(np.diff(at), 10, method="lower")  # a slab, and not a single slice that lies close to another
        step = float(max(short, at[-1] / (MAX_SLICES * (depth - 1))))

        # Within the slices' plane, in voxels along (square, across): where a step along rows leads, and where each slice begins.
        rows, skew = float(down @ square), float((down @ across) * spacing[1] / spacing[2])
        drift = at[:, None] * [along @ square / (rise * spacing[1]), along @ across / (rise * spacing[2])]  # (D, 2)
        height, width = shape[1] - 1, shape[2] - 1
        ends = [(y * rows, y * skew + x) + begin for y in (0, height) for x in (0, width) for begin in drift[[0, -1]]]
        first = np.floor(np.min(ends, axis=0) + 1e-3)  # whole, so that a slice that need not move keeps its values
        size = (np.ceil(np.max(ends, axis=0) - 1e-3) - first + 1).astype(int)
        return cls(
            shape=(round(at[-1] / step) + 1, int(size[0]), int(size[1])),
            spacing=(step, float(spacing[1]), float(spacing[2])),
            direction=np.stack([normal, square, across], axis=1),
            slices=at / step,
            starts=drift - first,
            rows=rows,
            skew=skew,
            offset=first[0] * spacing[1] * square + first[1] * spacing[2] * across,
        )

    def matrices(self) -> NDArray[np.float64]:
        """Return (D, 4, 4): for each slice d the matrix that takes the index (d, h, w, 1) of its voxels to that in the regular grid."""
        found = np.zeros((len(self.slices), 4, 4))
        found[:, 0, 3] = self.slices
        found[:, 1:3, 3] = self.starts
        found[:, 1, 1], found[:, 2, 1], found[:, 2, 2], found[:, 3, 3] = self.rows, self.skew, 1, 1
        return found

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """Resample a stack (D, H, W), int16 or float32, to (D', H', W') of the same type.

        Between slices and between voxels values are linear. What no slice has seen gets the lowest value.
        """
        lowest, moved = array.min(), dict[int, NDArray[np.float32]]()
        result = np.empty(self.shape, array.dtype)
        for place, index in enumerate(np.interp(np.arange(self.shape[0]), self.slices, np.arange(len(array)))):
            below = int(index + 1e-6)
            share = np.float32(index - below)
            needed = [below, below + 1] if share > 1e-6 else [below]
            moved = {number: moved[number] if number in moved else self._moved(array[number], number) for number in needed}
            values = moved[below]
            if len(needed) > 1:
                above = moved[below + 1]
                values = np.where(np.isnan(values), above, np.where(np.isnan(above), values, (1 - share) * values + share * above))
            values = np.where(np.isnan(values), lowest, values)
            result[place] = np.rint(values) if array.dtype.kind == "i" else values
        return result

    def _moved(self, picture: NDArray[Any], number: int) -> NDArray[np.float32]:
        """Return a slice (H, W) as float32 on the regular grid's rows and columns (H', W'); NaN beyond it."""
        height, width = picture.shape
        rows = (np.arange(self.shape[1]) - self.starts[number, 0]) / self.rows
        columns = np.arange(self.shape[2]) - self.starts[number, 1]
        inside = np.clip(rows, 0, height - 1)
        below = np.minimum(inside.astype(int), height - 2)
        share = (inside - below).astype(np.float32)[:, None]
        values = picture[below] * (1 - share) + picture[below + 1] * share  # (H', W)
        places = columns - self.skew * rows[:, None]  # (H', W')
        if places.shape[1] != width or np.abs(places - np.arange(width)).max() > 1e-6:
            values = np.stack([np.interp(place, np.arange(width), row) for place, row in zip(places, values, strict=True)])
            values = values.astype(np.float32)
        seen_rows = (rows >= -0.5) & (rows <= height - 0.5)
        values[~(seen_rows[:, None] & (places >= -0.5) & (places <= width - 0.5))] = np.nan
        return values

"""Size, extent and side of a mask in a scan.

Shapes: masks are (D, H, W) of booleans. `VoxelPositions` says where their voxels lie in the patient, in RAS mm.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Box = tuple[slice, ...]  # along D, H and W
ONE_SIDE = 0.8  # of a mask's volume on one side of the mid-plane make it that side's
MAX_SAMPLES = 2**21  # voxels that are looked at for the extent of the body
BODY_HU = -500  # lies between air and tissue
NEIGHBOURS = np.ones((3, 3, 3), bool)  # voxels that share a corner are of one component


@dataclass(frozen=True, eq=False)
class VoxelPositions:
    """Where the voxels of a scan lie. `origin` (3,) is the middle of the first; the columns of `steps` (3, 3) are the way in mm of one voxel
    along D, H and W; `slices` (D,) is the place of each slice along D in such steps, 0, 1, 2, ... for evenly spaced ones.
    """

    origin: NDArray[np.float64]
    steps: NDArray[np.float64]
    slices: NDArray[np.float64]

    def at(self, voxels: NDArray[Any]) -> NDArray[np.float64]:
        """Return the middles (N, 3) of voxels (N, 3)."""
        along = np.interp(voxels[:, 0], np.arange(len(self.slices)), self.slices)
        found: NDArray[np.float64] = self.origin + np.c_[along, voxels[:, 1:]] @ self.steps.T
        return found

    @property
    def millilitres(self) -> NDArray[np.float64]:
        """Return (D,), the volume of a voxel of each slice; a slice reaches halfway to its neighbours."""
        found: NDArray[np.float64] = abs(np.linalg.det(self.steps)) / 1000 * np.gradient(self.slices)
        return found


def volume_ml(mask: Mask, positions: VoxelPositions) -> float:
    """Return the sum of the voxels' volumes."""
    return float(mask.sum(axis=(1, 2)) @ positions.millilitres)


def bounding_box(mask: Mask) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """Return the first voxel along D, H and W and the one after the last, as slices take them; None for an empty mask."""
    if not mask.any():
        return None
    found = [np.flatnonzero(mask.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    first, after = [int(place[0]) for place in found], [int(place[-1]) + 1 for place in found]
    return (first[0], first[1], first[2]), (after[0], after[1], after[2])


def extent_mm(mask: Mask, positions: VoxelPositions) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the lowest and the highest x, y and z in RAS that whole voxels of the mask reach; None for an empty mask."""
    found = bounding_box(mask)
    if found is None:
        return None
    box = tuple(map(slice, *found))
    middles = positions.at(_voxels(_outermost(mask[box]), box))
    half = np.abs(positions.steps).sum(axis=1) / 2
    return tuple((middles.min(axis=0) - half).tolist()), tuple((middles.max(axis=0) + half).tolist())


def longest_diameter_mm(mask: Mask, positions: VoxelPositions) -> float:
    """Return the longest 3D distance within one component, between the middles of voxels' faces; 0 for an empty mask.

    A single voxel so has its longest edge, a row of n voxels n edges, and a ball about its diameter.
    """
    longest = 0.0
    parts = [(_longest_possible(box, positions), label, box) for label, box in _parts(mask)]
    for most, label, box in sorted(parts, key=lambda part: -part[0]):
        if most <= longest:  # no other is longer
            break
        longest = max(longest, _diameter(positions.at(_voxels(_outermost(label), box)), positions.steps))
    return longest


def components(mask: Mask) -> list[Mask]:
    """Return the connected components of a mask, the largest first, each (D, H, W)."""
    found = []
    for label, box in _parts(mask):
        part = np.zeros(mask.shape, bool)
        part[box] = label
        found.append(part)
    return sorted(found, key=lambda part: -int(part.sum()))


def body_middle(array: NDArray[Any], positions: VoxelPositions, in_hu: bool) -> float:
    """Return x in mm of the patient's mid-plane: halfway between the right and the left end of the body in the scan.

    The body is what is brighter than `BODY_HU`, or without Hounsfield units than a tenth of the way from the lowest value to the 99th
    percentile. Its ends are the 1st and the 99th percentile of x over its voxels, so that a table's edge or a tube does not move them. Where
    the scan shows a part of the body's width only, the plane is that part's.
    """
    step = max(1, round((array.size / MAX_SAMPLES) ** (1 / 3)))
    some = array[::step, ::step, ::step]
    low, high = float(some.min()), float(np.percentile(some, 99))
    body = some > (BODY_HU if in_hu else low + (high - low) / 10)
    if not body.any():
        body = np.ones(some.shape, bool)
    return float(np.percentile(positions.at(np.argwhere(body) * step)[:, 0], [1, 99]).mean())


def side_of(mask: Mask, positions: VoxelPositions, middle: float) -> str | None:
    """Return "left" or "right" of the patient, "midline" or "both"; None for an empty mask.

    A mask that has `ONE_SIDE` of its volume or more on one side of the mid-plane is that side's. Of others, "midline" are those of which
    components that the plane cuts make up more than half, "both" the rest.

    Args:
        middle: x of the mid-plane, see `body_middle`.
    """
    total, left, cut = 0.0, 0.0, 0.0
    for label, box in _parts(mask):
        depth, rows, columns = (np.arange(edge.start, edge.stop) for edge in box)
        along, down, across = positions.steps[0]
        beyond = middle - positions.origin[0] - np.add.outer(down * rows, across * columns)  # x left for the way along D
        of_slice = [np.count_nonzero(along * place < beyond[part]) for place, part in zip(positions.slices[depth], label, strict=True)]
        volume = float(label.sum(axis=(1, 2)) @ positions.millilitres[depth])
        of_left = float(np.array(of_slice) @ positions.millilitres[depth])
        total, left = total + volume, left + of_left
        if min(of_left, volume - of_left) > (1 - ONE_SIDE) * volume:
            cut += volume
    if not total:
        return None
    if left >= ONE_SIDE * total:
        return "left"
    if total - left >= ONE_SIDE * total:
        return "right"
    return "midline" if cut > total / 2 else "both"


def _parts(mask: Mask) -> Iterator[tuple[Mask, Box]]:
    """Yield each component within its box, and the box."""
    from scipy.ndimage import find_objects, label

    found = bounding_box(mask)
    if found is None:
        return
    numbers, _ = label(mask[tuple(map(slice, *found))], NEIGHBOURS)
    for number, box in enumerate(find_objects(numbers), start=1):
        yield numbers[box] == number, tuple(slice(edge.start + shift, edge.stop + shift) for edge, shift in zip(box, found[0], strict=True))


def _voxels(part: Mask, box: Box) -> NDArray[np.int64]:
    """Return (N, 3), the indices in the scan of a mask within a box."""
    found: NDArray[np.int64] = np.argwhere(part) + [edge.start for edge in box]
    return found


def _longest_possible(box: Box, positions: VoxelPositions) -> float:
    """Return an upper bound of diameters in the box: the distance of its outer corners' middles, and half a voxel at either end."""
    from scipy.spatial.distance import pdist

    corners = np.stack(np.meshgrid(*((edge.start, edge.stop - 1) for edge in box), indexing="ij"), axis=-1).reshape(-1, 3)
    return float(pdist(positions.at(corners)).max() + np.linalg.norm(positions.steps, axis=0).max())


def _outermost(mask: Mask) -> Mask:
    """Return the voxels that are the first or the last of the mask in all three lines through them; the corners of its convex hull are among
    them.
    """
    kept = mask.copy()
    for axis in range(3):
        before = np.logical_or.accumulate(mask, axis=axis)
        after = np.flip(np.logical_or.accumulate(np.flip(mask, axis), axis=axis), axis)
        inner = np.zeros_like(mask)
        middle, first, last = ([slice(None)] * 3 for _ in range(3))
        middle[axis], first[axis], last[axis] = slice(1, -1), slice(None, -2), slice(2, None)
        inner[tuple(middle)] = before[tuple(first)] & after[tuple(last)]
        kept &= ~inner
    return kept


def _diameter(middles: NDArray[np.float64], steps: NDArray[np.float64]) -> float:
    """Return the longest distance between points half a step away from the middles (N, 3) of voxels."""
    from scipy.spatial import ConvexHull
    from scipy.spatial.distance import pdist

    points = (middles[:, None] + np.concatenate([steps.T, -steps.T]) / 2).reshape(-1, 3)
    return float(pdist(points[ConvexHull(points).vertices]).max())

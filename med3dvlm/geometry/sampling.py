"""Resample values from one grid to another.

Shapes: D', H', W' voxels of the grid that the values are on; D, H, W of the one that they are wanted on.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

EDGE = 0.5 + 1e-4  # voxels from the middle of the outermost one to the end of the grid, and a little for rounding


def sample(values: Tensor, shape: Sequence[int], matrices: NDArray[np.float64]) -> Tensor:
    """Sample values (..., D', H', W') at the voxels of a grid of `shape` (D, H, W): (..., D, H, W) of the same type, 0 beyond their own grid.

    Real numbers are linear between voxels; whole numbers and booleans are those of the nearest voxel.

    Args:
        matrices: (D, 4, 4), of each slice d the one that takes the index (d, h, w, 1) to that among the values.
    """
    leading, size = values.shape[:-3], values.shape[-3:]
    flat = values.reshape(1, -1, *size)
    result = flat.new_zeros((flat.shape[1], *shape))
    box = _filled(flat[0])
    if box is None:
        return result.reshape(*leading, *shape)
    mode = "bilinear" if values.is_floating_point() else "nearest"
    source = flat.to(torch.float32)
    length = np.array(size)
    for number, matrix in enumerate(matrices):
        window = _window(matrix, number, box, shape)
        if window is None:
            continue
        rows, columns = (np.arange(part.start, part.stop) for part in window)
        found = (matrix[:3, 3] + matrix[:3, 0] * number) + np.multiply.outer(rows, matrix[:3, 1])[:, None]
        found = found + np.multiply.outer(columns, matrix[:3, 2])  # (h, w, 3), an index among the values
        inside = ((found >= -EDGE) & (found <= length - 1 + EDGE)).all(axis=-1)
        places = torch.from_numpy(((2 * found + 1) / length - 1)[..., ::-1].astype(np.float32))[None, None].to(source.device)
        sampled = functional.grid_sample(source, places, mode=mode, padding_mode="border", align_corners=False)[0, :, 0]  # (K, h, w)
        sampled *= torch.from_numpy(inside).to(sampled.device)
        result[:, number, window[0], window[1]] = sampled.to(result.dtype)
    return result.reshape(*leading, *shape)


def _filled(values: Tensor) -> NDArray[np.float64] | None:
    """Return (2, 3), the lowest and the highest index beyond which values (K, D', H', W') are 0 even between voxels; None where all are 0."""
    some = (values != 0).any(dim=0)
    if not some.any():
        return None
    found = [torch.nonzero(some.any(dim=others))[:, 0] for others in ((1, 2), (0, 2), (0, 1))]
    return np.array([[float(place[0]) - 1 for place in found], [float(place[-1]) + 1 for place in found]])


def _window(matrix: NDArray[np.float64], number: int, box: NDArray[np.float64], shape: Sequence[int]) -> tuple[slice, slice] | None:
    """Return the rows and columns of a slice outside of which its voxels surely lie beyond the box; None where the whole slice does."""
    ends = [[0.0, shape[1] - 1.0], [0.0, shape[2] - 1.0]]
    for low, high, (along, down, across, start) in zip(*box, matrix[:3], strict=True):
        place = start + along * number
        steps = [step for step in (down, across) if abs(step) > 1e-9]
        if not steps and not low <= place <= high:
            return None
        if len(steps) == 1:
            first, last = sorted(((low - place) / steps[0], (high - place) / steps[0]))
            of = ends[0] if abs(down) > 1e-9 else ends[1]
            of[:] = max(of[0], np.floor(first)), min(of[1], np.ceil(last))
    if any(first > last for first, last in ends):
        return None
    rows, columns = (slice(int(first), int(last) + 1) for first, last in ends)
    return rows, columns

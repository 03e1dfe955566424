"""Slices of a scan, turned for a screen and drawn as grey pictures; all pictures use these."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from med3dvlm.geometry.orientation import slice_axes


def take_slice(
    volume: NDArray[Any], axis: int, index: int, spacing: Sequence[float] | None, orientation: str | None
) -> tuple[NDArray[Any], tuple[float, float]]:
    """Return the slice `index` across `axis` of a volume (D, H, W), turned for a screen, and the mm between its rows and columns.

    Args:
        spacing: mm (z, y, x); None counts voxels as cubes.
        orientation: three letters; None leaves the slice as it is.
    """
    down, across, turned_down, turned_across = slice_axes(axis, orientation)
    picture = np.take(volume, index, axis=axis)  # (first, second) of the two remaining axes
    picture = (picture.T if down > across else picture)[:: -1 if turned_down else 1, :: -1 if turned_across else 1]
    steps = (1.0, 1.0, 1.0) if spacing is None else spacing
    return picture, (steps[down], steps[across])


def grey(values: ArrayLike, window: tuple[float, float]) -> NDArray[np.uint8]:
    """Convert values to 0 (black, at window[0] and below) to 255 (white, at window[1] and above); a window of no width makes its value
    mid-grey.
    """
    low, high = window if window[1] > window[0] else (window[0] - 0.5, window[0] + 0.5)
    return np.clip(np.nan_to_num(np.round(255 * (np.asarray(values, np.float64) - low) / (high - low))), 0, 255).astype(np.uint8)


def draw_slice(values: ArrayLike, window: tuple[float, float], spacing: tuple[float, float], longest: int) -> Any:
    """Return a PIL image of a slice (rows, columns) with square pixels.

    Args:
        window: the values that are black and white.
        spacing: mm between rows and between columns; the finer one is a pixel.
        longest: pixels of the longer side, at most.
    """
    from PIL import Image

    image = Image.fromarray(grey(values, window))
    rows, columns = (length * mm for length, mm in zip((image.height, image.width), spacing, strict=True))
    scale = min(1 / min(spacing), longest / max(rows, columns))  # pixels a mm
    size = (max(1, round(scale * columns)), max(1, round(scale * rows)))
    return image.resize(size, Image.Resampling.BILINEAR)

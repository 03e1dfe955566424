"""A slice as a grey picture."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def grey(values: ArrayLike, window: tuple[float, float]) -> NDArray[np.uint8]:
    """Values as 0 (black, at window[0] and below) to 255 (white, at window[1] and above)."""
    low, high = window
    return np.clip(np.round(255 * (np.asarray(values, np.float64) - low) / (high - low)), 0, 255).astype(np.uint8)


def draw_slice(values: ArrayLike, window: tuple[float, float], spacing: tuple[float, float], longest: int) -> Any:
    """A PIL image of a slice (rows, columns) with square pixels.

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

"""A volume as a radiologist looks at it: three planes in true proportions, and what was read in words.

Display axes, whatever the file's own order is: z runs from superior to inferior, y from anterior to posterior, x from
the patient's right to the left. So the axial and the coronal picture have the patient's right on the left, the coronal
and the sagittal one have superior on top, and the sagittal one has anterior on the left. A volume whose orientation is
unknown is shown as stored: its own (D, H, W) stand for (z, y, x).

Shapes: D, H, W the volume's own axes; Z, Y, X the display axes; rows and columns of a picture are square pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from med3dvlm.volume import Volume

# The letters at the picture's edges: top, bottom, left, right.
EDGES = {"axial": "APRL", "coronal": "SIRL", "sagittal": "SIAP"}
PLANES = tuple(EDGES)  # in the order of the display axis that each plane cuts: z, y, x
DISPLAY_AXES = "IPL"  # the direction in which the index grows along z, y, x
OPPOSITE = dict(zip("SIAPLR", "ISPARL", strict=True))

# Lowest and highest value shown, in Hounsfield units.
WINDOWS = {
    "Soft tissue": (-160.0, 240.0),
    "Lung": (-1350.0, 150.0),
    "Bone": (-500.0, 1300.0),
    "Brain": (0.0, 80.0),
    "Liver": (-45.0, 105.0),
}
LONGEST_SIDE = 1024  # pixels; a picture of very unequal spacing is not stretched beyond this


@dataclass(frozen=True, eq=False)
class Plane(Sequence[NDArray[np.uint8]]):
    """All pictures of one plane: `plane[index]` is the (rows, columns) uint8 picture, `len(plane)` their number."""

    slices: np.ndarray  # (slices, rows, columns) in stored voxels, a view of the volume
    spacing: tuple[float, ...]  # mm along slices, rows, columns
    window: tuple[float, float]

    def __len__(self) -> int:
        return int(self.slices.shape[0])

    def __getitem__(self, index: int) -> NDArray[np.uint8]:  # type: ignore[override]
        low, high = self.window
        shown = (self.slices[index].astype(np.float32) - low) / max(high - low, 1e-6)
        grey = np.round(255 * np.clip(shown, 0, 1)).astype(np.uint8)
        height, width = grey.shape[0] * self.spacing[1], grey.shape[1] * self.spacing[2]  # mm
        pixel = max(min(self.spacing[1:]), max(height, width) / LONGEST_SIDE)
        size = max(round(width / pixel), 1), max(round(height / pixel), 1)
        return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))


def display_planes(volume: Volume, window: tuple[float, float] | None = None) -> dict[str, Plane]:
    """The three planes by name; `display_planes(volume)["coronal"][12]` is a picture, made when asked for.

    `window`: lowest and highest value shown; by default soft tissue in HU, else the volume's least and greatest value.
    """
    order, flips = _display_order(volume)
    array = volume.array.transpose(order)[flips]  # (Z, Y, X)
    spacing = tuple((volume.spacing or (1.0, 1.0, 1.0))[axis] for axis in order)
    window = window or default_window(volume)
    planes = {}
    for cut, name in enumerate(PLANES):
        axes = (cut, *(axis for axis in range(3) if axis != cut))
        planes[name] = Plane(array.transpose(axes), tuple(spacing[axis] for axis in axes), window)
    return planes


def default_window(volume: Volume) -> tuple[float, float]:
    """Soft tissue for a CT in Hounsfield units, else the volume's least and greatest value."""
    if volume.unit == "HU":
        return WINDOWS["Soft tissue"]
    return float(volume.array.min()), float(volume.array.max())


def slice_count(volume: Volume, plane: str) -> int:
    """How many slices the volume has in "axial", "coronal" or "sagittal" direction."""
    return int(volume.array.shape[_display_order(volume)[0][PLANES.index(plane)]])


def describe(volume: Volume) -> str:
    """What was read, as a Markdown table: size, spacing, orientation, unit, values, warnings. All text is escaped."""
    depth, height, width = volume.array.shape
    rows = {"File": Path(volume.source).name, "Size": f"{depth} × {height} × {width} voxels (slices × rows × columns)"}
    if volume.spacing is None:
        rows["Spacing"] = "unknown, shown with equal sides"
    else:
        millimetres = " × ".join(f"{spacing:.4g}" for spacing in volume.spacing)
        extent = " × ".join(f"{n * mm:.0f}" for n, mm in zip(volume.array.shape, volume.spacing, strict=True))
        rows["Spacing"] = f"{millimetres} mm; covers {extent} mm"
    if volume.orientation is None:
        rows["Orientation"] = "unknown, shown as stored"
    else:
        tilt = f", tilted by {volume.oblique:.0f}°" if (volume.oblique or 0) >= 1 else ""
        rows["Orientation"] = f"{volume.orientation}, {volume.plane} slices{tilt}"
    units = {"HU": "Hounsfield units", "unit": "0 to 1", "arbitrary": "arbitrary, no physical unit"}
    rows["Unit"] = units.get(volume.unit, volume.unit)
    rows["Values"] = f"{volume.array.min():g} to {volume.array.max():g}"
    lines = [f"| {name} | {escape(value)} |" for name, value in rows.items()]
    lines += [f"| Warning | {escape(warning)} |" for warning in volume.warnings]
    return "\n".join(["| Scan | |", "|:--|:--|", *lines])


def escape(text: str) -> str:
    """`text` so that Markdown and HTML show it and do nothing with it: all but letters and digits as entities."""
    words = " ".join(text.split())
    return "".join(letter if letter.isalnum() or letter in " ×°" else f"&#{ord(letter)};" for letter in words)


def _display_order(volume: Volume) -> tuple[tuple[int, int, int], tuple[slice, slice, slice]]:
    """Which stored axis becomes z, y and x, and the slices that turn those growing the other way."""
    stored = volume.orientation or DISPLAY_AXES
    order = tuple(next(i for i, letter in enumerate(stored) if letter in (to, OPPOSITE[to])) for to in DISPLAY_AXES)
    flips = tuple(slice(None, None, 1 if stored[i] == to else -1) for i, to in zip(order, DISPLAY_AXES, strict=True))
    return order, flips  # type: ignore[return-value]

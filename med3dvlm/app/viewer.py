"""A volume for the viewer: turned for the screen, packed for the browser, described in words.

Display axes, whatever the file's own order is: z runs from superior to inferior, y from anterior to posterior, x from
the patient's right to the left. So the axial and the coronal picture have the patient's right on the left, the coronal
and the sagittal one have superior on top, and the sagittal one has anterior on the left. A volume whose orientation is
unknown is shown as stored: its own (D, H, W) stand for (z, y, x).

Shapes: D, H, W the volume's own axes; Z, Y, X the display axes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from med3dvlm.geometry.orientation import SECOND_LETTER, for_screen, letters_towards
from med3dvlm.volume import Volume

# The letters at a picture's edges: top, bottom, left, right.
EDGES = {"axial": "APRL", "coronal": "SIRL", "sagittal": "SIAP"}
AXES = {"axial": (1, 2), "coronal": (0, 2), "sagittal": (0, 1)}  # of (z, y, x), down a picture and across it
STORED_NAMES = {"axial": "slices", "coronal": "rows", "sagittal": "columns"}  # where the orientation is unknown

# Lowest and highest value shown, in Hounsfield units.
WINDOWS = {
    "Soft tissue": (-160.0, 240.0),
    "Lung": (-1350.0, 150.0),
    "Bone": (-500.0, 1300.0),
    "Brain": (0.0, 80.0),
    "Liver": (-45.0, 105.0),
}
UNITS = {"HU": "Hounsfield units", "unit": "0 to 1", "arbitrary": "arbitrary, no physical unit"}
COARSER = (
    "Shown {block} times coarser than the scan: each voxel is the mean of {block} × {block} within a slice. The model reads the full scan."
)
MAX_SHOWN = 512 * 512 * 512  # voxels sent to a browser, 256 MiB; the slices of a larger scan are downsampled


@dataclass(frozen=True, eq=False)
class Picture:
    """The volume for the browser: `stored` is (Z, Y, X) int16, a view of the volume where that holds int16; `facts` holds everything that
    viewer.js needs.
    """

    stored: NDArray[np.int16]
    facts: dict[str, Any]
    block: int = 1  # voxels of a stored slice that became one, along its rows and along its columns

    def planes(self) -> Iterator[bytes]:
        """Yield its bytes, little-endian, one (Y, X) slice after the other. Not compressed, since that would cost scans more time than it
        saves.
        """
        for plane in self.stored:
            yield plane.astype("<i2").tobytes()


def picture(volume: Volume, max_voxels: int = MAX_SHOWN) -> Picture:
    """Return the volume for viewer.js.

    A value is `slope * stored + intercept`: int16 volumes are sent as they are, others in 65535 steps from their least to their greatest
    value. Above `max_voxels`, blocks of 2 x 2, 3 x 3, ... voxels within a stored slice become their mean, and `facts["note"]` says so.
    """
    order, flips = for_screen(volume.orientation)
    spacing = list(volume.spacing or (1.0, 1.0, 1.0))
    array, block = downsample(volume.array, max_voxels)
    spacing[1:] = [mm * block for mm in spacing[1:]]
    slope, intercept = 1.0, 0.0
    if array.dtype != np.int16:
        low, high = float(array.min()), float(array.max())
        slope, intercept = (high - low) / 65534, (high + low) / 2
        array = np.round((array - intercept) / slope).astype(np.int16)
    shown = array.transpose(order)[flips]  # (Z, Y, X)
    known = volume.orientation is not None
    facts = {
        "shape": shown.shape,
        "spacing": [spacing[axis] for axis in order],
        "millimetres": volume.spacing is not None,
        "slope": slope,
        "intercept": intercept,
        "unit": "HU" if volume.unit == "HU" else "",
        "window": default_window(volume),
        "presets": presets(volume),
        "names": {plane: plane if known else STORED_NAMES[plane] for plane in EDGES},
        "edges": edges(volume) if known else {},
        "metric": metric(volume, spacing).tolist(),
        "note": COARSER.format(block=block) if block > 1 else "",
    }
    return Picture(shown, facts, block)


def edges(volume: Volume) -> dict[str, Any]:
    """Return the letters at the edges of each plane's picture, as in EDGES; two or three, as "LA", where an edge lies between directions."""
    if volume.direction is None or (volume.oblique or 0) < SECOND_LETTER:
        return dict(EDGES)
    towards = directions(volume).T
    return {plane: [letters_towards(sign * towards[axis]) for axis in axes for sign in (-1, 1)] for plane, axes in AXES.items()}


def directions(volume: Volume) -> NDArray[np.float64]:
    """Return unit vectors (right, anterior, superior) as columns: where the display axes z, y, x lead. With letters alone they are the
    patient's axes.
    """
    if volume.direction is None:
        return np.array([[0, 0, -1], [0, -1, 0], [-1, 0, 0]], dtype=np.float64)
    order, flips = for_screen(volume.orientation)
    return volume.direction[:, order] * [flip.step or 1 for flip in flips]


def metric(volume: Volume, spacing: Sequence[float]) -> NDArray[np.float64]:
    """Return the metric (3, 3) in mm²: a step of (z, y, x) voxels has the squared length step @ metric @ step, also for oblique axes.
    `spacing` belongs to the stored axes, as shown.
    """
    grows = directions(volume)
    along = np.array(spacing)[list(for_screen(volume.orientation)[0])]
    return (grows.T @ grows) * np.outer(along, along)


@dataclass(frozen=True, eq=False)
class Overlay:
    """A heat map for viewer.js: `heat` is (z, y, x) uint8 along the display axes, `facts` says where its cells lie in the picture's voxels."""

    heat: NDArray[np.uint8]
    facts: dict[str, Any]


def overlay(volume: Volume, shown: Picture, cells: NDArray[np.float32], step: int, label: str) -> Overlay:
    """Turn saliency 0..1 at every `step`-th voxel of the volume (d, h, w), from the first, into an overlay of its picture.

    `facts["peak"]` is the picture's voxel in the middle of the highest region, None for a constant map.
    """
    order, flips = for_screen(volume.orientation)
    heat = np.ascontiguousarray(np.round(255 * cells).astype(np.uint8).transpose(order)[flips])
    origin, steps = [], []
    for axis, flip, length in zip(order, flips, shown.stored.shape, strict=True):
        block = 1 if axis == 0 else shown.block
        first, last = (np.array([0, (cells.shape[axis] - 1) * step]) - (block - 1) / 2) / block  # the outer cells' middles, as stored
        origin.append(float(first if flip.step == 1 else length - 1 - last))
        steps.append(step / block)
    peak = None
    if heat.max() > heat.min():
        middle = [start + cell * width for start, cell, width in zip(origin, highest_region(heat), steps, strict=True)]
        peak = [int(np.clip(np.floor(place + 0.5), 0, length - 1)) for place, length in zip(middle, shown.stored.shape, strict=True)]
    return Overlay(heat, {"shape": heat.shape, "origin": origin, "step": steps, "peak": peak, "label": label})


def highest_region(heat: NDArray[np.uint8]) -> list[float]:
    """Return the middle of the largest connected region of greatest heat, as an index along each axis.

    SaliencyMap is flat from the middle of an outermost cell to where the scan ends, or what the model saw of it, beyond which it falls to 0. There
    the middle of the cell is the inner end of the flat stretch.
    """
    places, _ = ndimage.label(heat == heat.max())
    largest = places == 1 + np.bincount(places.ravel())[1:].argmax()
    middle = []
    for axis, length in enumerate(heat.shape):
        others = tuple(other for other in range(heat.ndim) if other != axis)
        first, last = np.flatnonzero(largest.any(axis=others))[[0, -1]]
        along = heat.max(axis=others, where=largest.any(axis=axis, keepdims=True), initial=0)
        ends = first == 0 or along[first - 1] == 0, last == length - 1 or along[last + 1] == 0
        middle.append(float((first + last) / 2 if ends[0] == ends[1] else last if ends[0] else first))
    return middle


def downsample(array: NDArray[Any], max_voxels: int) -> tuple[NDArray[Any], int]:
    """Return (D, H, W) of at most `max_voxels`, each the mean of `block` x `block` within a slice, and `block`; up to block - 1 rows are cut."""
    block = 1
    while array.size / block**2 > max_voxels:
        block += 1
    if block == 1:
        return array, 1
    depth, height, width = array.shape
    cut = array[:, : height - height % block, : width - width % block]
    blocks = cut.reshape(depth, height // block, block, width // block, block)
    means = np.stack([part.mean(axis=(1, 3), dtype=np.float32) for part in blocks])
    return (np.round(means).astype(np.int16) if array.dtype == np.int16 else means), block


def presets(volume: Volume) -> list[list[Any]]:
    """Return [name, lowest, highest] of the windows to choose from: those of CT for Hounsfield units, and the file's own."""
    named = [[name, *window] for name, window in WINDOWS.items()] if volume.unit == "HU" else []
    return [*named, *([["From file", *volume.window]] if volume.window else [])]


def default_window(volume: Volume) -> tuple[float, float]:
    """Return the soft tissue window for a CT in Hounsfield units, else the file's own, else the volume's least and greatest value."""
    if volume.unit == "HU":
        return WINDOWS["Soft tissue"]
    if volume.window:
        return volume.window
    return float(volume.array.min()), float(volume.array.max())


def describe(volume: Volume, kind: str) -> dict[str, str]:
    """Describe what was read; `kind` says what it was read from. No file name and nothing of the patient is in it."""
    depth, height, width = volume.array.shape
    rows = {"Read from": kind, "Size": f"{depth} × {height} × {width} voxels (slices × rows × columns)"}
    if volume.spacing is None:
        rows["Spacing"] = "unknown, shown with equal sides"
    else:
        millimetres = " × ".join(f"{spacing:.4g}" for spacing in volume.spacing)
        extent = " × ".join(f"{n * mm:.0f}" for n, mm in zip(volume.array.shape, volume.spacing, strict=True))
        rows["Spacing"] = f"{millimetres} mm; covers {extent} mm"
    if volume.orientation is None:
        rows["Orientation"] = "unknown, shown as stored"
    else:
        turned = f", turned by {volume.oblique:.1f}°" if (volume.oblique or 0) >= 0.5 else ""
        rows["Orientation"] = f"{volume.orientation}, {volume.plane} slices{turned}"
    rows["Modality"] = "CT (by its Hounsfield units)" if volume.unit == "HU" else "not known to be CT"
    rows["Unit"] = UNITS.get(volume.unit, volume.unit)
    rows["Values"] = f"{volume.array.min():g} to {volume.array.max():g}"
    return rows

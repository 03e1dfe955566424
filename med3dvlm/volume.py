"""Read one scan file into one checked :class:`Volume`.

Everything that can be wrong with the geometry, the unit or the numbers of a scan is found here, so that what follows
(preprocessing, training, the app) works on volumes that are known to be sound.

Conventions, written once and used everywhere:

- **Axes** are always (D, H, W): D counts the slices as the file stores them (NIfTI: its third axis), H the rows of a
  slice, W its columns.
- **Spacing** is always (z, y, x), that is along (D, H, W), in millimetres.
- **Orientation** is three letters, one an axis, saying where the patient's anatomy goes as the index grows: "SPL"
  means slices run towards Superior, rows towards Posterior, columns towards the patient's Left.
- **Direction** is a 3x3 matrix whose columns are the unit vectors of the D, H and W axes in the RAS+ frame (x towards
  Right, y Anterior, z Superior). They are not at right angles where a CT gantry was tilted; see `Volume.straighten`.
- **Unit** is "HU" (Hounsfield units), "unit" (all values within 0..1) or "arbitrary".

The formats stand in `formats/`, one module a family; whether the numbers are Hounsfield units is decided in formats/hu.py.
Nothing that names a patient leaves this module: messages hold the path as the caller gave it, sizes and numbers only.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm import formats, geometry
from med3dvlm.formats import HU_POLICIES, READERS, VolumeError
from med3dvlm.formats.base import smallest_exact_type
from med3dvlm.formats.hu import interpret
from med3dvlm.formats.hu_values import looks_like_labels
from med3dvlm.geometry.measurements import VoxelPositions
from med3dvlm.geometry.orientation import PLANES, direction_of, is_orientation, nearest_letters
from med3dvlm.geometry.straightening import Straightening

__all__ = ["HU_POLICIES", "READERS", "UNITS", "Volume", "VolumeError", "read_volume"]

UNITS = ("HU", "unit", "arbitrary")
OBLIQUE_DEGREES = 15.0  # beyond this, calling an axis by the nearest anatomical direction is worth a warning
AMBIGUOUS_DEGREES = 35.0  # beyond this, another direction is about as near
FINEST, COARSEST = 0.05, 50.0  # mm; a scan has no finer and no coarser voxels
STRAIGHTEN, SPACING = "straighten=True (--straighten)", "spacing=(z, y, x) in mm (--spacing Z,Y,X)"  # their names in messages


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3D scan with its geometry, checked when it is made. See the module's text for the conventions.

    `array` is (D, H, W), int16 or float32, finite and not constant; `spacing` is (z, y, x) in mm; `spacing`,
    `orientation` and `direction` are None when nobody knows them. `source` is the path as given; `warnings` are
    sentences about what is doubtful or was assumed, `notes` about what was decided, such as the unit, and why.
    Of a DICOM scan, `modality` is what its header states, `window` the lowest and the highest value that it wants shown, and
    `series` a line for each series found, first the one read. `slice_positions` are D heights in mm along the normal of the
    slices, growing, where their distances differ, so that the spacing along D is only the usual one; else None. `origin` is where
    the middle of the first voxel lies, in RAS mm (3,), None where the file does not say.
    Raises VolumeError for anything else.
    """

    array: NDArray[np.int16] | NDArray[np.float32]
    spacing: tuple[float, float, float] | None = None
    orientation: str | None = None
    direction: NDArray[np.float64] | None = None
    unit: str = "arbitrary"
    source: str = "volume"
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    modality: str | None = None
    window: tuple[float, float] | None = None
    series: tuple[str, ...] = ()
    slice_positions: tuple[float, ...] | None = None
    origin: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise VolumeError(f"{self.source}: {problem}.")

    def _problem(self) -> str | None:
        array, spacing, letters = self.array, self.spacing, self.orientation
        size = "x".join(map(str, array.shape))
        if array.ndim < 3 or (array.ndim == 3 and min(array.shape) <= 1):
            return f"this is a 2D image ({size}); give a 3D scan with at least two slices"
        if array.ndim > 3:
            return f"this is {array.ndim}D ({size}) but one 3D scan is needed; save one time point or channel by itself"
        if array.dtype not in (np.int16, np.float32):
            return f"values are {array.dtype} but a Volume holds int16 or float32; convert them"
        if array.dtype == np.float32 and (bad := array.size - int(np.isfinite(array).sum())):
            return f"{bad} of {array.size} voxels are NaN or infinite; replace them by real values"
        low, high = float(array.min()), float(array.max())
        if low == high:
            return f"every voxel is {low:g}, so there is no image to see; export the scan again"
        if spacing is not None and not (len(spacing) == 3 and all(0 < mm < math.inf for mm in spacing)):
            return f"spacing is {spacing} but must be three positive numbers (z, y, x) in mm"
        if (heights := self.slice_positions) is not None and not (len(heights) == len(array) and (np.diff(heights) > 0).all()):
            return f"slice_positions must be {len(array)} growing numbers, one for each slice; leave them out"
        if letters is not None and not is_orientation(letters):
            return f"orientation is {letters!r} but must be one letter each of L/R, A/P and I/S, such as 'SPL'"
        if self.unit not in UNITS:
            return f"unit is {self.unit!r} but must be one of {', '.join(UNITS)}"
        if self.unit == "unit" and not 0 <= low <= high <= 1:
            return f"unit 'unit' is for values within 0..1 but these are {low:g} to {high:g}; use 'arbitrary'"
        return None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (D, H, W)."""
        depth, height, width = self.array.shape
        return depth, height, width

    @property
    def plane(self) -> str | None:
        """Return the plane nearest to the slices, axial, coronal or sagittal; None when the orientation is unknown."""
        return None if self.orientation is None else PLANES[self.orientation[0]]

    @property
    def oblique(self) -> float | None:
        """Return the largest angle in degrees between an axis and its anatomical one, by tilt or by rotation; None when unknown."""
        return None if self.direction is None else geometry.turn(self.direction)[1]

    @property
    def regular(self) -> bool:
        """Return whether slices are evenly spaced and, as far as is known, stacked at right angles."""
        return self.slice_positions is None and (self.direction is None or geometry.shear(self.direction) < geometry.SHEARED)

    def straightening(self) -> Straightening:
        """Return the regular grid that `straighten` resamples to, and how the slices lie in it.

        Raises:
            VolumeError: the spacing is unknown.
        """
        if self.spacing is None:
            raise VolumeError(f"{self.source}: the slices cannot be straightened as the spacing is unknown; state {SPACING}.")
        known = np.eye(3) if self.direction is None else self.direction
        return Straightening.of(self.shape, self.spacing, known, self.slice_positions)

    @property
    def affine(self) -> NDArray[np.float64] | None:
        """Return the 4x4 matrix that takes the index (d, h, w, 1) to the middle of a voxel in RAS mm; None where that is unknown.

        Without an origin in the file the first voxel lies at 0. Of an irregular stack it is that of a regular one (see `straightening`).
        """
        if self.direction is None or self.spacing is None:
            return None
        matrix = np.eye(4)
        matrix[:3, :3] = self.direction * self.spacing
        matrix[:3, 3] = 0 if self.origin is None else self.origin
        return matrix

    @property
    def voxel_positions(self) -> VoxelPositions | None:
        """Return where the voxels lie, also for an irregular stack; None where spacing or orientation is unknown.

        Where the direction is not known but the letters of the axes are, it is theirs.
        """
        if self.spacing is None or self.orientation is None:
            return None
        direction = direction_of(self.orientation) if self.direction is None else self.direction
        slices = np.arange(len(self.array), dtype=np.float64)
        if self.slice_positions is not None:
            normal = np.cross(direction[:, 1], direction[:, 2])
            rise = abs(direction[:, 0] @ normal) / np.linalg.norm(normal)
            slices = (np.array(self.slice_positions) - self.slice_positions[0]) / (rise * self.spacing[0])
        return VoxelPositions(np.zeros(3) if self.origin is None else self.origin, direction * self.spacing, slices)

    def straighten(self) -> "Volume":
        """Return the volume itself if it is regular, else resampled to evenly spaced slices stacked at right angles.

        A gantry's tilt is taken back by moving each slice within its plane; uneven slices come to lie at about the smallest distance of
        a slab (see `geometry.Straightening`). `notes` say so, and what `warnings` said of it goes.

        Raises:
            VolumeError: the spacing is unknown.
        """
        if self.regular:
            return self
        grid = self.straightening()
        letters, facing, origin = self.orientation, None, None
        if self.direction is not None:
            letters, facing = nearest_letters(grid.direction), grid.direction
            origin = None if self.origin is None else self.origin + grid.offset
        doubts = _doubts(self)
        notes = (*self.notes, f"the slices are resampled to a regular grid ({'; '.join(_irregular(self))}).")
        where: dict[str, Any] = {"spacing": grid.spacing, "orientation": letters, "direction": facing, "origin": origin}
        made = dataclasses.replace(self, array=grid.apply(self.array), notes=notes, slice_positions=None, **where)
        kept = [warning for warning in self.warnings if warning not in doubts]
        return dataclasses.replace(made, warnings=(*kept, *_doubts(made)))


def read_volume(
    path: str | os.PathLike[str],
    *,
    spacing: Sequence[float] | None = None,
    orientation: str | None = None,
    unit: str | None = None,
    hu: str = "auto",
    rescale: Sequence[float] | None = None,
    series: int | None = None,
    straighten: bool = False,
    transpose: bool = False,
) -> Volume:
    """Read a scan: a file with one of the endings in `READERS`, or a folder of DICOM files or of numbered pictures.

    Args:
        spacing: (z, y, x) in mm, instead of what the file says. Arrays and pictures have none of their own.
        orientation: three letters such as "SPL" (see the module's text), instead of what the file says.
        unit: "HU", "unit" or "arbitrary", instead of what is found.
        hu: whose slope and intercept make the values Hounsfield units, one of `HU_POLICIES`: "auto" decides by header and
            values and says why in `notes`, "header", "csv" (those in `rescale`), "already_hu" (none). See formats/hu.py.
        rescale: (slope, intercept) from a table beside the file, as CT-RATE's metadata has them; "auto" applies them only
            where the file is not in HU already.
        series: the number of a DICOM series in the list that the warning about several prints; None reads the likeliest.
        straighten: resample tilted or unevenly spaced slices to a regular grid, as `Volume.straighten` does.
        transpose: an array, which has no orientation of its own, counts its axes as x, y, z, as nibabel and MONAI do; else as z, y, x.

    The values are int16 when they are all whole numbers within its range, else float32. Raises VolumeError, one sentence,
    for anything that is not one sound 3D scan, and for slope and intercept that would be applied twice.
    """
    source = os.fspath(path)
    parts = _read(Path(path), source, series, transpose)
    array, warnings = smallest_exact_type(parts.array, source), list(parts.warnings)
    if len(parts.series) > 1:
        number = parts.series[0].partition(":")[0]
        listed = "; ".join(sorted(parts.series, key=lambda line: int(line.partition(":")[0])))
        warnings.append(
            f"there are {len(parts.series)} series ({listed}); number {number} is read; choose another by series number (--series N)."
        )
    # A scan at all, before its values are interpreted.
    bare = Volume(array, source=source, **_geometry(parts, spacing, orientation, warnings))
    warnings += _doubts(bare)
    meaning = interpret(parts._replace(array=array), source, hu, rescale, unit)
    window = parts.window
    if meaning.array is not array:  # the window was meant for other values
        window, array = None, smallest_exact_type(meaning.array, source)
    warnings += meaning.warnings
    if looks_like_labels(array):
        warnings.append("the values are few small whole numbers in solid patches; this may be a segmentation instead of a scan.")
    about: dict[str, Any] = {"modality": parts.modality, "window": window, "series": parts.series}
    volume = dataclasses.replace(bare, array=array, unit=meaning.unit, warnings=tuple(warnings), notes=meaning.notes, **about)
    return volume.straighten() if straighten else volume


def _read(location: Path, source: str, series: int | None, transpose: bool) -> formats.Parts:
    """Read the file."""
    if not location.exists():
        raise VolumeError(f"{source}: there is no such file or folder; check the path.")
    if not os.access(location, os.R_OK):
        raise VolumeError(f"{source}: reading is not permitted; ask for access or copy the scan elsewhere.")
    try:
        parts = formats.read(location, source, series)
    except MemoryError as error:
        raise VolumeError(f"{source}: there is too little memory for this scan; use a larger machine, or crop the scan.") from error
    if transpose:
        if parts.axes is not None or parts.direction is not None:
            raise VolumeError(f"{source}: transpose is for arrays without an orientation, but this file states one; leave it out.")
        return parts._replace(array=parts.array.T)
    return parts


def _geometry(parts: formats.Parts, spacing: Sequence[float] | None, orientation: str | None, warnings: list[str]) -> dict[str, Any]:
    """Return the arguments of Volume about geometry: what is stated, else what the file says. Adds to `warnings`."""
    found, direction, heights, origin = parts.spacing, None, parts.slice_positions, parts.origin
    if origin is not None and not np.isfinite(origin).all():
        origin = None
    axes = parts.direction if parts.axes is None else parts.axes
    if axes is not None:
        lengths, direction = _split(axes, warnings, parts)
        origin = None if direction is None else origin
        found = found if parts.axes is None else lengths
    if found is not None and not all(0 < mm < math.inf for mm in found):
        warnings.append(f"the file states spacing {_mm(found)}, which is not a length, and is ignored.")
        found = None

    millimetres: Any = found if spacing is None else tuple(float(mm) for mm in spacing)  # Volume checks the length
    if spacing is not None and found is not None and _mm(found) != _mm(millimetres):
        warnings.append(f"the file states spacing {_mm(found)}; the stated {_mm(millimetres)} is used.")
        heights = None
    if millimetres is None:
        warnings.append(f"the spacing is unknown; state {SPACING}.")
    letters = None if direction is None else nearest_letters(direction)
    if orientation is not None and orientation != letters:
        if letters is not None:
            warnings.append(f"the file states orientation {letters}; the stated {orientation} is used.")
        letters, direction, origin = orientation, None, None
    if letters is None:
        warnings.append("the orientation is unknown; slices are taken to be as displayed on a screen.")
    return {"spacing": millimetres, "orientation": letters, "direction": direction, "slice_positions": heights, "origin": origin}


def _split(axes: NDArray[np.float64], warnings: list[str], parts: formats.Parts) -> tuple[Any, NDArray[np.float64] | None]:
    """Return spacing (z, y, x) and direction (columns D, H, W), or (None, None) for a matrix that is no geometry."""
    columns = np.asarray(axes, dtype=np.float64)[:, ::-1]
    if not geometry.is_geometry(columns):
        warnings.append("the file's axes are singular or not finite and are ignored.")
        return None, None
    if parts.axes is not None and parts.modality is None and np.array_equal(np.abs(axes), np.eye(3)):
        warnings.append("the geometry is the 1 mm identity, which programs write for an unknown geometry; it may be wrong.")
    lengths = np.linalg.norm(columns, axis=0)
    return tuple(float(mm) for mm in lengths), columns / lengths


def _irregular(volume: Volume) -> list[str]:
    """Say what keeps a volume from being a regular grid."""
    found = []
    if volume.direction is not None and (angle := geometry.shear(volume.direction)) >= geometry.SHEARED:
        found.append(f"the stack is sheared by {_degrees(angle)}, as by a tilted gantry")
    if volume.slice_positions is not None:
        gaps = np.diff(volume.slice_positions)
        found.append(f"slice distances vary from {gaps.min():.2f} to {gaps.max():.2f} mm")
    return found


def _doubts(volume: Volume) -> list[str]:
    """Return warnings about a volume's geometry."""
    found = []
    if volume.spacing is not None and not FINEST <= min(volume.spacing) <= max(volume.spacing) <= COARSEST:
        found.append(
            f"no scan has a spacing of {_mm(volume.spacing)}, so the file's unit of length may be wrong; state the true {SPACING}."
        )
    for irregular in _irregular(volume):
        found.append(f"{irregular}; voxels are used as if they were a regular grid, and {STRAIGHTEN} resamples them to one.")
    first, second, third = volume.array.shape
    if volume.orientation is None and first == second != third:
        found.append(
            f"its first two axes are of one length ({first}x{second}x{third}), as where an array counts x, y, z; it is read as z, y, x; "
            "if it does count x, y, z, pass transpose=True (--transpose)."
        )
    if volume.direction is None:
        return found
    tilt, turn = geometry.turn(volume.direction)
    choice = ", but another one is about as near" if turn > AMBIGUOUS_DEGREES else ""
    if tilt > OBLIQUE_DEGREES:
        found.append(f"slices are tilted by {_degrees(tilt)}; they count as the nearest anatomical plane{choice}.")
    elif turn > OBLIQUE_DEGREES:
        found.append(f"the axes are turned by {_degrees(turn)}; each is called by the nearest anatomical direction{choice}.")
    return found


def _degrees(angle: float) -> str:
    return f"{round(angle, 1):g} degrees"


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{mm:.3g}" if mm < 1000 else f"{mm:.0f}" for mm in spacing) + " mm"

"""A volume to paint on: voxels in Hounsfield units, and where each of them lies in the patient.

Everything is an ellipsoid (or a cylinder, an ellipsoid of infinite length) with a soft edge about a voxel wide, painted at the voxel's place in the
patient. Nothing is resampled: an oblique or coronal scan evaluates the same body at other points, and the soft edge is its partial volume.

World coordinates are millimetres in RAS: x grows to the patient's right, y to the front, z to the head; the origin is the middle of the region.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float, float]  # x, y, z in mm
AIR = -1040.0  # HU
LOWEST, HIGHEST = -1000, 600  # HU that a scan holds, as of a scanner that clips at both ends
MIN_CHANGE = 10.0  # HU by which a finding changes the voxels that belong to it
PLANES = ("axial", "coronal", "sagittal", "oblique")


@dataclass(frozen=True)
class Acquisition:
    """Acquisition of a scan. `detail` divides every voxel's edge: 1 for the demo's coarse scans, 4 for about 1.2 mm in plane.

    `spacing`: mm between slices, rows and columns at detail 1; None draws them.
    """

    plane: str
    phase: str
    seed: int
    detail: float = 1.0
    spacing: tuple[float, float, float] | None = None


@dataclass
class Canvas:
    """A volume (D, H, W) in HU whose voxel (d, h, w) lies at `corner + directions @ (d, h, w)` in the patient, columns of `directions` in mm.

    `labels` (D, H, W) holds the number of the structure in each voxel, 1 for the first of `names`, 0 for none. `wholes` holds for each structure that
    is no more than its parts their names.
    `without` holds for each finding the same volume as it would be without that finding and those painted later.
    """

    array: NDArray[np.float32]
    directions: NDArray[np.float64]
    corner: NDArray[np.float64]
    inverse: NDArray[np.floating] = field(init=False)
    labels: NDArray[np.uint8] = field(init=False)
    names: list[str] = field(init=False, default_factory=list)
    wholes: dict[str, list[str]] = field(init=False, default_factory=dict)
    without: dict[str, NDArray[np.float32]] = field(init=False, default_factory=dict)
    _within: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.inverse = np.linalg.inv(self.directions)
        self.labels = np.zeros(self.array.shape, np.uint8)

    @contextmanager
    def finding(self, kind: str) -> Iterator[None]:
        """Context in which everything painted belongs to a finding; what is painted afterwards belongs to the body again."""
        self.without[kind] = self.array.copy()
        self._within = True
        yield
        self._within = False

    def finding_masks(self) -> dict[str, NDArray[np.bool_]]:
        """Return (D, H, W) for each finding that was painted: the voxels that it changes, as if those painted later were not there."""
        scans = [np.clip(array, LOWEST, HIGHEST) for array in (*self.without.values(), self.array)]
        return {kind: np.abs(after - before) >= MIN_CHANGE for kind, (before, after) in zip(self.without, pairwise(scans), strict=True)}

    def ellipsoid(
        self,
        centre: Point,
        radii: Point,
        value: float,
        opacity: float = 1.0,
        behind: float | None = None,
        below: float | None = None,
        name: str = "",
        parts: Mapping[str, Point] | None = None,
    ) -> None:
        """Paint an ellipsoid; an infinite radius makes a cylinder. `behind` and `below` keep the part with y, z under that value (a fluid level).

        Where a name is given, voxels that are covered by half or more belong to that structure from then on; where `parts` are, each to the one whose
        middle is nearest.
        """
        window, points = self._points_around(np.asarray(centre, float), np.asarray(radii, float))
        if points is None:
            return
        squared = np.zeros(1, np.float32)
        for axis in range(3):
            if np.isfinite(radii[axis]):
                squared = squared + ((points[axis] - centre[axis]) / radii[axis]) ** 2
        smallest = min(radii)
        voxel = float(np.linalg.norm(self.directions, axis=0).mean())
        cover = np.clip(0.5 + (1.0 - np.sqrt(squared)) * smallest / voxel, 0.0, 1.0)
        for level, axis in ((behind, 1), (below, 2)):
            if level is not None:
                cover = cover * np.clip(0.5 + (level - points[axis]) / voxel, 0.0, 1.0)
        cover = (cover * opacity).astype(np.float32)
        for array in (self.array,) if self._within else (self.array, *self.without.values()):
            part = array[window]
            part += cover * (value - part)
        if name:
            numbers = np.array([self._number(part) for part in parts or (name,)], np.uint8)
            away = [sum((point - place) ** 2 for point, place in zip(points, middle, strict=True)) for middle in (parts or {}).values()]
            np.copyto(self.labels[window], numbers[np.stack(away).argmin(axis=0) if away else 0], where=cover >= 0.5)
            if parts:
                self.wholes[name] = list(parts)

    def _number(self, name: str) -> int:
        """Return the number of a structure in `labels`."""
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name) + 1

    def structures(self) -> dict[str, NDArray[np.bool_]]:
        """Return masks (D, H, W) of each structure and of each part of one."""
        found = {name: self.labels == number for number, name in enumerate(self.names, start=1)}
        return found | {name: np.logical_or.reduce([found[part] for part in parts]) for name, parts in self.wholes.items()}

    def _points_around(
        self, centre: NDArray[np.float64], radii: NDArray[np.float64]
    ) -> tuple[tuple[slice, ...], list[NDArray[np.float32]] | None]:
        """Return the index window that holds the ellipsoid, and the window's x, y, z in mm, each broadcastable to the window's shape."""
        middle = self.inverse @ (centre - self.corner)
        reach = np.abs(self.inverse) @ np.where(np.isfinite(radii), radii + 8.0, 1e4)
        shape = np.array(self.array.shape)
        first = np.clip(np.floor(middle - reach), 0, shape).astype(int)
        last = np.clip(np.ceil(middle + reach) + 1, 0, shape).astype(int)
        if (last <= first).any():
            return (), None
        window = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
        steps = [np.arange(a, b, dtype=np.float32) for a, b in zip(first, last, strict=True)]
        grids = (steps[0][:, None, None], steps[1][None, :, None], steps[2][None, None, :])
        points = []
        for axis in range(3):
            coordinate: NDArray[np.float32] = np.full((1, 1, 1), self.corner[axis], np.float32)
            for step, grid in zip(self.directions[axis], grids, strict=True):
                if abs(step) > 1e-9:
                    coordinate = (coordinate + np.float32(step) * grid).astype(np.float32)
            points.append(coordinate)
        return window, points


def empty_canvas(acquisition: Acquisition, random: np.random.Generator) -> Canvas:
    """Make a canvas of air with the acquisition's geometry. An oblique scan is an axial one tilted by 25 to 40 degrees about x or y."""
    thick, row, column = random.uniform(6.4, 8.0), random.uniform(4.0, 5.2), random.uniform(4.0, 5.2)
    if acquisition.plane not in PLANES:
        raise ValueError(f"plane {acquisition.plane!r} is unknown; known: {', '.join(PLANES)}")
    axes = {
        "axial": [[0, 0, 1], [0, -1, 0], [-1, 0, 0]],
        "coronal": [[0, -1, 0], [0, 0, -1], [-1, 0, 0]],
        "sagittal": [[-1, 0, 0], [0, 0, -1], [0, -1, 0]],
    }
    axes["oblique"] = axes["axial"]
    directions = np.array(axes[acquisition.plane], float).T  # columns: world direction of D, H, W
    if acquisition.plane == "oblique":
        angle = np.deg2rad(random.uniform(25, 40)) * random.choice([-1, 1])
        cosine, sine = np.cos(angle), np.sin(angle)
        tilts = ([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]], [[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
        directions = np.array(tilts[random.integers(2)]) @ directions
    extent = np.abs(directions.T) @ np.array([372.0, 262.0, 292.0])  # field of view along D, H, W
    steps = np.array(acquisition.spacing or (thick, row, column)) / acquisition.detail
    shape = np.maximum(np.rint(extent / steps).astype(int), 8)
    directions = directions * steps
    corner = random.uniform(-4, 4, 3) - directions @ ((shape - 1) / 2)
    return Canvas(np.full(shape, AIR, np.float32), directions, corner)

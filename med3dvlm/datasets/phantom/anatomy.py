"""Draw a body in Hounsfield units: chest or abdomen, a contrast phase, findings, any acquisition plane and spacing.

Everything is an ellipsoid (or a cylinder, an ellipsoid of infinite length) with a soft edge about a voxel wide, painted at the voxel's place in the
patient. Nothing is resampled: an oblique or coronal scan evaluates the same body at other points, and the soft edge is its partial volume.

World coordinates are millimetres in RAS: x grows to the patient's right, y to the front, z to the head; the origin is the middle of the region.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

RIGHT, LEFT = 1.0, -1.0
REGIONS = ("chest", "abdomen")
PHASES = ("non-contrast", "arterial phase", "portal venous phase", "delayed phase")
PLANES = ("axial", "coronal", "sagittal", "oblique")
AIR, FAT, WATER, MUSCLE, BONE, METAL = -1040.0, -95.0, 6.0, 50.0, 900.0, 1000.0

# Hounsfield units by phase, in the order of PHASES
AORTA = dict(zip(PHASES, (40.0, 420.0, 250.0, 140.0), strict=True))
VEINS = dict(zip(PHASES, (40.0, 90.0, 240.0, 140.0), strict=True))
LIVER = dict(zip(PHASES, (55.0, 75.0, 150.0, 105.0), strict=True))
SPLEEN = dict(zip(PHASES, (48.0, 150.0, 135.0, 95.0), strict=True))
KIDNEY_CORTEX = dict(zip(PHASES, (34.0, 230.0, 190.0, 130.0), strict=True))
KIDNEY_PELVIS = dict(zip(PHASES, (20.0, 60.0, 120.0, 650.0), strict=True))

LOBES = {
    "right upper lobe": (74, 5, 58), "right lower lobe": (74, -20, -55),
    "left upper lobe": (-76, 5, 62), "left lower lobe": (-78, -24, -52),
}  # fmt: skip
SEGMENTS = {
    "left lateral segment": (-28, 52, 72), "left medial segment": (26, 52, 62),
    "right anterior segment": (84, 46, 52), "right posterior segment": (98, -18, 52),
}  # fmt: skip
POLES = {
    f"{pole} pole of the {name} kidney": (side * 64, -40, z)
    for name, side in (("right", RIGHT), ("left", LEFT)) for pole, z in (("upper", -2), ("lower", -72))
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One abnormality: its kind (a key of findings.yaml), place in words, diameter and how many."""

    kind: str
    place: str
    size_mm: int
    count: int


@dataclass(frozen=True)
class Body:
    """One patient's region with its findings; `seed` fixes the build of the body and everything random in it."""

    region: str
    findings: tuple[Finding, ...]
    seed: int


@dataclass(frozen=True)
class Acquisition:
    """How a body is scanned. `detail` divides every voxel's edge: 1 for the demo's coarse scans, 4 for about 1.2 mm in plane."""

    plane: str
    phase: str
    seed: int
    detail: float = 1.0


@dataclass
class Canvas:
    """A volume (D, H, W) in HU whose voxel (d, h, w) lies at `corner + directions @ (d, h, w)` in the patient, columns of `directions` in mm."""

    array: NDArray[np.float32]
    directions: NDArray[np.float64]
    corner: NDArray[np.float64]
    inverse: NDArray[np.floating] = field(init=False)

    def __post_init__(self) -> None:
        self.inverse = np.linalg.inv(self.directions)

    def ellipsoid(
        self,
        centre: tuple[float, float, float],
        radii: tuple[float, float, float],
        value: float,
        opacity: float = 1.0,
        behind: float | None = None,
        below: float | None = None,
    ) -> None:
        """Paint an ellipsoid; an infinite radius makes a cylinder. `behind` and `below` keep the part with y, z under that value (a fluid level)."""
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
        part = self.array[window]
        part += cover * (value - part)

    def _points_around(
        self, centre: NDArray[np.float64], radii: NDArray[np.float64]
    ) -> tuple[tuple[slice, ...], list[NDArray[np.float32]] | None]:
        """The index window that holds the ellipsoid, and the window's x, y, z in mm, each broadcastable to the window's shape."""
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


def draw(body: Body, acquisition: Acquisition) -> Canvas:
    """Scan a body; the array holds whole HU in [-1000, 600], as a scanner that clips at both ends would store them.

    Rows and columns follow the display convention of the nearest plane (see `med3dvlm.preprocessing`), whatever the voxel sizes.
    """
    scanner = np.random.default_rng(acquisition.seed)
    canvas = _empty_canvas(acquisition, scanner)
    anatomy = np.random.default_rng(body.seed)
    build = _Build(
        size=anatomy.uniform(0.94, 1.06, 3),
        shift=anatomy.uniform(-5, 5, (16, 3)),
        findings={finding.kind: finding for finding in body.findings},
        random=anatomy,
        phase=acquisition.phase,
    )
    (_chest if body.region == "chest" else _abdomen)(canvas, build)
    noise = scanner.standard_normal(canvas.array.shape, dtype=np.float32) * np.float32(scanner.uniform(8, 18))
    canvas.array += noise
    canvas.array = np.clip(np.rint(canvas.array), -1000, 600)
    return canvas


def _empty_canvas(acquisition: Acquisition, random: np.random.Generator) -> Canvas:
    """Air in the acquisition's geometry. An oblique scan is an axial one tilted by 25 to 40 degrees about x or y."""
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
    steps = np.array([thick, row, column]) / acquisition.detail
    shape = np.maximum(np.rint(extent / steps).astype(int), 8)
    directions = directions * steps
    corner = random.uniform(-4, 4, 3) - directions @ ((shape - 1) / 2)
    return Canvas(np.full(shape, AIR, np.float32), directions, corner)


@dataclass
class _Build:
    """What one patient's drawing needs: relative size, shifts of organs, findings by kind, a random source, the contrast phase."""

    size: NDArray[np.float64]
    shift: NDArray[np.float64]
    findings: dict[str, Finding]
    random: np.random.Generator
    phase: str

    def organ(
        self, canvas: Canvas, number: int, centre: tuple[float, float, float], radii: tuple[float, float, float], value: float
    ) -> None:
        """An ellipsoid with this patient's proportions and its own small shift."""
        x, y, z = self.place(centre, number)
        canvas.ellipsoid((x, y, z), tuple(np.asarray(radii) * self.size), value)

    def place(self, centre: tuple[float, float, float], number: int = 0) -> tuple[float, float, float]:
        x, y, z = np.asarray(centre) * self.size + self.shift[number]
        return float(x), float(y), float(z)

    def scattered(self, centre: tuple[float, float, float], spread: float) -> tuple[float, float, float]:
        x, y, z = np.asarray(centre) * self.size + self.random.uniform(-spread, spread, 3)
        return float(x), float(y), float(z)


def _trunk(canvas: Canvas, build: _Build) -> None:
    """Skin to spine: what chest and abdomen share."""
    endless = float("inf")
    width, depth, _ = build.size
    canvas.ellipsoid((0, 0, 0), (172 * width, 116 * depth, endless), FAT)
    canvas.ellipsoid((0, 2, 0), (158 * width, 103 * depth, endless), MUSCLE)
    for z in range(-140, 160, 24):  # ribs, seen as a broken ring
        for side in (RIGHT, LEFT):
            canvas.ellipsoid((side * 146 * width, -8, z), (7, 44, 7), BONE * 0.7)


def _spine(canvas: Canvas) -> None:
    canvas.ellipsoid((0, -78, 0), (21, 19, float("inf")), 260)
    canvas.ellipsoid((0, -102, 0), (9, 12, float("inf")), BONE)
    for z in range(-140, 160, 28):
        canvas.ellipsoid((0, -78, z), (22, 20, 10), BONE)


def _chest(canvas: Canvas, build: _Build) -> None:
    found, phase = build.findings, build.phase
    _trunk(canvas, build)
    build.organ(canvas, 0, (0, 4, 0), (46, 84, 170), FAT + 35)  # mediastinum
    _spine(canvas)
    air = -955.0 if "emphysema" in found else -790.0
    lungs = {side: ((side * 78, -2, 4), (62, 84, 136)) for side in (RIGHT, LEFT)}
    for number, (side, (centre, radii)) in enumerate(lungs.items(), start=1):
        build.organ(canvas, number, centre, radii, air)
        if "emphysema" in found:
            for _ in range(5):
                canvas.ellipsoid(build.scattered((side * 78, 0, 20), 50), (18, 18, 22), AIR)
    build.organ(canvas, 3, (70, 6, -148), (86, 84, 58), LIVER[phase])
    build.organ(canvas, 4, (-72, -20, -156), (60, 60, 46), SPLEEN[phase])
    if (effusion := found.get("pleural_effusion")) is not None:
        side = RIGHT if effusion.place == "right" else LEFT
        centre, radii = lungs[side]
        x, y, z = build.place(centre, 1 if side == RIGHT else 2)
        grown = tuple(np.asarray(radii) * build.size + 3)
        canvas.ellipsoid((x, y, z), grown, WATER + 6, behind=y - radii[1] + effusion.size_mm)
        canvas.ellipsoid((x, y, z), grown, WATER + 6, below=z - radii[2] + 1.3 * effusion.size_mm)
    _heart(canvas, build)
    for kind, value, flat in (("lung_opacity", -420.0, 1.0), ("consolidation", 45.0, 1.0)):
        if kind in found:
            radius = found[kind].size_mm / 2
            canvas.ellipsoid(build.scattered(LOBES[found[kind].place], 8), (radius * 0.9, radius, radius * flat), value)
    if (nodule := found.get("lung_nodule")) is not None:
        for _ in range(nodule.count):
            canvas.ellipsoid(build.scattered(LOBES[nodule.place], 24 if nodule.count > 1 else 14), (nodule.size_mm / 2,) * 3, 70)
    if (device := found.get("medical_material")) is not None:
        side = RIGHT if device.place == "right" else LEFT
        canvas.ellipsoid((side * 84, 92, 88), (27, 13, 25), METAL + 400)
        canvas.ellipsoid((side * 40, 70, 60), (26, 6, 6), METAL)
        canvas.ellipsoid((-8, 40, 20), (6, 6, 44), METAL)


def _heart(canvas: Canvas, build: _Build) -> None:
    """Great vessels, heart and what lies beside them in the mediastinum."""
    found, phase = build.findings, build.phase
    blood, veins = AORTA[phase], VEINS[phase]
    growth = 1.42 if "cardiomegaly" in found else 1.0
    x, y, z = build.place((-22, 30, -48), 5)
    radii = np.array([50.0, 44.0, 48.0]) * growth
    if (fluid := found.get("pericardial_effusion")) is not None:
        canvas.ellipsoid((x, y, z), tuple(radii + 5 + fluid.size_mm), FAT)
        canvas.ellipsoid((x, y, z), tuple(radii + fluid.size_mm), WATER)
    canvas.ellipsoid((x, y, z), tuple(radii + 3), FAT)
    canvas.ellipsoid((x, y, z), tuple(radii), MUSCLE + 0.35 * (veins - 40))
    canvas.ellipsoid((x - 14, y, z - 6), tuple(radii * 0.62), blood)
    canvas.ellipsoid((x + 22, y + 4, z + 4), tuple(radii * 0.46), veins)
    build.organ(canvas, 6, (-20, -44, 0), (14, 14, 300), blood)
    build.organ(canvas, 7, (6, 22, 44), (17, 17, 46), blood)
    build.organ(canvas, 8, (32, 24, 62), (11, 11, 60), veins)
    if (hernia := found.get("hiatal_hernia")) is not None:
        radius = hernia.size_mm / 2
        x, y, z = build.scattered((6, -38, -86), 4)
        canvas.ellipsoid((x, y, z), (radius * 1.15, radius, radius * 1.1), 30)
        canvas.ellipsoid((x, y + 5, z + 4), (radius * 0.72, radius * 0.6, radius * 0.66), -900)
    if (nodes := found.get("lymphadenopathy")) is not None:
        radius = nodes.size_mm / 2
        for place in ((34, -4, 44), (-38, -2, 34), (18, 44, 92), (-20, 40, 96)):
            canvas.ellipsoid(build.scattered(place, 4), (radius, radius, radius * 1.15), 58)


def _abdomen(canvas: Canvas, build: _Build) -> None:
    found, phase = build.findings, build.phase
    _trunk(canvas, build)
    build.organ(canvas, 0, (0, 8, 0), (140, 84, 230), FAT)
    if "ascites" in found:
        x, y, z = build.place((0, 8, 0))
        canvas.ellipsoid((x, y, z), tuple(np.array([136, 80, 190]) * build.size), WATER)
        canvas.ellipsoid((x, y + 6, z - 20), tuple(np.array([84, 56, 120]) * build.size), FAT)
    _spine(canvas)
    for side in (RIGHT, LEFT):
        canvas.ellipsoid((side * 38, -66, -70), (20, 22, 110), MUSCLE)
    for _ in range(9):  # bowel loops, some with gas
        loop = build.scattered((-8, 38, -76), 0)
        loop = (loop[0] + build.random.uniform(-80, 80), loop[1] + build.random.uniform(-18, 24), loop[2] + build.random.uniform(-55, 60))
        canvas.ellipsoid(loop, (26, 17, 17), 35)
        if build.random.random() < 0.4:
            canvas.ellipsoid((loop[0], loop[1] + 6, loop[2]), (16, 8, 10), -850)
    build.organ(canvas, 1, (66, 16, 58), (74, 78, 72), LIVER[phase])
    build.organ(canvas, 1, (-6, 46, 74), (62, 36, 42), LIVER[phase])
    build.organ(canvas, 2, (-48, 30, 96), (40, 34, 42), 35)
    build.organ(canvas, 2, (-48, 44, 104), (27, 17, 26), -850)
    spleen = np.array([32.0, 46.0, 50.0]) * (1.55 if "splenomegaly" in found else 1.0)
    build.organ(canvas, 3, (-104 + 0.4 * (spleen[0] - 32), -20, 70 - 0.6 * (spleen[2] - 50)), tuple(spleen), SPLEEN[phase])
    for number, side in ((4, RIGHT), (5, LEFT)):
        build.organ(canvas, number, (side * 64, -42, -37), (31, 29, 58), KIDNEY_CORTEX[phase])
        build.organ(canvas, number, (side * 58, -40, -37), (17, 15, 36), KIDNEY_PELVIS[phase])
    build.organ(canvas, 6, (58, 66, 6), (19, 22, 28), WATER)
    build.organ(canvas, 7, (18, -42, 0), (13, 12, 300), VEINS[phase])
    aorta = (-14, -44)
    build.organ(canvas, 8, (*aorta, 0), (11, 11, 300), AORTA[phase])
    if (aneurysm := found.get("aortic_aneurysm")) is not None:
        radius = aneurysm.size_mm / 2
        x, y, z = build.place((*aorta, -70), 8)
        canvas.ellipsoid((x, y + 0.5 * radius, z), (radius, radius, radius * 1.5), MUSCLE)
        canvas.ellipsoid((x, y + 0.5 * radius, z), (radius * 0.74, radius * 0.74, radius * 1.25), AORTA[phase])
        canvas.ellipsoid((x, y + 1.5 * radius, z), (radius * 0.5, 5, radius * 0.8), BONE)  # calcified wall
    if (stone := found.get("gallstone")) is not None:
        canvas.ellipsoid(build.place((58, 62, 0), 6), (stone.size_mm / 2,) * 3, METAL)
    if (mass := found.get("liver_mass")) is not None:
        canvas.ellipsoid(build.scattered(SEGMENTS[mass.place], 5), (mass.size_mm / 2,) * 3, LIVER[phase] - 85)
    if (cyst := found.get("renal_cyst")) is not None:
        x, y, z = build.scattered(POLES[cyst.place], 4)
        canvas.ellipsoid((x * 1.2, y, z), (cyst.size_mm / 2,) * 3, WATER)
    if (stone := found.get("kidney_stone")) is not None:
        canvas.ellipsoid(build.scattered(POLES[stone.place], 4), (stone.size_mm / 2,) * 3, METAL)

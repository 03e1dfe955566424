"""Shared parts of all drawings: tissues in Hounsfield units, a patient and its findings, what chest and abdomen have in common."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from med3dvlm.datasets.phantom.canvas import Canvas, Point

RIGHT, LEFT = 1.0, -1.0
SIDE_NAMES = {RIGHT: "right", LEFT: "left"}
REGIONS = ("chest", "abdomen")
PHASES = ("non-contrast", "arterial phase", "portal venous phase", "delayed phase")
FAT, WATER, MUSCLE, BONE, METAL = -95.0, 6.0, 50.0, 900.0, 1000.0

# Hounsfield units by phase, in the order of PHASES
AORTA = dict(zip(PHASES, (40.0, 420.0, 250.0, 140.0), strict=True))
VEINS = dict(zip(PHASES, (40.0, 90.0, 240.0, 140.0), strict=True))
LIVER = dict(zip(PHASES, (55.0, 75.0, 150.0, 105.0), strict=True))
SPLEEN = dict(zip(PHASES, (48.0, 150.0, 135.0, 95.0), strict=True))
KIDNEY_CORTEX = dict(zip(PHASES, (34.0, 230.0, 190.0, 130.0), strict=True))
KIDNEY_PELVIS = dict(zip(PHASES, (20.0, 60.0, 120.0, 350.0), strict=True))  # excreted contrast does not hide a stone


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


@dataclass
class Build:
    """One patient's anatomy while it is drawn: relative size, shifts of organs, findings by kind, a random source, the contrast phase."""

    size: NDArray[np.float64]
    shift: NDArray[np.float64]
    findings: dict[str, Finding]
    random: np.random.Generator
    phase: str

    def organ(
        self,
        canvas: Canvas,
        number: int,
        centre: Point,
        radii: Point,
        value: float,
        name: str = "",
        parts: Mapping[str, Point] | None = None,
    ) -> None:
        """Paint an ellipsoid with this patient's proportions and a small random shift; the middles of its parts move along."""
        moved = {part: self.place(middle, number) for part, middle in (parts or {}).items()}
        canvas.ellipsoid(self.place(centre, number), tuple(np.asarray(radii) * self.size), value, name=name, parts=moved)

    def place(self, centre: Point, number: int = 0) -> Point:
        x, y, z = np.asarray(centre) * self.size + self.shift[number]
        return float(x), float(y), float(z)

    def scattered(self, centre: Point, spread: float) -> Point:
        x, y, z = np.asarray(centre) * self.size + self.random.uniform(-spread, spread, 3)
        return float(x), float(y), float(z)


def trunk(canvas: Canvas, build: Build) -> None:
    """Paint what chest and abdomen share, from skin to spine."""
    endless = float("inf")
    width, depth, _ = build.size
    canvas.ellipsoid((0, 0, 0), (172 * width, 116 * depth, endless), FAT)
    canvas.ellipsoid((0, 2, 0), (158 * width, 103 * depth, endless), MUSCLE)
    for z in range(-140, 160, 24):  # ribs, seen as a broken ring
        for side in (RIGHT, LEFT):
            canvas.ellipsoid((side * 146 * width, -8, z), (7, 44, 7), BONE * 0.7)


def spine(canvas: Canvas) -> None:
    canvas.ellipsoid((0, -78, 0), (21, 19, float("inf")), 260, name="spine")
    canvas.ellipsoid((0, -102, 0), (9, 12, float("inf")), BONE)
    for z in range(-140, 160, 28):
        canvas.ellipsoid((0, -78, z), (22, 20, 10), BONE, name="spine")

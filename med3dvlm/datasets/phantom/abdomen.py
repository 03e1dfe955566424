"""An abdomen and its findings. Places are (x, y, z) in mm, see `canvas.py`."""

import numpy as np

from med3dvlm.datasets.phantom.body import (
    AORTA,
    BONE,
    FAT,
    KIDNEY_CORTEX,
    KIDNEY_PELVIS,
    LEFT,
    LIVER,
    METAL,
    MUSCLE,
    RIGHT,
    SIDE_NAMES,
    SPLEEN,
    VEINS,
    WATER,
    Build,
    spine,
    trunk,
)  # fmt: skip
from med3dvlm.datasets.phantom.canvas import Canvas

SEGMENTS = {
    "left lateral segment": (-28, 52, 72), "left medial segment": (26, 52, 62),
    "right anterior segment": (84, 46, 52), "right posterior segment": (98, -18, 52),
}  # fmt: skip
POLES = {
    f"{pole} pole of the {name} kidney": (side * 64, -40, z)
    for name, side in (("right", RIGHT), ("left", LEFT)) for pole, z in (("upper", -2), ("lower", -72))
}  # fmt: skip


def draw_abdomen(canvas: Canvas, build: Build) -> None:
    found, phase = build.findings, build.phase
    trunk(canvas, build)
    build.organ(canvas, 0, (0, 8, 0), (140, 84, 230), FAT)
    if "ascites" in found:
        with canvas.finding("ascites"):
            x, y, z = build.place((0, 8, 0))
            canvas.ellipsoid((x, y, z), tuple(np.array([136, 80, 190]) * build.size), WATER)
            canvas.ellipsoid((x, y + 6, z - 20), tuple(np.array([84, 56, 120]) * build.size), FAT)
    spine(canvas)
    for side in (RIGHT, LEFT):
        canvas.ellipsoid((side * 38, -66, -70), (20, 22, 110), MUSCLE)
    for number, side in ((4, RIGHT), (5, LEFT)):  # fat about the kidneys, which ascites does not reach
        build.organ(canvas, number, (side * 72, -38, -37), (44, 32, 80), FAT)
    for _ in range(9):  # bowel loops, some with gas
        loop = build.scattered((-8, 38, -76), 0)
        loop = (loop[0] + build.random.uniform(-80, 80), loop[1] + build.random.uniform(-18, 24), loop[2] + build.random.uniform(-55, 60))
        canvas.ellipsoid(loop, (26, 17, 17), 35)
        if build.random.random() < 0.4:
            canvas.ellipsoid((loop[0], loop[1] + 6, loop[2]), (16, 8, 10), -850)
    build.organ(canvas, 2, (-48, 30, 96), (40, 34, 42), 35, "stomach")
    build.organ(canvas, 2, (-48, 44, 104), (27, 17, 26), -850, "stomach")
    build.organ(canvas, 1, (66, 16, 58), (74, 78, 72), LIVER[phase], "liver", SEGMENTS)
    build.organ(canvas, 1, (-6, 46, 74), (62, 36, 42), LIVER[phase], "liver", SEGMENTS)
    spleen = np.array([32.0, 46.0, 50.0]) * (1.55 if "splenomegaly" in found else 1.0)
    build.organ(canvas, 3, (-104 + 0.4 * (spleen[0] - 32), -20, 70 - 0.6 * (spleen[2] - 50)), tuple(spleen), SPLEEN[phase], "spleen")
    for number, side in ((4, RIGHT), (5, LEFT)):
        name, poles = f"{SIDE_NAMES[side]} kidney", {name: place for name, place in POLES.items() if place[0] * side > 0}
        build.organ(canvas, number, (side * 64, -42, -37), (31, 29, 58), KIDNEY_CORTEX[phase], name, poles)
        build.organ(canvas, number, (side * 58, -40, -37), (17, 15, 36), KIDNEY_PELVIS[phase], name, poles)
    build.organ(canvas, 6, (58, 66, 6), (19, 22, 28), WATER, "gallbladder")
    build.organ(canvas, 7, (18, -42, 0), (13, 12, 300), VEINS[phase], "inferior vena cava")
    aorta = (-14, -44)
    build.organ(canvas, 8, (*aorta, 0), (11, 11, 300), AORTA[phase], "aorta")
    if (aneurysm := found.get("aortic_aneurysm")) is not None:
        with canvas.finding("aortic_aneurysm"):
            radius = aneurysm.size_mm / 2
            x, y, z = build.place((*aorta, -70), 8)
            canvas.ellipsoid((x, y + 0.5 * radius, z), (radius, radius, radius * 1.5), MUSCLE)
            canvas.ellipsoid((x, y + 0.5 * radius, z), (radius * 0.74, radius * 0.74, radius * 1.25), AORTA[phase])
            canvas.ellipsoid((x, y + 1.5 * radius, z), (radius * 0.5, 5, radius * 0.8), BONE)  # calcified wall
    if (stone := found.get("gallstone")) is not None:
        with canvas.finding("gallstone"):
            canvas.ellipsoid(build.place((58, 62, 0), 6), (stone.size_mm / 2,) * 3, METAL)
    if (mass := found.get("liver_mass")) is not None:
        with canvas.finding("liver_mass"):
            canvas.ellipsoid(build.scattered(SEGMENTS[mass.place], 5), (mass.size_mm / 2,) * 3, LIVER[phase] - 85)
    if (cyst := found.get("renal_cyst")) is not None:
        with canvas.finding("renal_cyst"):
            x, y, z = build.scattered(POLES[cyst.place], 4)
            canvas.ellipsoid((x * 1.25, y, z), (cyst.size_mm / 2,) * 3, WATER)  # bulges into the fat, as most cysts do
    if (stone := found.get("kidney_stone")) is not None:
        with canvas.finding("kidney_stone"):
            canvas.ellipsoid(build.scattered(POLES[stone.place], 4), (stone.size_mm / 2,) * 3, METAL)

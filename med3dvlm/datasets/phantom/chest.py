"""A chest and the findings that CT-RATE labels in it. Places are (x, y, z) in mm, see `canvas.py`."""

import numpy as np

from med3dvlm.datasets.phantom.body import (
    AORTA,
    BONE,
    FAT,
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
from med3dvlm.datasets.phantom.canvas import AIR, Canvas

LOBES = {
    "right upper lobe": (74, 5, 58), "right lower lobe": (74, -20, -55),
    "left upper lobe": (-76, 5, 62), "left lower lobe": (-78, -24, -52),
}  # fmt: skip


def draw_chest(canvas: Canvas, build: Build) -> None:
    found, phase = build.findings, build.phase
    trunk(canvas, build)
    build.organ(canvas, 0, (0, 4, 0), (46, 84, 170), FAT + 35)  # mediastinum
    spine(canvas)
    lungs = {side: ((side * 78, -2, 4), (62, 84, 136)) for side in (RIGHT, LEFT)}
    for number, (side, (centre, radii)) in enumerate(lungs.items(), start=1):
        lobes = {name: place for name, place in LOBES.items() if place[0] * side > 0}
        build.organ(canvas, number, centre, radii, -790, f"{SIDE_NAMES[side]} lung", lobes)
    if "emphysema" in found:
        with canvas.finding("emphysema"):
            for number, (side, (centre, radii)) in enumerate(lungs.items(), start=1):
                build.organ(canvas, number, centre, radii, -955)
                for _ in range(5):
                    canvas.ellipsoid(build.scattered((side * 78, 0, 20), 50), (18, 18, 22), AIR)
    build.organ(canvas, 3, (70, 6, -148), (86, 84, 58), LIVER[phase], "liver")
    build.organ(canvas, 4, (-72, -20, -156), (60, 60, 46), SPLEEN[phase], "spleen")
    if (effusion := found.get("pleural_effusion")) is not None:
        with canvas.finding("pleural_effusion"):
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
            with canvas.finding(kind):
                canvas.ellipsoid(build.scattered(LOBES[found[kind].place], 8), (radius * 0.9, radius, radius * flat), value)
    if (nodule := found.get("lung_nodule")) is not None:
        with canvas.finding("lung_nodule"):
            for _ in range(nodule.count):
                canvas.ellipsoid(build.scattered(LOBES[nodule.place], 24 if nodule.count > 1 else 14), (nodule.size_mm / 2,) * 3, 70)
    if (device := found.get("medical_material")) is not None:
        with canvas.finding("medical_material"):
            side = RIGHT if device.place == "right" else LEFT
            canvas.ellipsoid((side * 84, 92, 88), (27, 13, 25), METAL + 400)
            canvas.ellipsoid((side * 40, 70, 60), (26, 6, 6), METAL)
            canvas.ellipsoid((-8, 40, 20), (6, 6, 44), METAL)
    _airways_and_septa(canvas, build)
    _calcifications(canvas, build)


def _airways_and_septa(canvas: Canvas, build: Build) -> None:
    """Findings that are a texture, or a band, tube or plate in the lung."""
    found = build.findings
    if "mosaic_attenuation_pattern" in found:
        with canvas.finding("mosaic_attenuation_pattern"):
            for side in (RIGHT, LEFT):
                for place, (y, z) in enumerate((y, z) for z in (-70, -25, 20, 65) for y in (-38, 22)):
                    canvas.ellipsoid(build.scattered((side * 80, y, z), 7), (25, 20, 18), -560 if place % 2 else -930)
    if "interlobular_septal_thickening" in found:
        with canvas.finding("interlobular_septal_thickening"):
            for side in (RIGHT, LEFT):
                for z in range(-84, 20, 21):
                    canvas.ellipsoid(build.scattered((side * 92, -22, z), 3), (34, 40, 3), 0, opacity=0.8)
                for x in (66, 86, 106):
                    canvas.ellipsoid(build.scattered((side * x, -22, -36), 3), (3, 40, 54), 0, opacity=0.8)
    if (sequela := found.get("pulmonary_fibrotic_sequela")) is not None:
        with canvas.finding("pulmonary_fibrotic_sequela"):
            side = RIGHT if "right" in sequela.place else LEFT
            for x, y in ((58, 20), (70, -4), (82, -26)):
                canvas.ellipsoid(build.scattered((side * x, y, 96), 4), (5, 14, 27), 30)
    if (collapse := found.get("atelectasis")) is not None:
        with canvas.finding("atelectasis"):
            side = RIGHT if "right" in collapse.place else LEFT
            canvas.ellipsoid(build.scattered((side * 78, -14, -78), 5), (collapse.size_mm / 2, collapse.size_mm / 2, 7), 35)
    if (wall := found.get("peribronchial_thickening")) is not None:
        with canvas.finding("peribronchial_thickening"):
            side = RIGHT if "right" in wall.place else LEFT
            for across, forward, upward in ((44, 6, 6), (60, 14, 22), (60, -8, -8)):
                middle = build.scattered((side * across, forward, upward), 3)
                canvas.ellipsoid(middle, (26, 11, 11), 20)
                canvas.ellipsoid(middle, (27, 4, 4), AIR)
    if (tubes := found.get("bronchiectasis")) is not None:
        with canvas.finding("bronchiectasis"):
            side = RIGHT if "right" in tubes.place else LEFT
            for across, back in ((60, -34), (84, -46), (76, -10), (100, -24)):
                middle = build.scattered((side * across, back, -44), 3)
                canvas.ellipsoid(middle, (12, 12, 34), 20)
                canvas.ellipsoid(middle, (7.5, 7.5, 36), AIR)


def _calcifications(canvas: Canvas, build: Build) -> None:
    """Plaques in the wall of the aorta, and along the arteries of the heart."""
    found = build.findings
    if "arterial_wall_calcification" in found:
        with canvas.finding("arterial_wall_calcification"):
            for level in range(-104, 105, 26):
                angle = build.random.uniform(0, 2 * np.pi)
                centre = build.place((-20 + 14 * np.cos(angle), -44 + 14 * np.sin(angle), level), 6)
                canvas.ellipsoid(centre, (5.5, 5.5, 10), BONE)
    if "coronary_artery_wall_calcification" in found:
        with canvas.finding("coronary_artery_wall_calcification"):
            x, y, z = build.place((-22, 30, -48), 5)
            for across, upwards in ((-30, 22), (-14, 30), (6, 30), (22, 20)):
                canvas.ellipsoid((x + across, y + 30, z + upwards), (9, 5.5, 5.5), BONE)


def _heart(canvas: Canvas, build: Build) -> None:
    """Great vessels, heart and what lies beside them in the mediastinum."""
    found, phase = build.findings, build.phase
    blood, veins = AORTA[phase], VEINS[phase]
    growth = 1.42 if "cardiomegaly" in found else 1.0
    x, y, z = build.place((-22, 30, -48), 5)
    radii = np.array([50.0, 44.0, 48.0]) * growth
    if (fluid := found.get("pericardial_effusion")) is not None:
        with canvas.finding("pericardial_effusion"):
            canvas.ellipsoid((x, y, z), tuple(radii + 5 + fluid.size_mm), FAT)
            canvas.ellipsoid((x, y, z), tuple(radii + fluid.size_mm), WATER)
    canvas.ellipsoid((x, y, z), tuple(radii + 3), FAT)
    canvas.ellipsoid((x, y, z), tuple(radii), MUSCLE + 0.35 * (veins - 40), name="heart")
    canvas.ellipsoid((x - 14, y, z - 6), tuple(radii * 0.62), blood)
    canvas.ellipsoid((x + 22, y + 4, z + 4), tuple(radii * 0.46), veins)
    build.organ(canvas, 6, (-20, -44, 0), (14, 14, 300), blood, "aorta")
    build.organ(canvas, 7, (6, 22, 44), (17, 17, 46), blood)
    build.organ(canvas, 8, (32, 24, 62), (11, 11, 60), veins)
    if (hernia := found.get("hiatal_hernia")) is not None:
        with canvas.finding("hiatal_hernia"):
            radius = hernia.size_mm / 2
            x, y, z = build.scattered((6, -38, -86), 4)
            canvas.ellipsoid((x, y, z), (radius * 1.15, radius, radius * 1.1), 30)
            canvas.ellipsoid((x, y + 5, z + 4), (radius * 0.72, radius * 0.6, radius * 0.66), -900)
    if (nodes := found.get("lymphadenopathy")) is not None:
        with canvas.finding("lymphadenopathy"):
            radius = nodes.size_mm / 2
            for place in ((34, -4, 44), (-38, -2, 34), (18, 44, 92), (-20, 40, 96)):
                canvas.ellipsoid(build.scattered(place, 4), (radius, radius, radius * 1.15), 58)

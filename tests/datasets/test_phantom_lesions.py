"""Masks of lesions against the anatomy: location in the patient, size, and the values of the scan there."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from med3dvlm.datasets.phantom import Acquisition, Body, Finding, draw, draw_with_masks, plan_phantoms, read_plans
from med3dvlm.datasets.phantom.abdomen import POLES, SEGMENTS
from med3dvlm.datasets.phantom.body import WATER
from med3dvlm.datasets.phantom.canvas import MIN_CHANGE
from med3dvlm.datasets.phantom.chest import LOBES
from med3dvlm.datasets.phantom.wording import KINDS

PLACED = {
    "lung_nodule": LOBES,
    "consolidation": LOBES,
    "lung_opacity": LOBES,
    "liver_mass": SEGMENTS,
    "renal_cyst": POLES,
    "kidney_stone": POLES,
}


def scanned(kind: str, place: str, size_mm: int, plane: str = "axial", *others: Finding) -> tuple[Body, Acquisition]:
    body = Body(KINDS[kind]["region"], (*others, Finding(kind, place, size_mm, 1)), seed=5)
    return body, Acquisition(plane, "portal venous phase", seed=6, detail=1.5)


def middle(body: Body, acquisition: Acquisition, kind: str) -> np.ndarray:
    """Returns the centre of the mask in mm."""
    canvas, masks = draw_with_masks(body, acquisition)
    return canvas.corner + canvas.directions @ np.argwhere(masks[kind]).mean(axis=0)


@pytest.mark.parametrize("kind", PLACED)
def test_the_stated_place_is_the_nearest_known_one(kind: str) -> None:
    places = PLACED[kind]
    for number, place in enumerate(places):
        found = middle(*scanned(kind, place, 30, ("axial", "coronal", "sagittal", "oblique")[number]), kind)
        assert min(places, key=lambda name: np.linalg.norm(found - places[name])) == place


@pytest.mark.parametrize("kind", PLACED)
def test_a_lesion_lies_in_the_structure_that_its_place_names(kind: str) -> None:
    for place in PLACED[kind]:
        canvas, masks = draw_with_masks(*scanned(kind, place, 24))
        structures = canvas.structures()
        shares = {name: (masks[kind] & structures[name]).sum() for name in PLACED[kind]}
        assert max(shares, key=shares.__getitem__) == place and shares[place] > 0.5 * masks[kind].sum()
        for whole, parts in canvas.wholes.items():
            assert np.array_equal(structures[whole], np.any([structures[part] for part in parts], axis=0))
            assert sum(structures[part].sum() for part in parts) == structures[whole].sum()


@pytest.mark.parametrize("place", POLES)
def test_a_cyst_is_seen_beside_ascites(place: str) -> None:
    """Both are water; between them lie kidney and fat."""
    canvas, masks = draw_with_masks(*scanned("renal_cyst", place, 45, "axial", Finding("ascites", "abdomen", 0, 1)))
    rim = binary_dilation(masks["renal_cyst"], iterations=2) & ~binary_dilation(masks["renal_cyst"])
    assert np.median(np.abs(canvas.array[masks["renal_cyst"]] - WATER)) < 25
    assert (np.abs(canvas.array[rim] - WATER) < 40).mean() < 0.25


def test_a_stone_is_seen_in_the_delayed_phase() -> None:
    body, acquisition = scanned("kidney_stone", "lower pole of the left kidney", 24)
    canvas, masks = draw_with_masks(body, replace(acquisition, phase="delayed phase"))
    kidney = canvas.structures()["left kidney"] & ~binary_dilation(masks["kidney_stone"], iterations=2)
    assert canvas.array[kidney].max() < 500 < np.median(canvas.array[masks["kidney_stone"]])


def test_the_mask_of_a_ball_has_its_volume() -> None:
    for size in (24, 36):
        body, acquisition = scanned("lung_nodule", "left upper lobe", size)
        voxel = abs(np.linalg.det(draw(body, acquisition).directions))
        edge = voxel ** (1 / 3)
        volume = draw_with_masks(body, acquisition)[1]["lung_nodule"].sum() * voxel
        ball = [4 / 3 * np.pi * (size / 2 + shift) ** 3 for shift in (-edge / 2, edge / 2 + 1)]  # half of the soft edge less or more
        assert ball[0] < volume < ball[1]


def test_other_findings_do_not_move_a_mask() -> None:
    """Random numbers drawn before a lesion move it in scan and mask alike; later ones must not."""
    others = (
        Finding("consolidation", "right lower lobe", 60, 1),
        Finding("lung_opacity", "right upper lobe", 70, 1),
        Finding("emphysema", "both lungs", 0, 1),
        Finding("cardiomegaly", "heart", 0, 1),
    )
    body, acquisition = scanned("lung_nodule", "left lower lobe", 36, "coronal", *others)
    canvas, masks = draw_with_masks(body, acquisition)
    array, nodule, consolidation = canvas.array, masks["lung_nodule"], masks["consolidation"]
    values = array[nodule]
    assert (values > 0).mean() > 0.3 and np.median(array[~nodule & (array > -990) & (array < -800)]) < -900  # 70 HU within emphysema
    assert (array[consolidation] > -100).mean() > 0.5  # 45 HU
    assert not (nodule & consolidation).any()


def test_every_finding_of_a_plan_has_a_mask_within_its_scan() -> None:
    for plan in plan_phantoms(40, seed=2, detail=0.7)[:12]:
        canvas, masks = draw_with_masks(plan.body, plan.acquisition)
        assert masks.keys() == {finding.kind for finding in plan.body.findings}
        for kind, mask in masks.items():
            assert mask.shape == canvas.array.shape and 0 < mask.mean() < 0.5, kind


def test_a_mask_is_where_the_scan_differs_from_one_without_the_finding() -> None:
    for plan in plan_phantoms(40, seed=3, detail=0.7)[:20]:
        canvas, masks = draw_with_masks(plan.body, plan.acquisition)
        enlarged = [finding for finding in plan.body.findings if finding.kind not in canvas.without]  # organs, drawn larger
        painted = sorted(plan.body.findings, key=lambda finding: [*canvas.without, finding.kind].index(finding.kind))
        painted = [finding for finding in painted if finding not in enlarged]
        scans = [
            draw(replace(plan.body, findings=(*enlarged, *painted[:count])), plan.acquisition).array for count in range(len(painted) + 1)
        ]
        assert np.array_equal(scans[-1], canvas.array)
        for finding, before, after in zip(painted, scans, scans[1:], strict=False):
            change = np.abs(after - before)  # of whole HU
            doubtful = (
                (np.abs(change - MIN_CHANGE) <= 1) | (np.abs(after) >= 500) | (np.abs(before) >= 500)
            )  # rounded, or clipped with noise
            assert not (masks[finding.kind] ^ (change >= MIN_CHANGE))[~doubtful].any(), finding


def test_plans_are_read_from_the_settings_of_what_was_written(phantoms: Path, tmp_path: Path) -> None:
    assert read_plans(phantoms) == plan_phantoms(28, seed=0, detail=0.5)
    with pytest.raises(FileNotFoundError, match="phantoms.json is missing"):
        read_plans(tmp_path)
    settings = json.loads((phantoms / "phantoms.json").read_text())
    (tmp_path / "phantoms.json").write_text(json.dumps(settings | {"plan": "0" * 16}))
    with pytest.raises(ValueError, match="another version"):
        read_plans(tmp_path)

"""Chest phantoms in CT-RATE's layout: the real reader reads them, texts and labels agree, and both versions are equal volumes."""

import csv
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from med3dvlm import VolumeProcessor, read_volume
from med3dvlm.datasets import ct_rate
from med3dvlm.datasets.phantom.anatomy import draw
from med3dvlm.datasets.phantom.body import Body, Finding
from med3dvlm.datasets.phantom.canvas import Acquisition
from med3dvlm.datasets.phantom.ct_rate import KINDS, Plan, plan_ct_rate, write_ct_rate
from med3dvlm.reports.findings import FINDINGS_CT_RATE, read_findings


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return plan_ct_rate(600, seed=0)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same 12 coarse volumes in versions 1 and 2."""
    paths = {version: tmp_path_factory.mktemp(f"version{version}") for version in (1, 2)}
    for version, path in paths.items():
        write_ct_rate(path, 12, seed=1, detail=0.5, version=version)
    return paths


def test_patients_are_split_and_findings_are_equally_common(plans: list[Plan]) -> None:
    patients = {split: {plan.name.rsplit("_", 2)[0] for plan in plans if plan.split == split} for split in ("train", "valid")}
    assert not patients["train"] & patients["valid"] and len(patients["train"]) > 300
    assert Counter(plan.split for plan in plans) == {"train": 480, "valid": 120}
    assert len({plan.name for plan in plans}) == 600
    counts = Counter(finding.kind for plan in plans for finding in plan.body.findings)
    assert list(KINDS) == list(FINDINGS_CT_RATE) and min(counts.values()) > 90 and max(counts.values()) < 150
    assert plan_ct_rate(20, seed=3) == plan_ct_rate(20, seed=3) != plan_ct_rate(20, seed=4)


def test_only_reconstructions_of_one_scan_share_a_report(plans: list[Plan]) -> None:
    for split in ("train", "valid"):
        scans = {plan.name.rsplit("_", 1)[0]: plan.findings for plan in plans if plan.split == split}
        assert len(set(scans.values())) == len(scans)
    assert 0.1 < np.mean([plan.name.endswith("_2") for plan in plans]) < 0.3


def test_reports_state_what_the_labels_say(plans: list[Plan]) -> None:
    """The rules for real reports read exactly the findings that are drawn."""
    for plan in plans:
        read = read_findings(f"{plan.findings} {plan.impressions}")
        assert {kind for kind in FINDINGS_CT_RATE if read[kind]} == {finding.kind for finding in plan.body.findings}, plan.findings


@pytest.mark.parametrize("kind", FINDINGS_CT_RATE)
def test_every_finding_changes_the_volume_within_the_body(kind: str) -> None:
    size = KINDS[kind].get("size_mm", (0, 0))[0]
    acquisition = Acquisition("axial", "non-contrast", 5, spacing=(6.0, 4.0, 4.0))
    with_it = draw(Body("chest", (Finding(kind, KINDS[kind]["places"][0], size, 1),), 7), acquisition)
    without = draw(Body("chest", (), 7), acquisition)
    changed = np.argwhere(np.abs(with_it.array - without.array) > 100)
    assert len(changed) > 20, kind
    places = with_it.corner + changed @ with_it.directions.T
    assert (np.abs(places) < (172, 118, 150)).all(), kind


def test_the_reader_finds_reports_labels_and_metadata(roots: dict[int, Path]) -> None:
    plans = {plan.name: plan for plan in plan_ct_rate(12, seed=1, detail=0.5)}
    assert ct_rate.splits(roots[2]) == ["train_fixed", "valid_fixed"] and ct_rate.splits(roots[1]) == ["train", "valid"]
    studies = [study for split in ("train_fixed", "valid_fixed") for study in ct_rate.read(roots[2], split)[0]]
    assert len(studies) == 12
    for study in studies:
        plan = plans[study.id.rsplit("/", 1)[1]]
        assert study.report == f"{plan.findings} {plan.impressions}"
        assert {kind for kind, value in study.labels.items() if value} == {finding.kind for finding in plan.body.findings}
        assert len(study.labels) == 18
    with (roots[2] / "metadata" / "train_metadata.csv").open() as file:
        assert {row["RescaleIntercept"] for row in csv.DictReader(file)} == {"-1024", "-8192"}


def test_both_versions_are_one_volume(roots: dict[int, Path]) -> None:
    processor = VolumeProcessor("ct_rate", size=(20, 30, 25), spacing=(12, 9, 9))
    raw, fixed = (ct_rate.read(roots[1], "train")[0], ct_rate.read(roots[2], "train_fixed")[0])
    for one, two in zip(raw, fixed, strict=True):
        first, second = (read_volume(roots[number] / study.image, **study.reading) for number, study in ((1, one), (2, two)))
        assert first.unit == second.unit == "HU" and first.orientation == second.orientation
        assert np.array_equal(first.array, second.array)
        assert processor.transform(first).equal(processor.transform(second))
    stored = nib.load(roots[1] / raw[0].image)
    assert np.array_equal(stored.affine, np.eye(4)) and np.asarray(stored.dataobj).min() >= 0


def test_a_killed_run_keeps_what_is_there_and_other_settings_are_refused(roots: dict[int, Path]) -> None:
    kept = sorted(roots[2].glob("*_fixed/*/*/*.nii.gz"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    kept[0].unlink()
    write_ct_rate(roots[2], 12, seed=1, detail=0.5)
    assert sorted(roots[2].glob("*_fixed/*/*/*.nii.gz")) == kept
    assert all(path.stat().st_mtime_ns == before[path] for path in kept[1:])
    with pytest.raises(ValueError, match="phantoms of other settings"):
        write_ct_rate(roots[2], 12, seed=2, detail=0.5)
    with pytest.raises(ValueError, match="versions 1 .* and 2"):
        write_ct_rate(roots[2], 12, seed=1, detail=0.5, version=3)
    with pytest.raises(ValueError, match="at least 10 volumes"):
        plan_ct_rate(9)

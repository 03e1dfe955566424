"""Synthetic chests in the layout of CT-RATE: each finding is a bright cube at its own place in grey noise."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np

from med3dvlm.datasets.ct_rate import LABEL_COLUMNS

SHAPE = (64, 64, 32)  # x, y, z, at 0.75 x 0.75 x 1.5 mm
PATIENTS = {"train": 48, "valid": 24}  # of every third patient there are two reconstructions
EVERYWHERE, NOWHERE = 0, 1  # findings that all of the validation split have, and none


def write_chests(root: Path) -> None:
    """Write version 2 of both splits: volumes in HU, reports, and labels with columns in another order than the published one.

    Some labels of the validation split are empty, that is unknown.
    """
    random = np.random.default_rng(0)
    for split, patients in PATIENTS.items():
        names = [f"{split}_{patient}_a_{scan}" for patient in range(patients) for scan in range(1, 3 if patient % 3 == 0 else 2)]
        present = {name.rpartition("_")[0]: random.random(len(LABEL_COLUMNS)) < 0.35 for name in names}
        if split == "valid":
            for findings in present.values():
                findings[EVERYWHERE], findings[NOWHERE] = True, False
        labels, reports = [], []
        for number, name in enumerate(names):
            findings = present[name.rpartition("_")[0]]
            path = root / f"{split}_fixed" / name.rpartition("_")[0].rpartition("_")[0] / name.rpartition("_")[0] / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(_chest(findings, random), np.diag([-0.75, -0.75, 1.5, 1.0])), path)
            cells = [str(int(one)) for one in findings]
            if split == "valid" and number % 5 == 0:
                cells[5] = ""
            labels.append((f"{name}.nii.gz", *cells))
            reports.append((f"{name}.nii.gz", ". ".join(np.array(LABEL_COLUMNS)[findings]) or "Normal chest", "Not given."))
        long = {"train": "train", "valid": "validation"}[split]
        _table(root / "radiology_text_reports" / f"{long}_reports.csv", ("VolumeName", "Findings_EN", "Impressions_EN"), reports)
        order = [0, *range(len(LABEL_COLUMNS), 0, -1)]
        rows = [[row[place] for place in order] for row in (("VolumeName", *LABEL_COLUMNS), *labels)]
        _table(root / "multi_abnormality_labels" / f"{split}_predicted_labels.csv", rows[0], rows[1:])


def _chest(findings: np.ndarray, random: np.random.Generator) -> np.ndarray:
    volume = random.integers(-850, -750, SHAPE).astype(np.int16)
    for finding in np.flatnonzero(findings).tolist():
        x, y, z = finding % 3 * 20 + 4, finding // 3 % 3 * 20 + 4, finding // 9 * 14 + 4
        volume[x : x + 14, y : y + 14, z : z + 9] = 100 + 40 * finding
    return volume


def _table(path: Path, head: object, rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])

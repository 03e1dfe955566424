"""Five scans of odd size with studies and questions about them, and helpers to compare folders."""

import os
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from med3dvlm.records import Question, Study

SIZE = (8, 16, 24)


def studies(count: int = 5) -> list[Study]:
    return [Study(f"case/{n}/Axial", str(n), f"case/{n}/Axial.nii.gz", f"Report {n}.", {}, "train", "test") for n in range(count)]


def questions(count: int = 5) -> list[Question]:
    return [Question(study.id, "plane", "Plane?", ("Axial", "Coronal", "Sagittal", "Oblique"), "Axial") for study in studies(count)]


def write_scans(root: Path) -> Path:
    """Write five scans with different bodies, each of 10 slices of 20 rows and 30 columns, 3 x 1.2 x 1 mm."""
    for number, study in enumerate(studies()):
        array = np.full((30, 20, 10), -1000, np.int16)  # a NIfTI counts columns first
        array[3 : 20 + number, 2:18, 1:9] = np.random.default_rng(number).integers(-100, 400, (17 + number, 16, 8))
        path = root / study.image
        path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.2, 3.0, 1.0])), path)
    return root


def resave(path: Path, change: int = 500) -> None:
    """Brighten one voxel within the body."""
    image = nib.load(path)
    array = np.asarray(image.dataobj).copy()
    array[10, 10, 5] += change
    nib.save(nib.Nifti1Image(array, image.affine), path)


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def times(root: Path, pattern: str = "*") -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob(pattern) if path.is_file()}


def abandon(root: Path) -> None:
    """Make temporary files two hours old."""
    for path in root.rglob("*.part"):
        os.utime(path, (time.time() - 7200,) * 2)

"""`inspect`: its output, its picture, and its settings of a scan."""

import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from tests.cli.scans import Run, sentence, write


def test_inspect_prints_the_geometry_and_draws_a_picture_on_request(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).integers(-900, 1200, (30, 20, 10)).astype(np.int16)
    array[0, 0, 0] = -3024
    path = write(tmp_path / "head.of.patient.nii.gz", array, (0.7, 0.8, 2.5))
    code, output, error = run("inspect", path)
    assert (code, error) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert facts["Scan"] == path.name and str(tmp_path) not in output
    assert facts["Size"].startswith("10 x 20 x 30 voxels")
    assert facts["Spacing"] == "2.5 x 0.8 x 0.7 mm, covering 25 x 16 x 21 mm"
    assert facts["Orientation"].startswith("SPL ") and "axial slices" in facts["Orientation"]
    assert facts["Unit"].startswith("HU") and facts["Values"].startswith("-3024 to 1199")
    assert "padding" in facts["Warning"]
    assert "Picture" not in facts and list(tmp_path.iterdir()) == [path]
    code, output, _ = run("inspect", path, "--out", "picture.png")
    assert output.splitlines()[-1].split() == ["Picture", "picture.png"]
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    other = tmp_path / "another.name.nii.gz"
    path.rename(other)
    run("inspect", other, "--out", "other.png")
    assert (tmp_path / "other.png").read_bytes() == (tmp_path / "picture.png").read_bytes()  # no name is drawn

    np.save(tmp_path / "bare.npy", array)
    code, output, _ = run("inspect", tmp_path / "bare.npy", "--out", tmp_path / "new" / "folder" / "bare.png")
    assert code == 0 and (tmp_path / "new" / "folder" / "bare.png").is_file()
    assert output.count("Warning") == 3 and re.search(r"Spacing +unknown\nOrientation +unknown", output)


def test_inspect_takes_settings_of_the_scan(run: Run, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(24, 1100, (10, 20, 30)).astype(np.int16)
    np.save(tmp_path / "bare.npy", stored)
    code, output, _ = run("inspect", tmp_path / "bare.npy", "--spacing", "2.5,0.8,0.7", "--hu", "csv", "--rescale", "1,-1024")
    facts = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert code == 0 and facts["Spacing"].startswith("2.5 x 0.8 x 0.7 mm") and facts["Values"].startswith("-1000 to 75")
    assert facts["Unit"].startswith("HU") and facts["Note"] == "the stated slope 1 and intercept -1024 are applied, as hu='csv' says."
    code, output, error = run("inspect", tmp_path / "bare.npy", "--hu", "csv")
    assert (code, output) == (2, "") and "hu='csv' needs the slope and intercept" in sentence(error)
    code, output, error = run("inspect", tmp_path / "bare.npy", "--out", tmp_path / "picture.txt")
    assert (code, output) == (2, "") and "picture.txt: the picture is written as PNG" in sentence(error)
    code, output, error = run("inspect", tmp_path / "bare.npy", "--series", 2)
    assert (code, output) == (2, "") and "not DICOM" in sentence(error)


def test_an_array_saved_by_nibabel_is_the_scan_that_it_was(run: Run, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(-900, 1200, (30, 20, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([0.7, -0.8, -2.5, 1])), tmp_path / "scan.nii")
    np.save(tmp_path / "scan.npy", np.asanyarray(nibabel.load(tmp_path / "scan.nii").dataobj))
    expected = run("inspect", tmp_path / "scan.nii", "--out", tmp_path / "nii.png")[1].splitlines()
    options = ("--transpose", "--orientation", "ipr", "--spacing", "2.5,0.8,0.7", "--out", tmp_path / "npy.png")
    code, output, _ = run("inspect", tmp_path / "scan.npy", *options)
    assert code == 0 and output.splitlines()[1:4] == expected[1:4] and "10 x 20 x 30 voxels" in expected[1]
    assert (tmp_path / "npy.png").read_bytes() == (tmp_path / "nii.png").read_bytes()
    code, output, error = run("inspect", tmp_path / "scan.nii", "--transpose")
    assert (code, output) == (2, "") and "transpose is for arrays without an orientation" in sentence(error)
    turned = run("inspect", tmp_path / "scan.nii", "--orientation", "SPL")[1]
    assert "Orientation  SPL" in turned and "the file states orientation IPR; the stated SPL is used" in turned


def test_inspect_straightens_on_request(run: Run, tmp_path: Path) -> None:
    affine = np.array([[-0.7, 0, 0, 0], [0, -0.8, 0.9, 0], [0, 0, 2.4, 0], [0, 0, 0, 1]])
    array = np.random.default_rng(0).integers(-900, 1200, (30, 20, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "tilted.nii")
    tilted = run("inspect", tmp_path / "tilted.nii")[1]
    assert "sheared by 20.6 degrees" in tilted and "turned by 20.6 degrees" in tilted and "10 x 20 x 30 voxels" in tilted
    straight = run("inspect", tmp_path / "tilted.nii", "--straighten")[1]
    assert "10 x 31 x 30 voxels" in straight and "Note         the slices are resampled to a regular grid" in straight
    assert "2.4 x 0.8 x 0.7 mm" in straight and "turned" not in straight and "--straighten" not in straight

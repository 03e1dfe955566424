"""npy and npz: bare arrays, stated spacing, several arrays, pickles."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from med3dvlm.formats import archive, arrays
from med3dvlm.volume import read_volume
from tests.formats.scans import SHAPE, refused, scan


def test_npy_with_and_without_stated_spacing(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", scan())
    silent = read_volume(tmp_path / "scan.npy")
    assert silent.spacing is None and silent.orientation is None
    assert any("spacing is unknown" in warning for warning in silent.warnings)
    stated = read_volume(tmp_path / "scan.npy", spacing=(2.5, 0.8, 0.7), unit="arbitrary")
    assert (stated.spacing, stated.unit) == ((2.5, 0.8, 0.7), "arbitrary")
    assert not any("spacing" in warning for warning in stated.warnings)
    np.save(tmp_path / "m3d.npy", np.random.default_rng(0).random((1, *SHAPE)))
    m3d = read_volume(tmp_path / "m3d.npy")
    assert (m3d.shape, m3d.unit, m3d.array.dtype) == (SHAPE, "unit", np.float32)


def test_npz_and_its_own_spacing(tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", scan())
    bare = read_volume(tmp_path / "bare.npz")
    np.testing.assert_array_equal(bare.array, scan())
    assert bare.spacing is None and bare.orientation is None
    np.savez_compressed(tmp_path / "own.npz", image=scan()[None], spacing=np.array([2.5, 0.8, 0.7]))
    own = read_volume(tmp_path / "own.npz")
    np.testing.assert_array_equal(own.array, scan())
    assert own.spacing == (2.5, 0.8, 0.7) and not any("spacing" in warning for warning in own.warnings)
    stated = read_volume(tmp_path / "own.npz", spacing=(5, 0.8, 0.7))
    assert stated.spacing == (5.0, 0.8, 0.7) and "the stated 5 x 0.8 x 0.7 mm is used" in stated.warnings[0]


def test_npz_that_is_no_single_scan(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", Secret_Name=scan(), mask=scan() > 0, spacing=[1, 1, 1])
    refused(tmp_path / "two.npz", "holds 2 arrays but one scan is needed")  # and not their names
    np.savez(tmp_path / "none.npz", spacing=[1, 1, 1])
    refused(tmp_path / "none.npz", "holds no array")
    np.savez(tmp_path / "spacing.npz", image=scan(), spacing=[1, 1])
    refused(tmp_path / "spacing.npz", "'spacing' must be three positive numbers")
    np.savez(tmp_path / "negative.npz", image=scan(), spacing=[1, -1, 1])
    refused(tmp_path / "negative.npz", "three positive numbers")


def test_npz_of_too_many_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "many.npz", "w") as file:
        for number in range(20_001):
            file.writestr(f"{number}.npy", b"")
    refused(tmp_path / "many.npz", "more than 20000 entries")
    monkeypatch.setattr(archive, "MAX_LISTING", 50 * 20_000)  # their list is not even read
    monkeypatch.setattr(arrays, "MAX_ENTRIES", 30_000)
    refused(tmp_path / "many.npz", "more than 20000 entries")


def test_pickles_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused(tmp_path / "objects.npy", "cannot be read as a NumPy array: it holds Python objects, which are not loaded")
    np.savez(tmp_path / "objects.npz", np.array([{"a": 1}], dtype=object))
    refused(tmp_path / "objects.npz", r"cannot be read as NumPy arrays \(.npz\): it holds Python objects")


def test_headers_that_announce_more_than_there_is(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", scan())
    content = (tmp_path / "scan.npy").read_bytes()
    (tmp_path / "open.npy").write_bytes(content.replace(b"}", b"(", 1))
    refused(tmp_path / "open.npy", "cannot be read as a NumPy array")
    huge = content.replace(b"(10, 20, 30), }" + b" " * 10, b"(90000, 90000, 900000), }", 1)
    assert len(huge) == len(content) and huge != content
    (tmp_path / "huge.npy").write_bytes(huge)
    refused(tmp_path / "huge.npy", "cannot be read as a NumPy array")
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as file:
        file.writestr("image.npy", huge)
    refused(tmp_path / "huge.npz", "cannot be read as NumPy arrays")


def test_series_is_for_dicom_only(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", scan())
    refused(tmp_path / "scan.npy", "not DICOM, so there are no series to pick from", series=2)


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_an_empty_array_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"none{ending}"
    (np.save if ending == ".npy" else np.savez)(path, np.zeros((0, *SHAPE[1:])))
    refused(path, "2D image")

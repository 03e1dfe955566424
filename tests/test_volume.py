"""read_volume: common behaviour of all formats, folders, and one sentence for each wrong input."""

import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.dataset import Dataset

from med3dvlm.volume import READERS, Volume, VolumeError, read_volume
from tests.formats.dicom_files import write_enhanced, write_series
from tests.formats.scans import SHAPE, refused, scan, write_nifti


def test_stated_spacing_replaces_the_files_with_a_warning(tmp_path: Path) -> None:
    volume = read_volume(write_nifti(tmp_path / "scan.nii", scan()), spacing=(5, 0.8, 0.7))
    assert volume.spacing == (5.0, 0.8, 0.7)
    assert any("2.5 x 0.8 x 0.7 mm; the stated 5 x 0.8 x 0.7 mm" in warning for warning in volume.warnings)


@pytest.mark.parametrize(
    ("factor", "unit", "words"),
    [
        (0.001, "unknown", "no scan has a spacing of 0.0025 x 0.0008 x 0.0007 mm"),
        (1, "meter", "no scan has a spacing of 2500 x 800 x 700 mm"),
        (1, "micron", "no scan has a spacing of 0.0025 x 0.0008 x 0.0007 mm"),
        (1000, "unknown", "no scan has a spacing of 2500 x 800 x 700 mm"),
        (1000, "micron", ""),
        (0.001, "meter", ""),
        (0.1, "mm", ""),  # a dental scan
        (10, "mm", ""),
    ],
)
def test_an_implausible_spacing_gives_a_warning(tmp_path: Path, factor: float, unit: str, words: str) -> None:
    image = nibabel.Nifti1Image(scan().transpose(), np.diag([0.7 * factor, 0.8 * factor, 2.5 * factor, 1]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "scan.nii")
    told = [warning for warning in read_volume(tmp_path / "scan.nii").warnings if "unit of length" in warning]
    assert words in " ".join(told) and bool(told) == bool(words)
    assert not any("unit of length" in text for text in read_volume(tmp_path / "scan.nii", spacing=(2.5, 0.8, 0.7)).warnings)


# DICOM, whose readers have tests of their own


def test_a_dicom_series_is_hu_by_its_header(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path / "series", scan()))
    np.testing.assert_array_equal(volume.array, scan())
    assert (volume.array.dtype, volume.orientation, volume.plane, volume.unit) == (np.int16, "SPL", "axial", "HU")
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7)) and volume.warnings == ()
    assert volume.notes == ("the header's slope 1 and intercept -1024 are applied.", "the unit is HU, as the header says.")
    assert "secret" not in repr(volume).lower()


def test_dicom_of_1_mm_gives_no_warning_and_is_straightened(tmp_path: Path) -> None:
    """A spacing of 1 mm is no placeholder in DICOM. Slabs have 2 and 3 mm and lean backwards by 0.5 mm for each mm."""
    one = read_volume(write_series(tmp_path / "one", scan(), np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert one.spacing == (1, 1, 1) and one.warnings == ()
    heights = np.cumsum([0, *[2.0] * 4, *[3.0] * 5])

    def move(item: Dataset, place: int) -> None:
        item.ImagePositionPatient = [0.0, 0.5 * heights[place], heights[place]]

    folder = write_series(tmp_path / "tilted", scan(), np.diag([-1.0, -1.0, 2.0, 1.0]), edit=move)
    volume = read_volume(folder)
    assert sum("--straighten" in warning for warning in volume.warnings) == 2
    assert any("sheared by 26.6 degrees" in warning for warning in volume.warnings)
    assert any("slice distances vary from 2.00 to 3.00 mm" in warning for warning in volume.warnings)
    straight = read_volume(folder, straighten=True)
    assert straight.spacing == (2, 1, 1) and straight.shape[0] * 2 == pytest.approx(heights[-1] + 2, abs=1)
    assert straight.warnings == () and straight.modality == "CT" and straight.unit == "HU"
    rows = [np.argwhere(each.array > -480).max(axis=0)[1] for each in (volume, straight)]
    assert rows[1] - rows[0] == pytest.approx(0.5 * heights[7], abs=1)


def test_dicom_policies(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", scan())
    for wish in ({"hu": "header"}, {"rescale": (1, -1024)}):
        np.testing.assert_array_equal(read_volume(folder, **wish).array, scan())
    refused(folder, "would rescale twice", hu="csv", rescale=(1, -1024))
    refused(folder, "as HU the values cannot be right", hu="already_hu")
    raw = read_volume(write_series(tmp_path / "raw", scan() + 1024, rescale=(1, 0)))
    assert raw.unit == "arbitrary" and any("look un-rescaled" in warning for warning in raw.warnings)
    mr = write_series(tmp_path / "mr", scan(), edit=lambda item, _: setattr(item, "Modality", "MR"))
    assert read_volume(mr).unit == "arbitrary" and read_volume(mr).notes[-1] == "the unit is arbitrary: the header says MR."


def test_several_series_are_listed_and_one_is_picked(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", scan())
    write_series(folder, scan()[:4], prefix="other")
    listed = "2 series (1: 10 slices of 20 x 30, CT; 2: 4 slices of 20 x 30, CT); number {} is read"
    for series, depth in ((None, 10), (1, 10), (2, 4)):
        volume = read_volume(folder, series=series)
        assert len(volume.array) == depth
        assert any(listed.format(series or 1) in warning for warning in volume.warnings)


def test_a_file_without_an_ending_is_recognised_by_its_content(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_volume(write_enhanced(tmp_path / "IM0001", scan())).array, scan())
    refused(write_nifti(tmp_path / "scan.nii", scan()).rename(tmp_path / "IM0002"), "'' is not a known scan format")


# Folders


def test_a_folder_is_recognised_by_its_content(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", scan())
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(folder / "preview1.png")
    np.testing.assert_array_equal(read_volume(folder).array, scan())
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"DICOM/{path.name}")
    np.testing.assert_array_equal(read_volume(tmp_path / "series.zip").array, scan())
    write_series(tmp_path / "study" / "series", scan())
    for number in (1, 2):
        Image.fromarray(np.full((20, 30), 9 * number, np.uint8)).save(tmp_path / "study" / f"preview{number}.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "study").array, scan())
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", "no DICOM images")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "report.txt").write_text("findings")
    refused(tmp_path / "text", "no DICOM images")


# Wrong input: one sentence each


def test_missing_empty_and_unknown(tmp_path: Path) -> None:
    refused(tmp_path / "none.nii.gz", "no such file or folder")
    for ending in READERS:
        (tmp_path / f"empty{ending}").touch()
        refused(tmp_path / f"empty{ending}", r"empty \(0 bytes\)")
    (tmp_path / "scan.docx").write_bytes(b"PK")
    refused(tmp_path / "scan.docx", r"'\.docx' is not a known scan format; use \.nii, \.nii\.gz, .*folder")


@pytest.mark.parametrize("ending", list(READERS))
def test_text_under_a_scans_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"scan{ending}"
    path.write_text("These are the findings of the report.\n" * 40)
    refused(path, "cannot be read as .* copy or export it again|not a DICOM image")


@pytest.mark.parametrize("ending", list(READERS))
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_file(tmp_path: Path, ending: str, share: float) -> None:
    path = tmp_path / f"scan{ending}"
    noisy = (scan() + np.random.default_rng(0).integers(0, 50, SHAPE)).astype(np.int16)
    if ending in (".npy", ".npz"):
        (np.save if ending == ".npy" else np.savez)(path, noisy)
    elif ending in (".dcm", ".zip"):
        write_enhanced(tmp_path / "frames.dcm", noisy)
        if ending == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(tmp_path / "frames.dcm", "frames.dcm")
        else:
            (tmp_path / "frames.dcm").rename(path)
    elif ending == ".mhd":
        sitk.WriteImage(sitk.GetImageFromArray(noisy), path)
        path = path.with_suffix(".raw")
    elif ending.startswith(".nii"):
        write_nifti(path, noisy)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(noisy), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(tmp_path / f"scan{ending}", "cannot be read as|damaged|not a DICOM image")


def test_2d_and_4d(tmp_path: Path) -> None:
    affine = np.diag([0.7, 0.8, 2.5, 1.0])
    nibabel.save(nibabel.Nifti1Image(scan()[0], affine), tmp_path / "flat.nii")
    refused(tmp_path / "flat.nii", r"2D image \(30x20\)")
    refused(write_nifti(tmp_path / "one.nii", scan()[:1]), r"2D image \(1x20x30\)")
    nibabel.save(nibabel.Nifti1Image(np.stack([scan(), scan()]).transpose(), affine), tmp_path / "time.nii")
    refused(tmp_path / "time.nii", r"4D \(2x10x20x30\) but one 3D scan is needed")
    sitk.WriteImage(sitk.GetImageFromArray(scan()[3]), tmp_path / "flat.mha")
    refused(tmp_path / "flat.mha", "2D image")
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([scan(), scan()]), isVector=False), tmp_path / "time.nrrd")
    refused(tmp_path / "time.nrrd", "4D")
    np.save(tmp_path / "time.npy", np.stack([scan(), scan()]))
    refused(tmp_path / "time.npy", "4D")
    refused(write_series(tmp_path / "one", scan()[:1]), "2D image")


def test_an_array_that_seems_to_count_x_y_z(tmp_path: Path) -> None:
    slices = np.arange(8 * 20 * 20, dtype=np.int16).reshape(8, 20, 20)  # z, y, x
    for name, array in (("zyx", slices), ("xyz", slices.T), ("cube", np.arange(20**3, dtype=np.int16).reshape(20, 20, 20))):
        np.save(tmp_path / f"{name}.npy", array)
    seeming = {name: "(--transpose)" in " ".join(read_volume(tmp_path / f"{name}.npy").warnings) for name in ("zyx", "xyz", "cube")}
    assert seeming == {"zyx": False, "xyz": True, "cube": False}
    transposed = read_volume(tmp_path / "xyz.npy", transpose=True)
    assert np.array_equal(transposed.array, slices) and "(--transpose)" not in " ".join(transposed.warnings)
    nibabel.save(nibabel.Nifti1Image(slices, np.diag([0.7, 0.8, 2.5, 1])), tmp_path / "sagittal.nii")  # its file says what its axes are
    assert "(--transpose)" not in " ".join(read_volume(tmp_path / "sagittal.nii").warnings)


def test_bad_values(tmp_path: Path) -> None:
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        bad = scan(np.float32)
        bad[0, 0, :3] = value
        refused(write_nifti(tmp_path / f"{name}.nii.gz", bad), "3 of 6000 voxels are NaN or infinite")
    huge = scan(np.float64)
    huge[0, 0, 0] = 1e300
    refused(write_nifti(tmp_path / "huge.nii.gz", huge), "1 of 6000 voxels are NaN or infinite")
    refused(write_nifti(tmp_path / "flat.nii.gz", np.full(SHAPE, 7, np.int16)), "every voxel is 7")
    np.save(tmp_path / "complex.npy", scan().astype(np.complex64))
    refused(tmp_path / "complex.npy", "complex64 but real numbers")
    np.save(tmp_path / "none.npy", np.zeros((0, 20, 30)))
    refused(tmp_path / "none.npy", "2D image")


def test_a_scan_too_large_for_memory_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("med3dvlm.formats.arrays._without_channel", lambda array: np.empty(1 << 50))
    np.save(tmp_path / "scan.npy", scan())
    refused(tmp_path / "scan.npy", "too little memory for this scan")


def test_colour_images(tmp_path: Path) -> None:
    rgb = np.zeros((30, 20, 10), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), tmp_path / "colour.nii.gz")
    refused(tmp_path / "colour.nii.gz", "colour image")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((*SHAPE, 3), np.uint8), isVector=True), tmp_path / "colour.mha")
    refused(tmp_path / "colour.mha", "colour image")


def test_stated_geometry_and_unit_are_checked(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "scan.nii", scan())
    refused(path, "three positive numbers", spacing=(1.0, 0.0, 1.0))
    refused(path, "three positive numbers", spacing=(1.0, 1.0))
    refused(path, "unit is 'hounsfield' but must be one of HU, unit, arbitrary", unit="hounsfield")
    refused(path, "within 0..1 but these are -1000 to 900", unit="unit")


def test_a_volume_made_by_hand_is_checked_too() -> None:
    assert Volume(scan(), orientation="PIL").plane == "coronal"
    with pytest.raises(VolumeError, match="int16 or float32"):
        Volume(scan(np.float64))  # type: ignore[arg-type]
    for letters in ("SPX", "SIL", "SP", "SPLA"):
        with pytest.raises(VolumeError, match="one letter each"):
            Volume(scan(), orientation=letters)

"""NIfTI: axes, spacing, orientation, slope and intercept, and damaged files."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from med3dvlm.formats.base import check_size
from med3dvlm.volume import VolumeError, read_volume
from tests.formats.scans import SHAPE, refused, scan, write_nifti


def test_nifti_axes_spacing_orientation_and_values(tmp_path: Path) -> None:
    volume = read_volume(write_nifti(tmp_path / "scan.nii.gz", scan()))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, scan())
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    assert (volume.shape, volume.orientation, volume.plane, volume.unit) == (SHAPE, "SAR", "axial", "HU")
    np.testing.assert_allclose(volume.direction, np.eye(3)[:, ::-1])
    assert volume.oblique == pytest.approx(0.0)
    assert volume.source == str(tmp_path / "scan.nii.gz")
    assert volume.warnings == ()


@pytest.mark.parametrize("letters", ["SAR", "IPL", "SRA", "PIL", "ARS", "LIP", "RSA"])
def test_orientation_letters_agree_with_nibabel(tmp_path: Path, letters: str) -> None:
    towards = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    affine = np.eye(4)
    affine[:3, :3] = 1.5 * np.array([towards[letter] for letter in reversed(letters)]).T  # NIfTI's axes are W, H, D
    assert "".join(reversed(nibabel.aff2axcodes(affine))) == letters
    volume = read_volume(write_nifti(tmp_path / "scan.nii", scan(), affine))
    assert volume.orientation == letters
    assert volume.plane == {"S": "axial", "I": "axial", "P": "coronal", "A": "coronal"}.get(letters[0], "sagittal")
    # the direction matrix predicts where a step along D leads in the patient
    step = affine @ [0, 0, 1, 0]
    np.testing.assert_allclose(volume.direction[:, 0], step[:3] / 1.5)


def test_oblique_scan_reports_its_angle(tmp_path: Path) -> None:
    angle = np.deg2rad(25)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.7, 0.8, 2.5])
    volume = read_volume(write_nifti(tmp_path / "scan.nii", scan(), affine))
    assert volume.oblique == pytest.approx(25, abs=0.01)
    assert (volume.plane, volume.orientation) == ("axial", "SAR")
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    assert any("tilted by 25 degrees" in warning for warning in volume.warnings)


def test_nifti_slope_and_intercept_are_applied_once(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image((scan() + 1024).astype(np.int16).transpose(), np.diag([0.7, 0.8, 2.5, 1]))
    image.header.set_slope_inter(1, -1024)
    nibabel.save(image, tmp_path / "whole.nii.gz")
    image.header.set_slope_inter(0.5, -1024)
    nibabel.save(image, tmp_path / "half.nii.gz")

    stored = nibabel.load(tmp_path / "whole.nii.gz").get_fdata().transpose()
    whole, half = read_volume(tmp_path / "whole.nii.gz"), read_volume(tmp_path / "half.nii.gz")
    np.testing.assert_array_equal(whole.array, stored)
    assert whole.array.dtype == np.int16
    np.testing.assert_allclose(half.array, nibabel.load(tmp_path / "half.nii.gz").get_fdata().transpose(), atol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64])
def test_whole_numbers_become_int16_whatever_the_file_stores(tmp_path: Path, dtype: type) -> None:
    values = np.arange(6000).reshape(SHAPE) % 251
    volume = read_volume(write_nifti(tmp_path / "scan.nii.gz", values.astype(dtype)))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, values)


def test_other_numbers_become_float32(tmp_path: Path) -> None:
    large = read_volume(write_nifti(tmp_path / "large.nii.gz", np.arange(6000, dtype=np.int32).reshape(SHAPE) * 10))
    assert large.array.dtype == np.float32 and large.array.max() == 59990
    half = read_volume(write_nifti(tmp_path / "half.nii.gz", scan(np.float32) + 0.5))
    assert half.array.dtype == np.float32 and half.unit == "HU"


def test_nifti2_big_endian_one_time_point_and_metres(tmp_path: Path) -> None:
    affine = np.diag([0.0007, 0.0008, 0.0025, 1.0])
    image = nibabel.Nifti2Image(scan().astype(">i2").transpose()[..., None], affine)
    image = nibabel.Nifti2Image(image.get_fdata().astype(">i2"), affine, image.header.as_byteswapped(">"))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(volume.array, scan())
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))


def test_nifti_without_geometry_gives_a_warning(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(scan().transpose(), None)
    image.header.set_zooms((0.7, 0.8, 2.5))
    nibabel.save(image, tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert (volume.orientation, volume.direction, volume.plane, volume.oblique) == (None, None, None, None)
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    assert any("no qform and no sform" in warning for warning in volume.warnings)
    assert any("orientation is unknown" in warning for warning in volume.warnings)


def test_contradicting_qform_and_default_geometry_are_reported(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(scan().transpose(), np.diag([0.7, 0.8, 2.5, 1]))
    image.set_qform(np.diag([-0.7, 0.8, 2.5, 1]), code=1)
    image.set_sform(np.diag([0.7, 0.8, 2.5, 1]), code=1)
    nibabel.save(image, tmp_path / "conflict.nii")
    volume = read_volume(tmp_path / "conflict.nii")
    assert volume.orientation == "SAR" and "contradict" in volume.warnings[0]
    default = read_volume(write_nifti(tmp_path / "default.nii", scan(), np.eye(4)))
    assert "1 mm identity" in default.warnings[0]


@pytest.mark.parametrize(("factor", "warned"), [(1.005, False), (1.02, True)])
def test_voxel_sizes_that_disagree(tmp_path: Path, factor: float, warned: bool) -> None:
    image = nibabel.Nifti1Image(scan().transpose(), None)
    image.header.set_zooms((0.7, 0.8, 2.5))
    image.header.set_sform(np.diag([0.7, 0.8, 2.5 * factor, 1]), code=1)
    nibabel.save(image, tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert volume.spacing == pytest.approx((2.5 * factor, 0.8, 0.7))
    assert any("spacing 2.5 x 0.8 x 0.7 mm (pixdim) and 2.55 x 0.8 x 0.7 mm (sform)" in text for text in volume.warnings) is warned


def test_complex_values_are_refused_unread(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(scan().transpose().astype(np.complex64), np.eye(4)), tmp_path / "complex.nii.gz")
    refused(tmp_path / "complex.nii.gz", "complex numbers but real ones are needed")


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_a_long_extension_is_skipped(tmp_path: Path, name: str) -> None:
    """Some programs store whole DICOM headers there: 3 MB before the voxels."""
    image = nibabel.Nifti1Image(scan().transpose(), np.diag([0.7, 0.8, 2.5, 1]))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", np.random.default_rng(0).bytes(3 * 2**20)))
    nibabel.save(image, tmp_path / name)
    volume = read_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.array, scan())
    assert volume.warnings == ()


def edited(path: Path, **fields: object) -> Path:
    """Write a NIfTI file with changed values in its header, unchecked."""
    content = bytearray(path.read_bytes())
    header = np.frombuffer(content, nibabel.Nifti1Header.template_dtype, 1)[0]  # shares the memory
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(content)
    return path


def turned(tmp_path: Path) -> Path:
    """Return a scan with equal sform and qform, turned by 10 degrees and mirrored (qfac -1)."""
    sine, cosine = np.sin(np.radians(10)), np.cos(np.radians(10))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) @ np.diag([-0.7, 0.8, 2.5])
    image = nibabel.Nifti1Image(scan().transpose(), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    nibabel.save(image, tmp_path / "scan.nii")
    return tmp_path / "scan.nii"


ROWS = ("srow_x", "srow_y", "srow_z")


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1.0])
def test_an_invalid_sform_is_replaced_by_the_qform(tmp_path: Path, value: float) -> None:
    whole = read_volume(turned(tmp_path))
    assert whole.warnings == ()
    volume = read_volume(edited(tmp_path / "scan.nii", **dict.fromkeys(ROWS, value)))
    np.testing.assert_allclose(volume.direction, whole.direction, atol=1e-6)
    np.testing.assert_allclose(volume.direction * volume.spacing, (nibabel.load(tmp_path / "scan.nii").get_qform()[:3, 2::-1]), atol=1e-5)
    assert volume.orientation == "SAL" and volume.warnings == ("the sform is singular or not finite and is ignored.",)


def test_a_sform_without_voxel_sizes_is_replaced_by_the_qform(tmp_path: Path) -> None:
    rows = dict(zip(ROWS, np.hstack([np.diag([-1, 1, 1]), np.zeros((3, 1))]), strict=True))
    volume = read_volume(edited(turned(tmp_path), **rows))
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    assert volume.warnings == ("the sform states 1 mm voxels beside a qform of 2.5 x 0.8 x 0.7 mm; the qform is used.",)


@pytest.mark.parametrize("quaternion", [3.0, np.nan])
def test_an_invalid_qform_is_replaced_by_the_sform_or_the_spacing(tmp_path: Path, quaternion: float) -> None:
    whole = read_volume(turned(tmp_path))
    volume = read_volume(edited(tmp_path / "scan.nii", quatern_b=quaternion))
    np.testing.assert_array_equal(volume.direction, whole.direction)
    assert volume.warnings == ("the qform's quaternion or voxel sizes are not valid, so it is ignored.",)
    neither = read_volume(edited(tmp_path / "scan.nii", **dict.fromkeys(ROWS, np.nan)))
    assert neither.orientation is None and neither.spacing == pytest.approx((2.5, 0.8, 0.7)) and len(neither.warnings) == 3
    nothing = read_volume(edited(tmp_path / "scan.nii", pixdim=[1, 0.7, np.nan, 2.5, 0, 0, 0, 0]))
    assert nothing.spacing is None and any("spacing 2.5 x nan x 0.7 mm, which is not a length" in text for text in nothing.warnings)


@pytest.mark.parametrize("qfac", [0.0, 1.0, -1.0])
def test_a_qfac_of_zero_counts_as_one(tmp_path: Path, qfac: float) -> None:
    edited(turned(tmp_path), sform_code=0, pixdim=[qfac, 0.7, 0.8, 2.5, 0, 0, 0, 0])
    image = sitk.ReadImage(tmp_path / "scan.nii")  # which follows the standard here
    theirs = np.diag([-1, -1, 1]) @ np.reshape(image.GetDirection(), (3, 3))[:, ::-1]
    np.testing.assert_allclose(read_volume(tmp_path / "scan.nii").direction, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("slope", "intercept", "expected", "words"),
    [
        (np.nan, np.nan, (1, 0), ""),
        (0, 0, (1, 0), ""),
        (0, -1024, (1, 0), "slope is 0, which means no scaling; its intercept -1024 is not applied"),
        (np.inf, 0, (1, 0), "slope is infinite"),
        (2, np.nan, (2, 0), "intercept is nan; 0 is used instead"),
        (2, np.inf, (2, 0), "intercept is inf; 0 is used instead"),
        (1, -24, (1, -24), ""),
    ],
)
def test_invalid_slopes_and_intercepts(tmp_path: Path, slope: float, intercept: float, expected: tuple[float, float], words: str) -> None:
    values = np.arange(6000, dtype=np.int16).reshape(SHAPE)
    path = edited(write_nifti(tmp_path / "scan.nii", values), scl_slope=slope, scl_inter=intercept)
    volume = read_volume(path, unit="arbitrary")
    np.testing.assert_array_equal(volume.array, expected[0] * values + expected[1])
    told = [text for text in volume.warnings if "slope" in text or "intercept" in text]
    assert words in " ".join(told) and bool(told) == bool(words)


def test_bytes_after_the_voxels_are_ignored_with_a_warning(tmp_path: Path) -> None:
    content = write_nifti(tmp_path / "scan.nii", scan()).read_bytes()
    packed = gzip.compress(content)
    for name, written, number in (
        ("plain.nii", content + bytes(1000), 1000),
        ("inside.nii.gz", gzip.compress(content + b"x" * 2**22), 2**22),
        ("behind.nii.gz", packed + b"signature", 9),
        ("members.nii.gz", gzip.compress(content[:700]) + gzip.compress(content[700:]), 0),
        ("padded.nii.gz", packed + bytes(512), 0),
    ):
        (tmp_path / name).write_bytes(written)
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.array, scan())
        assert volume.warnings == ((f"{number} bytes follow the voxels in the file and are ignored.",) if number else ())
    (tmp_path / "short.nii.gz").write_bytes(gzip.compress(content[:-1]) + b"behind")
    refused(tmp_path / "short.nii.gz", "cannot be read as NIfTI; it is damaged, cut short")


def test_one_of_two_files_is_refused(tmp_path: Path) -> None:
    edited(write_nifti(tmp_path / "scan.nii", scan()), magic=b"ni1")
    refused(tmp_path / "scan.nii", "one of the two files of a .hdr and .img pair; save the scan as one .nii")


def test_bytes_are_bounded_as_well_as_voxels() -> None:
    check_size((1024, 1024, 1024), 8, 2**30, "scan", "NIfTI")
    with pytest.raises(VolumeError, match="2147483648 voxels or 8 GiB"):
        check_size((1024, 1024, 1025), 8, 2**30, "scan", "NIfTI")


def test_damaged_bytes_in_a_compressed_file_are_noticed(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "scan.nii.gz", np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8] = b"\0" * 8
    path.write_bytes(content)
    refused(path, "cannot be read as NIfTI")


def test_nifti_header_of_nonsense(tmp_path: Path) -> None:
    content = bytearray(gzip.decompress(write_nifti(tmp_path / "scan.nii.gz", scan()).read_bytes()))
    content[70:72] = b"\xff\x7f"  # no such data type
    (tmp_path / "scan.nii").write_bytes(content)
    refused(tmp_path / "scan.nii", "cannot be read as NIfTI")


def test_an_unknown_unit_of_length_counts_as_millimetres(tmp_path: Path) -> None:
    content = bytearray(write_nifti(tmp_path / "scan.nii", scan()).read_bytes())
    content[123] = 7  # no such unit; nibabel knows no way on
    (tmp_path / "unit.nii").write_bytes(content)
    assert read_volume(tmp_path / "unit.nii").spacing == pytest.approx((2.5, 0.8, 0.7))


def test_a_compressed_file_that_grows_beyond_its_header_is_not_unpacked(tmp_path: Path) -> None:
    content = write_nifti(tmp_path / "scan.nii", scan()).read_bytes()
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(content + b"\0" * 2**25))
    refused(tmp_path / "bomb.nii.gz", "cannot be read as NIfTI: the file is far longer than its header states")


def test_a_header_that_announces_more_than_the_file_can_hold(tmp_path: Path) -> None:
    content = bytearray(write_nifti(tmp_path / "scan.nii", scan()).read_bytes())
    content[42:48] = np.array([32767] * 3, "<i2").tobytes()
    for name, packed in (("huge.nii", bytes(content)), ("huge.nii.gz", gzip.compress(bytes(content)))):
        (tmp_path / name).write_bytes(packed)
        refused(tmp_path / name, "cannot be read as NIfTI")

"""DICOM: one scan in every form of file, against the array and the affine that were written."""

from pathlib import Path

import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from med3dvlm.volume import VolumeError, read_volume
from tests.formats.dicom_files import (
    AFFINE,
    LOSSLESS,
    PYDICOM_FILES,
    SAGITTAL,
    read,
    same_as_nifti,
    scan,
    turned,
    write_enhanced,
    write_plain_multiframe,
    write_series,
)

# One scan in many shapes


@pytest.mark.parametrize(
    "affine", [AFFINE, turned(20), SAGITTAL, AFFINE @ np.diag([1, 1, -1, 1])], ids=["axial", "oblique", "sagittal", "downwards"]
)
def test_slices_are_ordered_by_position_and_rescaled_once(tmp_path: Path, affine: np.ndarray) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), affine))
    same_as_nifti(parts, scan(), affine, tmp_path)
    assert (parts.array.dtype, parts.modality, parts.rescale, parts.hu) == (np.int16, "CT", (1, -1024), True)
    assert (parts.warnings, parts.series) == ((), ("1: 10 slices of 20 x 30, CT",))


def test_slices_are_ordered_along_the_normal_whatever_the_order_of_acquisition(tmp_path: Path) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), AFFINE @ np.diag([1, 1, -1, 1])))
    row, column = parts.axes[:, 0] * (-1, -1, 1), parts.axes[:, 1] * (-1, -1, 1)  # LPS
    assert np.dot(np.cross(row, column), parts.axes[:, 2] * (-1, -1, 1)) > 0
    np.testing.assert_array_equal(parts.array, scan()[::-1])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_every_lossless_transfer_syntax(tmp_path: Path, syntax: uid.UID, signed: bool) -> None:
    values = (np.random.default_rng(0).integers(-90, 90, (3, 70, 50)).cumsum(axis=2) % 2900 - 1000).astype(np.int16)
    rescale = (1, 0) if signed else (1, -1024)
    parts = read(write_series(tmp_path / "scan", values, rescale=rescale, signed=signed, syntax=syntax))
    same_as_nifti(parts, values, AFFINE, tmp_path)
    assert parts.rescale == (None if signed else rescale)


@pytest.mark.parametrize(("syntax", "bits"), [(uid.JPEGBaseline8Bit, 8), (uid.JPEGExtended12Bit, 12)], ids=["8 bits", "12 bits"])
def test_lossy_jpeg_is_close(tmp_path: Path, syntax: uid.UID, bits: int) -> None:
    ramp = np.add.outer(np.add.outer(np.arange(3), np.arange(40)), np.arange(60)) * (2 if bits == 8 else 38)

    def narrow(item: Dataset, index: int) -> None:
        item.BitsStored, item.HighBit = bits, bits - 1
        if bits == 8:
            item.BitsAllocated, item.PixelData = 8, ramp[index].astype(np.uint8).tobytes()

    parts = read(write_series(tmp_path / "scan", ramp, rescale=(1, 0), syntax=syntax, edit=narrow))
    assert 0 < ramp.max() < 2**bits and np.abs(parts.array - ramp).max() <= (2 if bits == 8 else 20)


def test_signed_values_of_twelve_bits(tmp_path: Path) -> None:
    """Bits 12 to 15 are unused; a scanner may store an overlay there."""

    def dirty(item: Dataset, index: int) -> None:
        item.BitsStored, item.HighBit = 12, 11
        bits = np.frombuffer(item.PixelData, "<u2") & 0x0FFF
        item.PixelData = (bits | 0x5000).tobytes()

    np.testing.assert_array_equal(read(write_series(tmp_path / "scan", scan(), rescale=(1, 0), signed=True, edit=dirty)).array, scan())


def test_signed_values_of_twelve_bits_in_jpeg_ls(tmp_path: Path) -> None:
    """JPEG-LS stores unsigned numbers, so -1000 is stored as 3096."""
    folder = write_series(tmp_path / "scan", scan(), rescale=(1, 0), signed=True, syntax=uid.JPEGLSLossless)
    for path in folder.iterdir():
        item = pydicom.dcmread(path)
        item.BitsStored, item.HighBit = 12, 11
        item.PixelData = encapsulate([imagecodecs.jpegls_encode((item.pixel_array & 0x0FFF).astype(np.uint16))])
        item.save_as(path)
    np.testing.assert_array_equal(read(folder).array, scan())


def test_nested_folders_and_files_that_are_no_images(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", scan(), names="nested")
    (folder / "README.txt").write_text("Viewer for Windows")
    (folder / "empty").touch()
    for name in ("test-SR.dcm", "rtplan.dcm", "dicomdirtests/DICOMDIR"):
        (folder / Path(name).name).write_bytes((PYDICOM_FILES / name).read_bytes())
    (folder / "loop").symlink_to(folder)
    parts = read(folder)
    same_as_nifti(parts, scan(), AFFINE, tmp_path)
    assert parts.warnings == ()


def test_files_without_preamble_and_transfer_syntax(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", scan())
    for path in folder.iterdir():
        item = pydicom.dcmread(path)
        item.preamble = None
        item.file_meta = pydicom.dataset.FileMetaDataset()
        pydicom.dcmwrite(path, item, implicit_vr=True, little_endian=True, force_encoding=True)
        assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(read(folder).array, scan())


def test_copies_of_a_file_count_once(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", scan())
    for path in [*folder.iterdir()][:3]:
        path.with_name(f"{path.stem} (1)").write_bytes(path.read_bytes())
    parts = read(folder)
    np.testing.assert_array_equal(parts.array, scan())
    assert parts.warnings == ("3 files are exact copies of others and are left out.",)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.JPEGLosslessSV1, uid.RLELossless], ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize("rescale", [((1, -1024),), ((1, -1024), (2, -1500), (0.5, -1000))], ids=["shared", "per frame"])
def test_one_enhanced_file(tmp_path: Path, syntax: uid.UID, rescale: tuple[tuple[float, float], ...]) -> None:
    values, affine = 2 * (scan() // 2), turned(10)
    order = np.random.default_rng(1).permutation(len(values)).tolist()
    parts = read(write_enhanced(tmp_path / "scan.dcm", values, affine, order=order, rescale=rescale, syntax=syntax))
    same_as_nifti(parts, values, affine, tmp_path)
    assert (parts.hu, parts.warnings, parts.series) == (True, (), ("1: 10 slices of 20 x 30, CT",))


def test_one_plain_multiframe_file_knows_no_geometry(tmp_path: Path) -> None:
    stored = scan().astype(np.int32) + 1024
    parts = read(write_plain_multiframe(tmp_path / "scan.dcm", stored))
    np.testing.assert_array_equal(parts.array, stored)
    assert (parts.axes, parts.spacing, parts.rescale, parts.hu, parts.modality) == (None, None, None, False, "OT")
    assert any("no slice positions; the order of the slices is that of their instance and frame numbers" in text for text in parts.warnings)
    assert any("no PixelSpacing" in text for text in parts.warnings)


# Values


def test_slopes_that_differ_slice_by_slice(tmp_path: Path) -> None:
    values, rescales = 4 * (scan() // 4), [((1, 2, 4, 0.5)[index % 4], -1000.0 - 4 * index) for index in range(10)]
    parts = read(write_series(tmp_path / "whole", values, rescale=rescales))
    np.testing.assert_array_equal(parts.array, values)
    assert any("slope and intercept of each slice are applied" in note for note in read_volume(tmp_path / "whole").notes)
    with pytest.raises(VolumeError, match="differ from slice to slice"):
        read_volume(tmp_path / "whole", hu="already_hu")
    rescales = [(0.25, -1000.5 - index) for index in range(10)]
    parts = read(write_series(tmp_path / "fraction", scan() + 0.5, rescale=rescales))
    assert parts.array.dtype == np.float32
    np.testing.assert_array_equal(parts.array, scan() + np.float32(0.5))


def test_values_beyond_int16_become_float32(tmp_path: Path) -> None:
    values = scan().astype(np.int64) * 10
    assert read(write_series(tmp_path / "small", values, rescale=(1, -10000))).array.dtype == np.int16
    parts = read(write_series(tmp_path / "large", values + 30000, rescale=(1, 0)))
    assert parts.array.dtype == np.float32
    np.testing.assert_array_equal(parts.array, values + 30000)


def test_monochrome1_does_not_change_values(tmp_path: Path) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), edit=lambda item, _: setattr(item, "PhotometricInterpretation", "MONOCHROME1")))
    np.testing.assert_array_equal(parts.array, scan())
    assert len(parts.warnings) == 1 and "MONOCHROME1" in parts.warnings[0] and parts.hu


@pytest.mark.parametrize(("signed", "stored", "stated"), [(True, -3000, -3000), (True, -3000, 62536), (False, 63536, 63536)])
def test_padding_beyond_the_image_becomes_its_lowest_value(tmp_path: Path, signed: bool, stored: int, stated: int) -> None:
    corner = np.zeros((20, 30), bool)
    corner[:4, :3] = True

    def pad(item: Dataset, index: int) -> None:
        pixels = np.frombuffer(item.PixelData, "<i2" if signed else "<u2").reshape(20, 30).copy()
        pixels[corner] = stored
        item.PixelData = pixels.tobytes()
        item.add_new("PixelPaddingValue", "US" if stated > 0 else "SS", stated)

    parts = read(write_series(tmp_path / "scan", scan(), signed=signed, rescale=(1, -1024), edit=pad))
    np.testing.assert_array_equal(parts.array, np.where(corner, -1000, scan()))
    assert len(parts.warnings) == 1 and parts.warnings[0].startswith(f"120 voxels are padding ({stored - 1024})")


def test_padding_within_the_image_is_kept(tmp_path: Path) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), edit=lambda item, _: item.add_new("PixelPaddingValue", "US", 1024)))
    np.testing.assert_array_equal(parts.array, scan())
    assert parts.warnings == ()


@pytest.mark.parametrize(
    ("change", "hu"),
    [({"RescaleType": "HU"}, True), ({"RescaleType": "US"}, False), ({"Modality": "MR"}, False), ({"RescaleSlope": None}, True)],
)
def test_only_a_ct_header_makes_it_hu(tmp_path: Path, change: dict[str, object], hu: bool) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), edit=lambda item, _: item.update(change)))
    assert parts.hu == hu and parts.rescale == (1, -1024)


# pydicom's own files, against pydicom and GDCM


@pytest.mark.parametrize(
    "name",
    ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"],
)
def test_compressions_give_equal_voxels(tmp_path: Path, name: str) -> None:
    expected = pydicom.dcmread(PYDICOM_FILES / "MR_small.dcm").pixel_array
    parts = read(stack_of(tmp_path, PYDICOM_FILES / name))
    np.testing.assert_array_equal(parts.array, [expected, expected])
    assert parts.modality == "MR" and not parts.hu


@pytest.mark.parametrize(
    "name", ["JPEG-lossy.dcm", "JPEG2000.dcm", "JPEGLSNearLossless_16.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm"]
)
def test_compressions_that_gdcm_reads_too(tmp_path: Path, name: str) -> None:
    item = pydicom.dcmread(PYDICOM_FILES / name, stop_before_pixels=True)
    with_itk = sitk.GetArrayFromImage(sitk.ReadImage(str(PYDICOM_FILES / name)))[0].astype(int)
    parts = read(stack_of(tmp_path, PYDICOM_FILES / name))
    assert parts.array.shape == (2, item.Rows, item.Columns)
    assert np.abs(parts.array[0] - with_itk).max() <= (2 if "lossy" in name else 0)  # two JPEG decoders round as they like


def stack_of(folder: Path, path: Path) -> Path:
    """Write a file twice, 3 mm apart."""
    for index in range(2):
        item = pydicom.dcmread(path)
        item.SOPInstanceUID, item.ImagePositionPatient, item.ImageOrientationPatient = (
            f"1.2.{index + 1}",
            [0, 0, 3 * index],
            [1, 0, 0, 0, 1, 0],
        )
        item.save_as(folder / f"{index}.dcm")
    return folder


# A real scan


@pytest.fixture(scope="session")
def head(shared_data: Path) -> nibabel.Nifti1Image:
    return nibabel.load(shared_data / "head_ct.nii.gz")


@pytest.mark.parametrize("shape", ["plain", "JPEG", "JPEG-LS", "RLE", "one file"])
def test_a_head_ct_written_as_dicom(tmp_path: Path, head: nibabel.Nifti1Image, shape: str) -> None:
    values = np.rint(np.asarray(head.dataobj)).astype(np.int16).transpose()
    if shape == "one file":
        path = write_enhanced(tmp_path / "head.dcm", values, head.affine, syntax=uid.JPEGLSLossless)
    else:
        values, syntax = {
            "plain": (values, uid.ExplicitVRLittleEndian),
            "JPEG": (values[40:60], uid.JPEGLosslessSV1),
            "JPEG-LS": (values, uid.JPEGLSLossless),
            "RLE": (values[40:50], uid.RLELossless),
        }[shape]
        path = write_series(tmp_path / "head", values, head.affine, rescale=(1, -8192), syntax=syntax)
    parts = read(path)
    same_as_nifti(parts, values, head.affine, tmp_path)
    assert parts.warnings == () and parts.hu

"""read_volume: geometry, unit and values of every format, and one sentence for everything that is wrong."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from med3dvlm.volume import READERS, Volume, VolumeError, read_volume

SHAPE = (10, 20, 30)  # D, H, W: all different, so that swapped axes fail
MARKER = (2, 5, 9)


def scan(dtype: type = np.int16) -> np.ndarray:
    """Soft tissue in air with a marker voxel, in HU."""
    array = np.full(SHAPE, -1000, dtype=dtype)
    array[2:8, 4:16, 5:25] = 40
    array[MARKER] = 900
    return array


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """array (D, H, W) as NIfTI, whose axes are x, y, z = W, H, D."""
    affine = np.diag([0.7, 0.8, 2.5, 1.0]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(array.transpose(), affine), path)
    return path


def write_dicom(
    folder: Path,
    array: np.ndarray,
    slope: float = 1.0,
    intercept: float = -1024.0,
    positions: list[tuple[float, float, float]] | None = None,
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    modality: str = "CT",
    seed: int = 0,
) -> Path:
    """array (D, H, W) of stored values, one file a slice, file names shuffled."""
    folder.mkdir(exist_ok=True)
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    names = np.random.default_rng(seed).permutation(len(array))
    for index, picture in enumerate(array):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"IM{seed}{names[index]:04d}.dcm"
        item = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        item.SOPClassUID, item.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        item.PatientName, item.PatientID = "Secret^Name", "ID-SECRET"
        item.SeriesInstanceUID, item.StudyInstanceUID, item.FrameOfReferenceUID = series, study, frame
        item.Modality, item.InstanceNumber = modality, int(names[index]) + 1
        if positions is None or positions:
            item.ImagePositionPatient = list(positions[index] if positions else (-5.0, -6.0, 7.0 + 2.5 * index))
            item.ImageOrientationPatient = list(orientation)
        item.PixelSpacing = [0.8, 0.7]  # rows, columns
        item.SliceThickness = 2.5
        item.Rows, item.Columns = picture.shape[:2]
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, 0
        if picture.ndim == 3:
            item.SamplesPerPixel, item.PhotometricInterpretation, item.PlanarConfiguration = 3, "RGB", 0
            item.BitsAllocated, item.BitsStored, item.HighBit = 8, 8, 7
        item.RescaleSlope, item.RescaleIntercept = slope, intercept
        item.PixelData = picture.tobytes()
        item.save_as(path)
    return folder


# What a sound scan becomes


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


def test_nifti_without_geometry_says_so(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd"])
def test_itk_formats_agree_with_nifti(tmp_path: Path, ending: str) -> None:
    image = sitk.GetImageFromArray(scan())
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetDirection((0, 0, 1, -1, 0, 0, 0, -1, 0))  # a sagittal acquisition
    sitk.WriteImage(image, tmp_path / f"scan{ending}")
    sitk.WriteImage(image, tmp_path / "scan.nii.gz")
    volume, nifti = read_volume(tmp_path / f"scan{ending}"), read_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(volume.array, scan())
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7)) and nifti.spacing == pytest.approx((2.5, 0.8, 0.7))
    assert volume.orientation == nifti.orientation == "LIA"
    np.testing.assert_allclose(volume.direction, nifti.direction, atol=1e-6)
    assert volume.warnings == ()


def test_itk_headers_without_orientation(tmp_path: Path) -> None:
    raw = scan().tobytes()
    nrrd = "NRRD0004\ntype: short\ndimension: 3\nsizes: 30 20 10\nspacings: 0.7 0.8 2.5\nendian: little\nencoding: raw\n\n"
    (tmp_path / "scan.nrrd").write_bytes(nrrd.encode() + raw)
    mha = "ObjectType = Image\nNDims = 3\nDimSize = 30 20 10\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (tmp_path / "scan.mha").write_bytes(mha.encode() + raw)
    stated, silent = read_volume(tmp_path / "scan.nrrd"), read_volume(tmp_path / "scan.mha")
    for volume in (stated, silent):
        np.testing.assert_array_equal(volume.array, scan())
        assert volume.orientation is None and any("orientation is unknown" in text for text in volume.warnings)
    assert stated.spacing == pytest.approx((2.5, 0.8, 0.7)) and silent.spacing is None


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


def test_stated_spacing_replaces_the_files_with_a_warning(tmp_path: Path) -> None:
    volume = read_volume(write_nifti(tmp_path / "scan.nii", scan()), spacing=(5, 0.8, 0.7))
    assert volume.spacing == (5.0, 0.8, 0.7)
    assert any("2.5 x 0.8 x 0.7 mm; the stated 5 x 0.8 x 0.7 mm" in warning for warning in volume.warnings)


# DICOM


def test_dicom_series_is_sorted_and_rescaled_once(tmp_path: Path) -> None:
    stored = ((scan() + 1024) // 2).astype(np.uint16)
    volume = read_volume(write_dicom(tmp_path / "series", stored, slope=2.0, intercept=-1024.0))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, stored.astype(int) * 2 - 1024)
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    assert (volume.orientation, volume.plane, volume.unit) == ("SPL", "axial", "HU")
    assert volume.warnings == ()


def test_dicom_coronal_and_fractional_slope(tmp_path: Path) -> None:
    stored = (scan() + 1024).astype(np.uint16)
    positions = [(-5.0, -100.0 + 3.0 * i, 50.0) for i in range(10)]  # rows run right to left, then head to feet
    folder = write_dicom(tmp_path / "series", stored, 0.25, -1000.5, positions, (1, 0, 0, 0, 0, -1), modality="MR")
    volume = read_volume(folder)
    assert (volume.orientation, volume.plane, volume.unit) == ("PIL", "coronal", "arbitrary")
    assert volume.spacing == pytest.approx((3.0, 0.8, 0.7))
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array, stored * 0.25 - 1000.5)


def test_dicom_several_series_largest_is_read(tmp_path: Path) -> None:
    write_dicom(tmp_path / "series", (scan() + 1024).astype(np.uint16))
    write_dicom(tmp_path / "series", np.ones((3, 20, 30), np.uint16), seed=1)
    volume = read_volume(tmp_path / "series")
    np.testing.assert_array_equal(volume.array, scan())
    assert any("2 series with 10, 3 slices" in warning for warning in volume.warnings)


def test_dicom_missing_slice_and_gantry_tilt_are_reported(tmp_path: Path) -> None:
    stored = (scan() + 1024).astype(np.uint16)
    heights = [0, 2, 4, 6, 8, 10, 14, 16, 18, 20]
    gap = read_volume(write_dicom(tmp_path / "gap", stored, positions=[(0.0, 0.0, float(z)) for z in heights]))
    assert gap.spacing == pytest.approx((2.0, 0.8, 0.7))
    assert any("vary from 2.00 to 4.00 mm" in warning for warning in gap.warnings)
    tilted = read_volume(write_dicom(tmp_path / "tilt", stored, positions=[(0.0, 0.5 * i, 2.0 * i) for i in range(10)]))
    np.testing.assert_array_equal(tilted.array, scan())
    assert tilted.spacing == pytest.approx((2.0, 0.8, 0.7))
    assert any("gantry was tilted by 14 degrees" in warning for warning in tilted.warnings)


def test_dicom_without_positions_or_rescale_is_doubted(tmp_path: Path) -> None:
    stored = (scan() + 1024).astype(np.uint16)
    blind = read_volume(write_dicom(tmp_path / "blind", stored, positions=[]))
    assert blind.orientation is None and any("no slice positions" in warning for warning in blind.warnings)
    raw = read_volume(write_dicom(tmp_path / "raw", stored, intercept=0.0))
    assert raw.unit == "arbitrary" and any("look un-rescaled" in warning for warning in raw.warnings)


def test_nothing_about_the_patient_gets_out(tmp_path: Path) -> None:
    good = read_volume(write_dicom(tmp_path / "good", (scan() + 1024).astype(np.uint16)))
    assert "secret" not in repr(good).lower()
    twice = [(0.0, 0.0, float(i // 2)) for i in range(10)]
    with pytest.raises(VolumeError, match="10 slices at 5 places are no single stack") as caught:
        read_volume(write_dicom(tmp_path / "twice", (scan() + 1024).astype(np.uint16), positions=twice))
    assert "secret" not in str(caught.value).lower()


# The unit


@pytest.mark.parametrize(
    ("low", "high", "unit", "warning"),
    [
        (-1000, 1000, "HU", None),
        (-200, 300, "HU", None),
        (-199, 300, "arbitrary", None),
        (-3024, 3071, "HU", "probably padding"),
        (-4096, 4095, "arbitrary", None),
        (0, 4095, "arbitrary", "un-rescaled"),
        (0, 255, "arbitrary", None),
        (0, 1, "unit", None),
        (-1, 1, "arbitrary", None),
    ],
)
def test_unit_rule(tmp_path: Path, low: int, high: int, unit: str, warning: str | None) -> None:
    array = np.full(SHAPE, (low + high) // 2, dtype=np.int16)
    array[0, 0, 0], array[MARKER] = low, high
    volume = read_volume(write_nifti(tmp_path / "scan.nii", array))
    assert volume.unit == unit
    assert [warning in text for text in volume.warnings] == ([True] if warning else [])


# Wrong input: one sentence each


def refused(path: Path, match: str, **options: object) -> None:
    with pytest.raises(VolumeError, match=match) as caught:
        read_volume(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message


def test_missing_empty_and_unknown(tmp_path: Path) -> None:
    refused(tmp_path / "none.nii.gz", "no such file or folder")
    for ending in READERS:
        (tmp_path / f"empty{ending}").touch()
        refused(tmp_path / f"empty{ending}", r"empty \(0 bytes\)")
    (tmp_path / "scan.docx").write_bytes(b"PK")
    refused(tmp_path / "scan.docx", r"'\.docx' is not a known scan format; use \.nii, \.nii\.gz, .* DICOM series")


@pytest.mark.parametrize("ending", list(READERS))
def test_text_under_a_scans_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"scan{ending}"
    path.write_text("These are the findings of the report.\n" * 40)
    refused(path, "cannot be read as .* copy or export it again")


@pytest.mark.parametrize("ending", list(READERS))
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_file(tmp_path: Path, ending: str, share: float) -> None:
    path = tmp_path / f"scan{ending}"
    noisy = (scan() + np.random.default_rng(0).integers(0, 50, SHAPE)).astype(np.int16)
    if ending == ".npy":
        np.save(path, noisy)
    elif ending == ".mhd":
        sitk.WriteImage(sitk.GetImageFromArray(noisy), path)
        path = path.with_suffix(".raw")
    elif ending.startswith(".nii"):
        write_nifti(path, noisy)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(noisy), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(tmp_path / f"scan{ending}", "cannot be read as")


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


def test_headers_that_crash_or_surprise_the_libraries(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(scan()), tmp_path / "scan.nrrd")
    content = (tmp_path / "scan.nrrd").read_bytes()
    (tmp_path / "endless.nrrd").write_bytes(content.replace(b"\n\n", b"\n", 1))  # a segmentation fault in ITK
    refused(tmp_path / "endless.nrrd", "cannot be read as NRRD")
    np.save(tmp_path / "scan.npy", scan())
    content = (tmp_path / "scan.npy").read_bytes()
    (tmp_path / "open.npy").write_bytes(content.replace(b"}", b"(", 1))
    refused(tmp_path / "open.npy", "cannot be read as a NumPy array")
    content = bytearray(write_nifti(tmp_path / "scan.nii", scan()).read_bytes())
    content[123] = 7  # no such unit of length; nibabel knows no way on
    (tmp_path / "unit.nii").write_bytes(content)
    assert read_volume(tmp_path / "unit.nii").spacing == pytest.approx((2.5, 0.8, 0.7))


META_HEADER = "ObjectType = Image\nNDims = 3\nDimSize = 30 20 10\nElementType = MET_SHORT\n"
NRRD_HEADER = "NRRD0004\ntype: short\ndimension: 3\nsizes: 30 20 10\nendian: little\nencoding: raw\n"


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("scan.nrrd", NRRD_HEADER + "data file: {place}\n\n"),
        ("scan.nrrd", NRRD_HEADER.replace("\n", "\r\n") + "DataFile: {place}\r\n\r\n"),
        ("scan.NRRD", NRRD_HEADER[:-1] + "\rdata file: {place}\n\n"),  # a carriage return ends a line, too
        ("scan.mha", META_HEADER + "ElementDataFile = {place}\n"),
        ("scan.mha", META_HEADER + "ElementDataFile: {place}\n"),
        ("scan.mha", META_HEADER + "ElementDataFile\n= {place}\n"),
        ("scan.mha", "Comment = ElementDataFile = LOCAL\n" + META_HEADER + "ElementDataFile = {place}\n"),
        ("scan.mha", META_HEADER + "ElementDataFile\nComment = {place}\n"),
        ("scan.mha", "Comment = " + "x" * 70000 + "\n" + META_HEADER + "ElementDataFile = {place}\n"),
        ("scan.mhd", META_HEADER + "ElementDataFile = {place}\n"),
        ("scan.mhd", META_HEADER + "ElementDataFile = ../private.raw\n"),
        ("scan.mhd", META_HEADER + "ElementDataFile = LIST 3D\n{place}\n"),
        ("scan.mhd", META_HEADER + "ElementDataFile =  LIST\n" + 10 * "{place}\n"),
        ("scan.mhd", META_HEADER + "ElementDataFile = ../private%d.raw 1 1 1\n"),
        ("scan.mhd", (META_HEADER + "Comment = ").ljust(65516, "x") + "\nElementDataFile = ../private.raw\n"),  # cut after the first dot
    ],
    ids=lambda text: text if len(text) < 20 else "header",
)
def test_a_header_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: str, header: str) -> None:
    """ITK would read it and we would show it: any file of the machine, in the chat by an upload."""
    place = tmp_path / "private.raw"
    place.write_bytes(scan().tobytes())
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    path.write_bytes(header.format(place=place).encode())
    refused(path, "the header names another place for the voxels, which is not opened; save .* as one")


def test_a_name_beside_the_header_is_none_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "the voxels.raw").write_bytes(scan().tobytes())
    for end in ("", "\n", "\r\n"):
        (tmp_path / "scan.mhd").write_bytes((META_HEADER + "ElementDataFile = the voxels.raw" + end).encode())
        np.testing.assert_array_equal(read_volume(tmp_path / "scan.mhd").array, scan())
    for place in (tmp_path / "scan.mha", tmp_path / "scan.MHA"):
        place.write_bytes((META_HEADER + "ElementDataFile = Local\r\n").encode() + scan().tobytes())
        np.testing.assert_array_equal(read_volume(place).array, scan())
    nrrd = NRRD_HEADER + "# the data file: this one\n\n"
    (tmp_path / "scan.nrrd").write_bytes(nrrd.encode() + scan().tobytes())
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.nrrd").array, scan())


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
    refused(write_dicom(tmp_path / "one", np.ones((1, 20, 30), np.uint16)), "2D image")


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
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused(tmp_path / "objects.npy", "cannot be read as a NumPy array")
    np.save(tmp_path / "none.npy", np.zeros((0, 20, 30)))
    refused(tmp_path / "none.npy", "2D image")


def test_colour_images(tmp_path: Path) -> None:
    rgb = np.zeros((30, 20, 10), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), tmp_path / "colour.nii.gz")
    refused(tmp_path / "colour.nii.gz", "colour image")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((*SHAPE, 3), np.uint8), isVector=True), tmp_path / "colour.mha")
    refused(tmp_path / "colour.mha", "colour image")
    refused(write_dicom(tmp_path / "colour", np.zeros((*SHAPE, 3), np.uint8)), "colour image")


def test_folders_that_are_no_series(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", "no DICOM images")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "report.txt").write_text("findings")
    refused(tmp_path / "text", "no DICOM images")
    folder = write_dicom(tmp_path / "cut", (scan() + 1024).astype(np.uint16))
    some = sorted(folder.iterdir())[4]
    some.write_bytes(some.read_bytes()[:-300])
    refused(folder, "1 of the DICOM slices are damaged")
    mixed = write_dicom(tmp_path / "mixed", (scan() + 1024).astype(np.uint16))
    other = pydicom.dcmread(sorted(mixed.iterdir())[2])
    other.Rows, other.Columns, other.PixelData = 10, 30, other.PixelData[:600]
    other.save_as(sorted(mixed.iterdir())[2])
    refused(mixed, "cannot be read as a DICOM series")


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

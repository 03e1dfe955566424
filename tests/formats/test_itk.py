"""NRRD and MetaImage: geometry, and headers that crash ITK or lead it to other files."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from med3dvlm.volume import read_volume
from tests.formats.scans import refused, scan

META_HEADER = "ObjectType = Image\nNDims = 3\nDimSize = 30 20 10\nElementType = MET_SHORT\n"
NRRD_HEADER = "NRRD0004\ntype: short\ndimension: 3\nsizes: 30 20 10\nendian: little\nencoding: raw\n"


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


DIRECTIONS = "space directions: (0.7,0,0) (0,0.8,0) (0,0,2.5)\n"


@pytest.mark.parametrize(
    ("space", "orientation"),
    [
        ("space: left-posterior-superior", "SPL"),
        ("space: RAS", "SAR"),
        ("space: left-anterior-superior", "SAL"),
        ("space: scanner-xyz", None),
        ("space: 3D-right-handed", None),
        ("space dimension: 3", None),
    ],
)
def test_a_nrrd_space_that_is_no_patients_leaves_the_orientation_unknown(tmp_path: Path, space: str, orientation: str | None) -> None:
    (tmp_path / "scan.nrrd").write_bytes(f"{NRRD_HEADER}{space}\n{DIRECTIONS}\n".encode() + scan().tobytes())
    volume = read_volume(tmp_path / "scan.nrrd")
    assert volume.orientation == orientation and volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    np.testing.assert_array_equal(volume.array, scan())


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("cm", 10), ("um", 0.001), ("furlong", None)])
def test_nrrd_units_of_length(tmp_path: Path, unit: str, factor: float | None) -> None:
    space = "space: left-posterior-superior\nspace units: " + " ".join([f'"{unit}"'] * 3)
    (tmp_path / "scan.nrrd").write_bytes(f"{NRRD_HEADER}{space}\n{DIRECTIONS}\n".encode() + scan().tobytes())
    if factor is None:
        refused(tmp_path / "scan.nrrd", "other units than mm, cm, m or um")
    else:
        assert read_volume(tmp_path / "scan.nrrd").spacing == pytest.approx((2.5 * factor, 0.8 * factor, 0.7 * factor))


def test_a_nrrd_header_without_an_end(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(scan()), tmp_path / "scan.nrrd")
    content = (tmp_path / "scan.nrrd").read_bytes()
    (tmp_path / "endless.nrrd").write_bytes(content.replace(b"\n\n", b"\n", 1))  # a segmentation fault in ITK
    refused(tmp_path / "endless.nrrd", "cannot be read as NRRD")


@pytest.mark.parametrize("name", ["scan.nrrd", "scan.mha", "scan.mhd"])
def test_a_header_that_announces_more_than_the_file_can_hold(tmp_path: Path, name: str) -> None:
    place = {"scan.mha": "ElementDataFile = LOCAL\n", "scan.mhd": "ElementDataFile = scan.raw\n", "scan.nrrd": "\n"}[name]
    header = (NRRD_HEADER if name == "scan.nrrd" else META_HEADER).replace("30 20 10", "30000 20000 1000")
    (tmp_path / "scan.raw").write_bytes(scan().tobytes())
    (tmp_path / name).write_bytes((header + place).encode() + scan().tobytes())
    refused(tmp_path / name, "cannot be read as")


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

"""NRRD and MetaImage: read as ITK reads them, and headers that crash ITK or name other files."""

import bz2
import gzip
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from med3dvlm.formats import scan_files
from med3dvlm.volume import read_volume
from tests.formats.scans import refused, scan

META_HEADER = "ObjectType = Image\nNDims = 3\nDimSize = 30 20 10\nElementType = MET_SHORT\n"
NRRD_HEADER = "NRRD0004\ntype: short\ndimension: 3\nsizes: 30 20 10\nendian: little\nencoding: raw\n"


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd"])
def test_itk_formats_agree_with_nifti(tmp_path: Path, ending: str) -> None:
    image = sitk.GetImageFromArray(scan())
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetDirection((0, 0, 1, -1, 0, 0, 0, -1, 0))  # a sagittal acquisition
    image.SetOrigin((12.5, -40.25, 77.0))
    sitk.WriteImage(image, tmp_path / f"scan{ending}")
    sitk.WriteImage(image, tmp_path / "scan.nii.gz")
    volume, nifti = read_volume(tmp_path / f"scan{ending}"), read_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(volume.array, scan())
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7)) and nifti.spacing == pytest.approx((2.5, 0.8, 0.7))
    assert volume.orientation == nifti.orientation == "LIA"
    np.testing.assert_allclose(volume.direction, nifti.direction, atol=1e-6)
    assert volume.warnings == ()
    for d, h, w in ((0, 0, 0), (3, 5, 7)):
        place = np.array(image.TransformIndexToPhysicalPoint((w, h, d))) * (-1, -1, 1)  # ITK's frame is LPS
        for found in (volume, nifti):
            np.testing.assert_allclose((found.affine @ (d, h, w, 1))[:3], place, atol=1e-4)


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
def test_a_nrrd_space_other_than_the_patients_leaves_the_orientation_unknown(tmp_path: Path, space: str, orientation: str | None) -> None:
    (tmp_path / "scan.nrrd").write_bytes(f"{NRRD_HEADER}{space}\n{DIRECTIONS}\n".encode() + scan().tobytes())
    volume = read_volume(tmp_path / "scan.nrrd")
    assert volume.orientation == orientation and volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    np.testing.assert_array_equal(volume.array, scan())


LPS = "space: left-posterior-superior\n"
BODY = scan().tobytes()
WHERE = {"space": "(0.7,0,0.1) (0,0.8,0) (0,0,2.5)"}


def with_fields(header: str, **fields: str) -> str:
    """Return the NRRD header with changed or additional fields; "_" in a name stands for a space."""
    for name, value in fields.items():
        line = f"{name.replace('_', ' ')}: {value}"
        header = re.sub(rf"(?m)^{name}: .*$", line, header) if f"\n{name}: " in header else f"{header}{line}\n"
    return header


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ({}, BODY),
        ({"encoding": "gz"}, gzip.compress(BODY)),
        ({"encoding": "GZIP", "line_skip": "1"}, b"made by hand\n" + gzip.compress(BODY)),
        ({"encoding": "gzip", "byte_skip": "7"}, gzip.compress(b"1234567" + BODY)),
        ({"encoding": "txt"}, " ".join(map(str, scan().ravel())).encode()),
        ({"encoding": "hex"}, BODY.hex().encode()),
        ({"endian": "big"}, scan().astype(">i2").tobytes()),
        ({"type": "signed short int", "lineskip": "2", "byteskip": "3"}, b"a\nb\n123" + BODY),
        ({"type": "int16_t", "byte_skip": "-1"}, b"1234567" + BODY),
        ({"type": "float"}, scan().astype("<f4").tobytes()),
        ({"type": "double"}, scan().astype("<f8").tobytes()),
        ({"type": "unsigned int"}, (scan() + 1000).astype("<u4").tobytes()),
        ({"measurement_frame": "(1,0,0) (0,1,0) (0,0,1)", "space_origin": "(1,2,3)", "thicknesses": "nan nan 2.5"}, BODY),
        (
            {"kinds": "list domain domain domain", "dimension": "4", "sizes": "1 30 20 10", "space_directions": "none " + WHERE["space"]},
            BODY,
        ),
        (
            {"kinds": "domain domain domain list", "dimension": "4", "sizes": "30 20 10 1", "space_directions": WHERE["space"] + " none"},
            BODY,
        ),
    ],
    ids=lambda value: " ".join(value.values())[:30] if isinstance(value, dict) else "",
)
def test_nrrd_headers_are_read_as_itk_reads_them(tmp_path: Path, fields: dict[str, str], body: bytes) -> None:
    header = with_fields(NRRD_HEADER + LPS, **{"space_directions": WHERE["space"], **fields})
    (tmp_path / "scan.nrrd").write_bytes(f"{header}\n".encode() + body)
    volume, image = read_volume(tmp_path / "scan.nrrd", unit="arbitrary"), sitk.ReadImage(tmp_path / "scan.nrrd")
    theirs = sitk.GetArrayFromImage(image)
    np.testing.assert_array_equal(volume.array, theirs.reshape(theirs.shape[-3:]))
    np.testing.assert_array_equal(volume.array, scan() + 1000 * (fields.get("type") == "unsigned int"))
    if image.GetDimension() == 3:
        np.testing.assert_allclose(volume.spacing, image.GetSpacing()[::-1])
        np.testing.assert_allclose(volume.direction, np.diag([-1, -1, 1]) @ np.reshape(image.GetDirection(), (3, 3))[:, ::-1], atol=1e-12)
    assert volume.spacing == pytest.approx((2.5, 0.8, np.hypot(0.7, 0.1)))


def test_bzip2_and_the_spaces_with_time(tmp_path: Path) -> None:
    """ITK's copy of teem does not read bzip2."""
    header = with_fields(NRRD_HEADER, encoding="bzip2", dimension="4", sizes="30 20 10 1", space="left-posterior-superior-time")
    header = with_fields(header, space_directions="(0.7,0,0,0) (0,0.8,0,0) (0,0,2.5,0) (0,0,0,1)", space_units='"cm" "cm" "cm" "s"')
    (tmp_path / "scan.nrrd").write_bytes(f"{header}\n".encode() + bz2.compress(BODY))
    volume = read_volume(tmp_path / "scan.nrrd")
    np.testing.assert_array_equal(volume.array, scan())
    assert volume.spacing == pytest.approx((25, 8, 7)) and volume.orientation == "SPL"


@pytest.mark.parametrize(
    "lines",
    [
        "Space: LPS\nSpace Directions: {}\n",
        "space: left posterior superior\nspacedirections:{}\n",
        "SPACE: lps\nspace directions: ( 0.7, 0, 0 )  (0 , 0.8,0) (0,0, 2.5)\n",
        "space: LPS\nspace directions: {}\n" + "".join(f"key {number}:={'x' * 80}: y\n" for number in range(1000)),
        "# a comment: with a colon\r\nspace: LPS\r\nspace directions: {}\r\n",
    ],
)
def test_spellings_and_lengths_of_nrrd_headers(tmp_path: Path, lines: str) -> None:
    header = NRRD_HEADER + lines.format("(0.7,0,0) (0,0.8,0) (0,0,2.5)")
    (tmp_path / "scan.nrrd").write_bytes(f"{header}\n".encode() + BODY)
    volume = read_volume(tmp_path / "scan.nrrd")
    np.testing.assert_array_equal(volume.array, scan())
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7)) and volume.orientation == "SPL" and volume.warnings == ()


def test_a_spacing_of_nan_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "scan.nrrd").write_bytes(f"{NRRD_HEADER}spacings: 0.7 0.8 nan\n\n".encode() + BODY)
    volume = read_volume(tmp_path / "scan.nrrd")
    assert (
        volume.spacing is None
        and volume.warnings[0] == "the file states spacing nan x 0.8 x 0.7 mm, which is not a length, and is ignored."
    )
    mha = META_HEADER + "TransformMatrix = 0 1 0 -1 0 0 0 0 1\nElementSpacing = 0.7 0.8 0\nElementDataFile = LOCAL\n"
    (tmp_path / "scan.mha").write_bytes(mha.encode() + BODY)  # ITK refuses it
    volume = read_volume(tmp_path / "scan.mha")
    assert volume.spacing is None and volume.orientation == "SRP"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"encoding": "zrl"}, "packed in a way that is not read"),
        ({"type": "block"}, "of a type that is not read"),
        ({"type": "short", "endian": "middle"}, "little or big order"),
        ({"sizes": "30 20 -1"}, "cannot be read as NRRD; it is damaged"),
        ({"dimension": "2"}, "cannot be read as NRRD; it is damaged"),
        ({"byteskip": "9999999"}, "cannot be read as NRRD; it is damaged"),
        ({"space_directions": "(1,0,0) (0,1,0)"}, "cannot be read as NRRD; it is damaged"),
        ({"dimension": "4", "sizes": "3 10 20 10", "kinds": "RGB-color domain domain domain"}, "colour image"),
        ({"dimension": "4", "sizes": "3 10 20 10", "space_directions": "none " + WHERE["space"]}, "colour image"),
    ],
)
def test_nrrd_headers_that_cannot_be_read(tmp_path: Path, fields: dict[str, str], words: str) -> None:
    (tmp_path / "scan.nrrd").write_bytes(f"{with_fields(NRRD_HEADER + LPS, **fields)}\n".encode() + BODY)
    refused(tmp_path / "scan.nrrd", words)


MATRIX = "0.9396926207859084 0.3420201433256687 0 -0.3420201433256687 0.9396926207859084 0 0 0 1"


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        ("TransformMatrix = {matrix}\nElementSpacing = 0.7 0.8 2.5\n", BODY),
        ("Rotation = {matrix}\nElementSize = 0.7 0.8 2.5\n", BODY),
        ("Orientation = {matrix}\nElementSpacing = 0.7 0.8 2.5\nElementSize = 1 1 9\n", BODY),
        ("CenterOfRotation = 5 5 5\nOffset = 1 2 3\nTransformMatrix = {matrix}\nElementSpacing = 0.7 0.8 2.5\n", BODY),
        ("ElementByteOrderMSB = True\nTransformMatrix = {matrix}\nElementSpacing = 0.7 0.8 2.5\n", scan().astype(">i2").tobytes()),
        ("BinaryDataByteOrderMSB = True\nTransformMatrix = {matrix}\nElementSpacing = 0.7 0.8 2.5\n", scan().astype(">i2").tobytes()),
        (
            f"CompressedData = True\nCompressedDataSize = {len(zlib.compress(BODY))}\nTransformMatrix = {{matrix}}\nElementSpacing = 0.7 0.8 2.5\n",
            zlib.compress(BODY),
        ),
        ("HeaderSize = -1\nTransformMatrix = {matrix}\nElementSpacing = 0.7 0.8 2.5\n", b"1234567" + BODY),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("beside", [False, True])
def test_meta_images_are_read_as_itk_reads_them(tmp_path: Path, lines: str, body: bytes, beside: bool) -> None:
    path, header = tmp_path / ("scan.mhd" if beside else "scan.mha"), META_HEADER + lines.format(matrix=MATRIX)
    if beside:
        (tmp_path / "voxels.zraw").write_bytes(body)
        path.write_text(header + "ElementDataFile = voxels.zraw\n")
    else:
        path.write_bytes(f"{header}ElementDataFile = LOCAL\n".encode() + body)
    volume, image = read_volume(path), sitk.ReadImage(path)
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image))
    np.testing.assert_array_equal(volume.array, scan())
    np.testing.assert_allclose(volume.spacing, image.GetSpacing()[::-1])
    np.testing.assert_allclose(volume.direction, np.diag([-1, -1, 1]) @ np.reshape(image.GetDirection(), (3, 3))[:, ::-1], atol=1e-12)
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7)) and volume.oblique == pytest.approx(20)


def test_other_keys_of_a_meta_image_are_ignored(tmp_path: Path) -> None:
    """ITK copies such keys from NIfTI and DICOM. Two contradicting sizes are refused."""
    others = "ITK_FileNotes = a: b = c\ndim[0] = 3\n0010|0010 = A\nComment = NDims = 5\n\nComment = twice\n"
    (tmp_path / "scan.mha").write_bytes((others + META_HEADER + "ElementDataFile = LOCAL\n").encode() + BODY)
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.mha").array, scan())
    (tmp_path / "two.mha").write_bytes((META_HEADER + "DimSize = 20 30 10\nElementDataFile = LOCAL\n").encode() + BODY)
    refused(tmp_path / "two.mha", "cannot be read as MetaImage")


def test_meta_images_that_itk_does_not_read(tmp_path: Path) -> None:
    """Such as a wrong CompressedDataSize, numbers as text, another unit, invalid geometry or an unknown type."""
    for number, (lines, body) in enumerate(
        [
            ("CompressedData = True\nCompressedDataSize = 99999\n", zlib.compress(BODY)),
            ("BinaryData = False\n", " ".join(map(str, scan().ravel())).encode()),
            ("DistanceUnits = cm\nElementSpacing = 0.07 0.08 0.25\n", BODY),
            ("TransformMatrix = 0 0 0 0 0 0 0 0 0\nElementSpacing = 0.7 0.8 2.5\n", BODY),
        ]
    ):
        (tmp_path / f"{number}.mha").write_bytes(f"{META_HEADER}{lines}ElementDataFile = LOCAL\n".encode() + body)
        volume = read_volume(tmp_path / f"{number}.mha")
        np.testing.assert_array_equal(volume.array, scan())
        assert volume.orientation is None
        assert volume.spacing == (pytest.approx((2.5, 0.8, 0.7)) if number >= 2 else None)
    (tmp_path / "odd.mha").write_bytes((META_HEADER.replace("SHORT", "OTHER") + "ElementDataFile = LOCAL\n").encode() + BODY)
    refused(tmp_path / "odd.mha", "of a type that is not read")


@pytest.mark.parametrize("name", ["scan.nhdr", "scan.mhd"])
@pytest.mark.parametrize("form", ["{}", "./{}", "LIST", "slice%02d.raw 1 10 1", "slice%02d.raw 10 1 -1"])
def test_voxels_in_files_beside_the_header(tmp_path: Path, name: str, form: str) -> None:
    """One file, a list of them, or numbered ones, upwards and downwards, as ITK reads them."""
    slices = [f"slice{number:02d}.raw" for number in range(1, 11)]
    for file, picture in zip(slices, scan(), strict=True):
        (tmp_path / file).write_bytes(picture.tobytes())
    (tmp_path / "the voxels.raw").write_bytes(BODY)
    place = "\n".join(["LIST", *slices]) if form == "LIST" else form.format("the voxels.raw")
    header = f"{NRRD_HEADER}data file: {place}\n" if name == "scan.nhdr" else f"{META_HEADER}ElementDataFile = {place}\n"
    (tmp_path / name).write_text(header)
    array = read_volume(tmp_path / name).array
    np.testing.assert_array_equal(array, scan()[::-1] if form.endswith("-1") else scan())
    if (name, form[-2:]) != ("scan.mhd", "-1"):  # ITK's MetaImage does not count downwards
        np.testing.assert_array_equal(array, sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / name)))
    beside = [tmp_path / "the voxels.raw"] if "{}" in form else [tmp_path / file for file in slices]
    assert sorted(scan_files(tmp_path / name)) == sorted([tmp_path / name, *beside])
    beside[-1].unlink()
    refused(tmp_path / name, f"1 of the {len(beside)} files that the header names are not beside it; copy them there")
    assert beside[-1] not in scan_files(tmp_path / name)


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
    """ITK would read it, so that an upload to the chat could show any file of the machine."""
    place = tmp_path / "private.raw"
    place.write_bytes(scan().tobytes())
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    path.write_bytes(header.format(place=place).encode())
    refused(path, "the header names another place for the voxels, which is not opened; save .* as one")


def test_spellings_of_a_data_file_beside_the_header(tmp_path: Path) -> None:
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

"""Unusual elements of DICOM headers, as vendors and anonymisers write them: read where their meaning is certain, else named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread, uid
from pydicom.dataset import Dataset

from med3dvlm.formats.dicom_elements import value_of
from tests.formats.dicom_files import AFFINE, PYDICOM_FILES, read, refused, same_as_nifti, scan, write_series

Edit = Callable[[Dataset, int], None]


def setting(keyword_or_tag: int | str, vr: str, value: object) -> Edit:
    return lambda item, _: item.add_new(keyword_or_tag, vr, value)


def without(*keywords: str) -> Edit:
    def edit(item: Dataset, _: int) -> None:
        for keyword in keywords:
            del item[keyword]

    return edit


def patched(folder: Path, tag: bytes, old: bytes, new: bytes) -> Path:
    """Replace the bytes of an element (explicit VR, short length) by bytes that pydicom would not write."""
    assert len(old) == len(new)
    for path in folder.iterdir():
        content = path.read_bytes()
        start = content.index(tag) + 8
        length = int.from_bytes(content[start - 2 : start], "little")
        assert old in content[start : start + length]
        path.write_bytes(content[:start] + content[start : start + length].replace(old, new) + content[start + length :])
    return folder


# What is certain


@pytest.mark.parametrize(
    "edit",
    [
        setting("PixelSpacing", "UT", "0.8\\0.7"),
        setting("PixelSpacing", "LO", "0.8\\0.7 "),
        setting("PixelSpacing", "FD", [0.8, 0.7]),
        setting("PixelSpacing", "UN", b"0.8\\0.7 "),
        setting("RescaleIntercept", "SS", -1024),
        setting("RescaleIntercept", "OB", b"-1024 "),
        setting("Rows", "IS", "20"),
        setting("Columns", "UL", 30),
        setting("BitsAllocated", "DS", "16.0"),
        setting("PixelPaddingValue", "OB", b"\0\0"),
        setting("InstanceNumber", "US", 7),
        setting("RescaleSlope", "DS", ["1", "1"]),
        setting("SamplesPerPixel", "US", None),
        setting("NumberOfFrames", "IS", None),
        setting("WindowCenter", "LO", "none"),
        setting(0x00091001, "UN", b"\0\1\2\3"),
        setting(0x00091002, "LO", "x" * 64),
        setting("ImageComments", "LT", "y" * 10_000),
        without("SamplesPerPixel", "ImageType"),
    ],
)
def test_elements_of_certain_meaning_are_read_without_a_warning(tmp_path: Path, edit: Edit) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), edit=edit))
    same_as_nifti(parts, scan(), AFFINE, tmp_path)
    assert parts.hu and not [text for text in parts.warnings if "left out" not in text]


@pytest.mark.parametrize(
    ("old", "new"), [(b"0.8\\0.7", b"0,8\\0,7"), (b"0.8\\0.7", b"0.8,0.7"), (b"0.8\\0.7 ", b" 0.8\\0.7"), (b" ", b"\0")]
)
def test_decimal_commas_and_odd_padding(tmp_path: Path, old: bytes, new: bytes) -> None:
    folder = write_series(tmp_path / "scan", scan(), edit=setting("PixelSpacing", "DS", ["0.8", "0.7"]))
    parts = read(patched(folder, b"\x28\0\x30\0DS", old, new))
    same_as_nifti(parts, scan(), AFFINE, tmp_path)
    assert parts.warnings == ()


@pytest.mark.parametrize(
    ("missing", "warning"),
    [
        (["PhotometricInterpretation"], "states no PhotometricInterpretation; the values are taken as grey (MONOCHROME2)"),
        (["PixelRepresentation"], "states no PixelRepresentation; the values are taken as unsigned"),
        (["BitsStored", "HighBit"], "states no BitsStored; all 16 bits of a pixel are taken"),
    ],
)
def test_assumptions_about_missing_elements_give_a_warning(tmp_path: Path, missing: list[str], warning: str) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), edit=without(*missing)))
    np.testing.assert_array_equal(parts.array, scan())
    assert len(parts.warnings) == 1 and warning in parts.warnings[0]


def test_a_slope_of_zero_counts_as_one_with_a_warning(tmp_path: Path) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), edit=setting("RescaleSlope", "DS", "0")))
    np.testing.assert_array_equal(parts.array, scan())
    assert not parts.hu and len(parts.warnings) == 1 and "RescaleSlope of 0" in parts.warnings[0]


# What is not


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (setting("PixelSpacing", "LO", "unknown"), "state a PixelSpacing that cannot be read; correct it or export them again"),
        (setting("RescaleSlope", "LO", "Secret"), "state a RescaleSlope that cannot be read"),
        (setting("RescaleIntercept", "DS", ["0", "-1024"]), "state a RescaleIntercept that cannot be read"),
        (setting("Rows", "OB", b"\1\2\3"), "state a Rows that cannot be read"),
        (setting("RescaleIntercept", "FD", float("nan")), "state a RescaleIntercept that cannot be read"),
        (without("Columns"), "state no Columns; export them again"),
        (without("BitsAllocated"), "state no BitsAllocated"),
        (setting("BitsAllocated", "US", 12), "have 12 bits for a pixel"),
        (setting("BitsStored", "US", 17), "state 17 used bits of 16 in a pixel"),
    ],
)
def test_ambiguous_elements_are_refused_by_name(tmp_path: Path, edit: Edit, sentence: str) -> None:
    refused(write_series(tmp_path, scan(), edit=edit), f"10 of the DICOM slices {sentence}")


def test_a_harmless_element_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), edit=setting("PixelPaddingValue", "LO", "Secret")))
    np.testing.assert_array_equal(parts.array, scan())
    assert parts.warnings == ("PixelPaddingValue cannot be read in some of the headers and is left out.",)


def test_an_odd_series_beside_a_sound_one_is_left_out(tmp_path: Path) -> None:
    write_series(tmp_path, scan())
    write_series(tmp_path, scan()[:4], prefix="odd", edit=setting("BitsAllocated", "US", 12))
    parts = read(tmp_path)
    np.testing.assert_array_equal(parts.array, scan())
    (warning,) = parts.warnings
    assert warning.startswith("4 DICOM slices of other series have 12 bits for a pixel") and warning.endswith("; they are left out.")


def test_an_odd_slice_of_a_sound_series_is_not_left_out(tmp_path: Path) -> None:
    def one(item: Dataset, index: int) -> None:
        if index == 3:
            item.BitsAllocated = 12

    refused(write_series(tmp_path, scan(), edit=one), "1 of the DICOM slices have 12 bits for a pixel")


def test_images_without_pixels(tmp_path: Path) -> None:
    """Some programs export headers alone."""
    folder = write_series(tmp_path, scan())
    for path in folder.iterdir():
        item = dcmread(path)
        del item.PixelData
        item.save_as(path)
    refused(folder, "10 of the DICOM slices have no pixels, as they were cut short or exported without them; copy or export them again")


@pytest.mark.parametrize("name", ["rtplan.dcm", "rtstruct.dcm", "test-SR.dcm", "reportsi.dcm"])
def test_objects_without_pixels_are_no_images(tmp_path: Path, name: str) -> None:
    write_series(tmp_path, scan())
    (tmp_path / name).write_bytes((PYDICOM_FILES / name).read_bytes())
    np.testing.assert_array_equal(read(tmp_path).array, scan())


# Values


@pytest.mark.parametrize(
    ("content", "stated", "kind", "value"),
    [
        (b"1.5\\-2 ", "DS", "DS", [1.5, -2.0]),
        (b"1,5", "DS", "DS", 1.5),
        (b" 12\0", "IS", "IS", 12),
        (b"12.0", "IS", "IS", 12),
        (b"\x01\0\xff\xff", "SS", "US or SS", [1, -1]),
        (b"\xff\xff", "UN", "US or SS", 65535),
        (b"\x28\0\x10\0", "AT", "AT", 0x00280010),
        (b"", "DS", "DS", None),
        (b"  ", "DS", "DS", None),
        (b"\\", "DS", "DS", None),
        (b"A\\B ", "CS", "CS", ["A", "B"]),
        ("M\u00fcller".encode("latin-1"), "LO", "LO", "M\u00fcller"),
        (b"\x02\x10", "US", "IS", 0x1002),
    ],
)
def test_values_of_each_type(content: bytes, stated: str, kind: str, value: object) -> None:
    assert value_of(content, stated, kind) == value


@pytest.mark.parametrize(
    ("content", "kind"), [(b"1_0", "DS"), (b"1.5", "IS"), (b"ten", "DS"), (b"inf", "DS"), (b"1,2,3", "DS"), (b"\1", "US")]
)
def test_texts_that_are_no_numbers(content: bytes, kind: str) -> None:
    with pytest.raises(ValueError):
        value_of(content, kind, kind)


def test_big_endian_values(tmp_path: Path) -> None:
    assert value_of(b"\0\1", "US", "US", little_endian=False) == 1
    parts = read(write_series(tmp_path / "scan", scan(), syntax=uid.ExplicitVRBigEndian, edit=setting("PixelPaddingValue", "US", 7)))
    np.testing.assert_array_equal(parts.array, scan())

"""Pixels that contradict the header: read correctly where the bytes leave no doubt, else refused."""

import struct
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from med3dvlm.formats import dicom_values
from med3dvlm.formats.base import Parts
from tests.formats.dicom_files import COMPRESSORS, LOSSLESS, PYDICOM_FILES, read, refused, rewrite, scan, write_enhanced, write_series

OVERLAY = (slice(4, 8), slice(4, 20))
PACKED = [syntax for syntax in LOSSLESS if syntax.is_encapsulated]
BITS = "bits that do not count (BitsStored) hold something in 10 slices, such as an overlay; they are left out."


def series(folder: Path, syntax: uid.UID = uid.ExplicitVRLittleEndian, **options: object) -> Path:
    return write_series(folder, scan(), syntax=syntax, **options)


def encode(syntax: uid.UID, picture: np.ndarray) -> bytes:
    if syntax == uid.RLELossless:
        item = pydicom.dcmread(PYDICOM_FILES / "MR_small.dcm")
        item.Rows, item.Columns, item.PixelData, item.PixelRepresentation = *picture.shape, picture.tobytes(), 0
        item.BitsStored, item.HighBit = 16, 15
        item.compress(uid.RLELossless)
        return next(pydicom.encaps.generate_frames(item.PixelData, number_of_frames=1))
    return COMPRESSORS[syntax](picture)


def pixels(change: Callable[[np.ndarray], np.ndarray], syntax: uid.UID, **elements: int) -> Callable[[Dataset, int], None]:
    """Return an edit for `write_series` that changes the stored numbers as unsigned, compresses them, and sets elements."""

    def edit(item: Dataset, index: int) -> None:
        picture = change(np.frombuffer(item.PixelData, "<u2").reshape(item.Rows, item.Columns).copy())
        item.update(elements)
        item.PixelData = encapsulate([encode(syntax, picture)]) if syntax.is_encapsulated else picture.tobytes()
        if syntax.is_encapsulated:
            item["PixelData"].VR, item["PixelData"].is_undefined_length = "OB", True
        item.file_meta.TransferSyntaxUID = syntax

    return edit


def retagged(folder: Path, syntax: str) -> Path:
    """Write the files again with another transfer syntax in their meta information."""
    for path in folder.iterdir():
        content = path.read_bytes()
        start = content.index(b"\x02\0\x10\0UI")
        length = int.from_bytes(content[start + 6 : start + 8], "little")
        name = syntax.encode() + b"\0" * (len(syntax) % 2)
        path.write_bytes(content[: start + 6] + struct.pack("<H", len(name)) + name + content[start + 8 + length :])
    return folder


# Bits that count


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, *PACKED], ids=lambda syntax: syntax.keyword)
def test_an_overlay_in_unused_bits_is_no_part_of_the_pixels(tmp_path: Path, syntax: uid.UID, signed: bool) -> None:
    values = scan()

    def overlay(picture: np.ndarray) -> np.ndarray:
        picture &= 0x0FFF
        picture[OVERLAY] |= 0x1000
        return picture

    edit = pixels(overlay, syntax, BitsStored=12, HighBit=11)
    folder = write_series(tmp_path / "scan", values, rescale=(1, 0) if signed else (1, -1024), signed=signed, edit=edit)
    for path in folder.iterdir():  # written as if plain
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == uid.ExplicitVRLittleEndian
    parts = read(retagged(folder, syntax))
    np.testing.assert_array_equal(parts.array, values)
    assert parts.warnings == (BITS,)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, *PACKED], ids=lambda syntax: syntax.keyword)
def test_negative_numbers_of_twelve_bits(tmp_path: Path, syntax: uid.UID) -> None:
    """The sign is in bit 11 only, or repeated in the bits above."""
    for number, change in enumerate((lambda picture: picture & 0x0FFF, lambda picture: picture)):
        edit = pixels(change, syntax, BitsStored=12, HighBit=11)
        folder = write_series(tmp_path / str(number), scan(), rescale=(1, 0), signed=True, edit=edit)
        parts = read(retagged(folder, syntax))
        np.testing.assert_array_equal(parts.array, scan())
        assert parts.warnings == ()


def test_numbers_in_the_upper_bits(tmp_path: Path) -> None:
    def upper(picture: np.ndarray) -> np.ndarray:
        return picture << 4 | 5  # something in the lower ones

    edit = pixels(upper, uid.ExplicitVRLittleEndian, BitsStored=12, HighBit=15)
    parts = read(series(tmp_path / "upper", edit=edit))
    np.testing.assert_array_equal(parts.array, scan())
    edit = pixels(lambda picture: picture, uid.ExplicitVRLittleEndian, BitsStored=12, HighBit=15)
    parts = read(series(tmp_path / "lower", edit=edit))
    np.testing.assert_array_equal(parts.array, scan())
    assert len(parts.warnings) == 1 and "HighBit" in parts.warnings[0]


@pytest.mark.parametrize("dtype", ["u1", "u4"])
def test_numbers_of_other_sizes(tmp_path: Path, dtype: str) -> None:
    values = scan() % 200 if dtype == "u1" else scan().astype(np.int64) * 1000

    def other(item: Dataset, index: int) -> None:
        bits = 8 * np.dtype(dtype).itemsize
        item.BitsAllocated, item.BitsStored, item.HighBit = bits, bits, bits - 1
        item.PixelData = (values[index] + 1024 * 1000 * (dtype == "u4")).astype(f"<{dtype}").tobytes()

    parts = read(write_series(tmp_path / "scan", scan(), edit=other, rescale=(1, 0)))
    np.testing.assert_array_equal(parts.array, values + 1024 * 1000 * (dtype == "u4"))
    parts = read(write_series(tmp_path / "rescaled", scan(), edit=lambda i, k: (other(i, k), i.update({"RescaleIntercept": -1024}))[0]))
    np.testing.assert_array_equal(parts.array, values + 1024 * 1000 * (dtype == "u4") - 1024)


# Written otherwise than the file says


@pytest.mark.parametrize("padding", [b"", b"\0" * 8])
@pytest.mark.parametrize(("said", "written"), [(1, 0), (0, 1), (1, 2), (2, 1)])
def test_a_header_in_another_encoding_than_stated(tmp_path: Path, said: int, written: int, padding: bytes) -> None:
    """Implicit, explicit or big-endian: the first element shows it."""
    syntaxes = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)

    def pad(item: Dataset, index: int) -> None:
        item.PixelData += padding

    folder = series(tmp_path / "scan", syntaxes[written], edit=pad)
    parts = read(retagged(folder, syntaxes[said]))
    np.testing.assert_array_equal(parts.array, scan())


def test_an_odd_number_of_bytes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 200, (4, 7, 9))
    for syntax in (uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEGLSLossless):

        def narrow(item: Dataset, index: int) -> None:
            item.BitsAllocated, item.BitsStored, item.HighBit = 8, 8, 7
            item.PixelData = values[index].astype(np.uint8).tobytes() + b"\0"

        parts = read(write_series(tmp_path / syntax.keyword, values, rescale=(1, 0), edit=narrow, syntax=syntax))
        np.testing.assert_array_equal(parts.array, values)


@pytest.mark.parametrize("syntax", PACKED, ids=lambda syntax: syntax.keyword)
def test_plain_pixels_under_a_compressed_transfer_syntax(tmp_path: Path, syntax: uid.UID) -> None:
    parts = read(retagged(series(tmp_path / "scan"), syntax))
    np.testing.assert_array_equal(parts.array, scan())
    assert parts.warnings == (f"the header states {syntax.name} but the pixels are in no code, and are read so.",)


@pytest.mark.parametrize("syntax", PACKED, ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize("said", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000, uid.JPEGLSLossless, uid.JPEGExtended12Bit])
def test_compressed_pixels_under_another_transfer_syntax(tmp_path: Path, syntax: uid.UID, said: uid.UID) -> None:
    parts = read(retagged(series(tmp_path / "scan", syntax), said))
    np.testing.assert_array_equal(parts.array, scan())
    related = [("JPEG 2000", "High-Throughput JPEG 2000"), ("JPEG Extended", "JPEG Lossless")]
    alike = syntax == said or any(said.name.startswith(one) and syntax.name.startswith((one, other)) for one, other in related)
    assert (parts.warnings == ()) == alike, parts.warnings


@pytest.mark.parametrize("syntax", [f"1.2.840.10008.1.2.4.{number}" for number in (52, 53, 55, 57, 58, 65, 66, 70)])
def test_retired_transfer_syntaxes_of_jpeg(tmp_path: Path, syntax: str) -> None:
    parts = read(retagged(series(tmp_path / "scan", uid.JPEGLosslessSV1), syntax))
    np.testing.assert_array_equal(parts.array, scan())
    assert parts.warnings == ()


@pytest.mark.parametrize("predictor", range(1, 8))
def test_every_predictor_of_lossless_jpeg(tmp_path: Path, predictor: int) -> None:
    def pack(item: Dataset, index: int) -> None:
        picture = np.frombuffer(item.PixelData, "<u2").reshape(20, 30)
        item.PixelData = encapsulate([imagecodecs.jpeg8_encode(picture, lossless=True, bitspersample=16, predictor=predictor)])
        item["PixelData"].VR, item["PixelData"].is_undefined_length = "OB", True

    parts = read(retagged(series(tmp_path / "scan", edit=pack), uid.JPEGLossless))
    np.testing.assert_array_equal(parts.array, scan())


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        ("1.2.840.10008.1.2.4.100", "MPEG2 Main Profile / Main Level"),
        ("1.2.840.10008.1.2.4.107", "HEVC/H.265 Main Profile / Level 5.1"),
        ("1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.110"),
    ],
)
def test_an_unsupported_transfer_syntax_is_named(tmp_path: Path, syntax: str, name: str) -> None:
    def other(item: Dataset, index: int) -> None:
        item.PixelData = encapsulate([b"something that no code here knows"])
        item["PixelData"].VR, item["PixelData"].is_undefined_length = "OB", True

    refused(retagged(series(tmp_path, edit=other), syntax), f"10 of the DICOM slices are packed as {name}, which is not read; export")


def test_plain_pixels_in_an_unknown_transfer_syntax(tmp_path: Path) -> None:
    """Their byte order is unknown."""
    refused(retagged(series(tmp_path), "1.2.840.113619.5.2"), "a transfer syntax that is not known .1.2.840.113619.5.2.; export them")


@pytest.mark.parametrize("syntax", PACKED, ids=lambda syntax: syntax.keyword)
def test_unusual_fragments_of_a_compressed_picture(tmp_path: Path, syntax: uid.UID) -> None:
    """Trailing zeros, many fragments, no offset table, a wrong offset, no items at all, a defined length."""
    shapes: dict[str, Callable[[bytes], bytes]] = {
        "zeros": lambda packed: encapsulate([packed + b"\0" * 200]),
        "parts": lambda packed: encapsulate([packed], fragments_per_frame=4),
        "offset": lambda packed: b"\xfe\xff\x00\xe0\x04\0\0\0\x99\0\0\0" + encapsulate([packed], has_bot=False)[8:],
        "no end": lambda packed: encapsulate([packed]).removesuffix(b"\xfe\xff\xdd\xe0\0\0\0\0"),
    }
    if syntax != uid.RLELossless:  # which has no beginning of its own
        shapes["no table"] = lambda packed: encapsulate([packed], has_bot=False)[8:]
        shapes["bare"] = lambda packed: packed + b"\0" * (len(packed) % 2)
    for name, shape in shapes.items():

        def reshape(item: Dataset, index: int, shape: Callable[[bytes], bytes] = shape, bare: bool = name == "bare") -> None:
            picture = np.frombuffer(item.PixelData, "<u2").reshape(20, 30)
            item.PixelData = shape(encode(syntax, picture))
            item["PixelData"].VR, item["PixelData"].is_undefined_length = "OB", not bare

        parts = read(retagged(series(tmp_path / name, edit=reshape), syntax))
        np.testing.assert_array_equal(parts.array, scan(), err_msg=name)
        assert parts.warnings == (), name


def test_fewer_pixels_than_the_header_says(tmp_path: Path) -> None:
    def shorten(item: Dataset, index: int) -> None:
        item.PixelData = item.PixelData[:-100]
        item.ImageComments = "x" * 200  # the file is long enough

    refused(series(tmp_path, edit=shorten), "10 of the DICOM slices hold 1100 bytes of pixels, where Rows, .* make it 1200; export")


def test_only_damaged_files_are_called_damaged(tmp_path: Path) -> None:
    folder = series(tmp_path, uid.JPEGLosslessSV1)
    first, second, *_ = sorted(folder.iterdir())
    first.write_bytes(first.read_bytes()[:-200])
    rewrite(second, lambda item: item.update({"Rows": 21}))
    refused(folder, "1 of the DICOM slices (are damaged or cut short; copy them again|hold a packed picture of another size)")
    second.unlink()
    refused(folder, "1 of the DICOM slices are damaged or cut short; copy them again")


# Threads


def test_the_result_does_not_depend_on_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_series(tmp_path / "scan", scan(), syntax=uid.JPEGLSLossless)
    whole = write_enhanced(tmp_path / "whole.dcm", scan(), order=[3, 1, 4, 0, 5, 9, 2, 6, 8, 7], syntax=uid.RLELossless)
    found: list[Parts] = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(dicom_values, "threads", lambda threads=threads: threads)
        found += [read(folder), read(whole)]
    for parts in found:
        np.testing.assert_array_equal(parts.array, scan())
        assert parts.warnings == ()


def test_inputs_are_read_ahead_by_a_few_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_values, "threads", lambda: 3)
    taken = []

    def inputs() -> object:
        for number in range(100):
            taken.append(number)
            yield number

    results = dicom_values.in_order(lambda number: number**2, inputs())
    assert [next(results), next(results)] == [0, 1] and len(taken) <= 9
    assert list(results) == [number**2 for number in range(2, 100)]


def test_a_file_is_opened_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened once for the header and once for the pixels."""
    folder = series(tmp_path / "scan", uid.JPEGLSLossless)
    opened: list[str] = []
    import io
    import pathlib

    kept = io.open

    def watch(file: object, *arguments: object, **options: object) -> object:
        opened.append(str(file))
        return kept(file, *arguments, **options)

    for place in (io, pathlib.io, __builtins__ if isinstance(__builtins__, dict) else vars(__builtins__)):
        monkeypatch.setitem(place, "open", watch) if isinstance(place, dict) else monkeypatch.setattr(place, "open", watch)
    read(folder)
    assert sorted(opened.count(str(path)) for path in folder.iterdir()) == [2] * 10

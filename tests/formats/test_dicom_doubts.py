"""Doubtful or damaged DICOM, and DICOM that is no scan: one warning or error each."""

import os
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames

from med3dvlm.formats import dicom_header, dicom_pixels
from med3dvlm.volume import VolumeError, read_volume
from tests.formats.dicom_files import (
    COMPRESSORS,
    LOSSLESS,
    PYDICOM_FILES,
    SAGITTAL,
    move,
    read,
    refused,
    same_as_nifti,
    save,
    scan,
    turned,
    write_enhanced,
    write_plain_multiframe,
    write_series,
)

# Several series, and what is no scan


def test_the_largest_series_is_read_and_the_others_can_be_picked(tmp_path: Path) -> None:
    write_series(tmp_path, scan()[:4] + 1, turned(15), prefix="AA")
    write_series(tmp_path, scan())
    parts = read(tmp_path)
    np.testing.assert_array_equal(parts.array, scan())
    assert parts.series == ("1: 10 slices of 20 x 30, CT", "2: 4 slices of 20 x 30, CT")
    parts = read(tmp_path, series=2)
    same_as_nifti(parts, scan()[:4] + 1, turned(15), tmp_path)
    assert parts.series == ("2: 4 slices of 20 x 30, CT", "1: 10 slices of 20 x 30, CT")
    refused(tmp_path, "there is no series 3; choose one of 1: 10 slices of 20 x 30, CT; 2: 4 slices", series=3)
    refused(tmp_path, "there is no series 0", series=0)


def test_scans_of_two_patients_never_mix(tmp_path: Path) -> None:
    """Some anonymisers write the same UID everywhere."""
    write_series(tmp_path, scan(), prefix="A", edit=lambda item, _: item.update({"SeriesInstanceUID": "1.2.3", "PatientID": "1"}))
    write_series(tmp_path, scan()[:3] + 5, prefix="BB", edit=lambda item, _: item.update({"SeriesInstanceUID": "1.2.3", "PatientID": "2"}))
    parts = read(tmp_path)
    np.testing.assert_array_equal(parts.array, scan())
    assert "the scans found are of 2 patients." in parts.warnings


def test_other_images_are_left_out_with_a_warning(tmp_path: Path) -> None:
    write_series(tmp_path, scan())
    scout = np.ones((2, 40, 50), np.int16)
    write_series(
        tmp_path, scout, SAGITTAL, prefix="scout", edit=lambda item, _: setattr(item, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])
    )
    write_series(tmp_path, scan()[:1], turned(40), prefix="lone")
    write_series(tmp_path, np.arange(1200).reshape(2, 20, 30) % 200, prefix="capture", edit=secondary)
    for name in ("SC_rgb_jpeg.dcm", "rtdose.dcm", "liver_1frame.dcm"):
        (tmp_path / name).write_bytes((PYDICOM_FILES / name).read_bytes())
    parts = read(tmp_path)
    np.testing.assert_array_equal(parts.array, scan())
    assert len(parts.series) == 1 and len(parts.warnings) == 1
    for told in (
        "2 x scout",
        "2 x secondary capture",
        "1 x colour image",
        "1 x radiotherapy object (RTDOSE)",
        "1 x segmentation (SEG)",
        "1 x single image of another series",
    ):
        assert told in parts.warnings[0]


def secondary(item: Dataset, index: int) -> None:
    item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = uid.SecondaryCaptureImageStorage


def test_a_scan_of_secondary_captures_alone_is_read(tmp_path: Path) -> None:
    parts = read(write_series(tmp_path, scan(), edit=secondary))
    np.testing.assert_array_equal(parts.array, scan())
    assert parts.series == ("1: 10 slices of 20 x 30, CT, secondary capture",)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("SC_rgb_rle_2frame.dcm", "colour image"),
        ("examples_palette.dcm", "colour image"),
        ("liver_1frame.dcm", r"no scan here but 1 x segmentation \(SEG\)"),
        ("rtdose.dcm", r"no scan here but 1 x radiotherapy object \(RTDOSE\)"),
        ("rtstruct.dcm", "not a DICOM image"),
        ("test-SR.dcm", "not a DICOM image"),
        ("dicomdirtests/DICOMDIR", "not a DICOM image"),
        ("CT_small.dcm", r"2D image \(128x128\); give the folder"),
        ("JPGExtended.dcm", "1 x secondary capture"),
    ],
)
def test_files_that_are_no_scan_are_refused(name: str, match: str) -> None:
    refused(PYDICOM_FILES / name, match)


def test_four_dimensions_and_duplicates(tmp_path: Path) -> None:
    phases = np.concatenate([scan()[:5], scan()[:5] + 100])
    heights = [2.0 * (index % 5) for index in range(10)]
    refused(
        write_series(tmp_path / "phases", phases, edit=move(*heights)), "10 slices at 5 places are no single stack but a 4D series, 2 times"
    )
    heights = [0.0, 2.0, 4.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0]
    refused(write_series(tmp_path / "twice", scan(), edit=move(*heights)), "10 slices at 9 places are no single stack but duplicates")
    refused(write_enhanced(tmp_path / "time.dcm", scan(), order=[0, 1, 2, 0, 1, 2]), "6 slices at 3 places are no single stack but a 4D")
    film = write_plain_multiframe(tmp_path / "film.dcm", scan().astype(int) + 1024)
    item = pydicom.dcmread(film)
    item.FrameIncrementPointer, item.FrameTime = 0x00181063, 40
    save(item)
    refused(film, "1 x film")


def test_mixed_orientations(tmp_path: Path) -> None:
    def fan(item: Dataset, index: int) -> None:
        angle = np.deg2rad(18 * index)
        item.ImageOrientationPatient = [round(float(x), 6) for x in (np.cos(angle), np.sin(angle), 0, 0, 0, -1)]

    refused(write_series(tmp_path / "fan", scan(), edit=fan), "these are 10 single 2D images")

    def three(item: Dataset, index: int) -> None:
        item.ImageOrientationPatient = [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]][index % 3]
        item.ImagePositionPatient = [float(index)] * 3

    folder = write_series(tmp_path / "planes", scan(), edit=three)
    refused(folder, "one series mixes 3 orientations or sizes; choose one by series number, .* alone: 1: 4 slices")
    np.testing.assert_array_equal(read(folder, series=1).array, scan()[::3])


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_damaged_slices_are_counted(tmp_path: Path, syntax: uid.UID) -> None:
    values = np.random.default_rng(0).integers(-1000, 1900, (4, 70, 50)).astype(np.int16)
    path = sorted(write_series(tmp_path, values, syntax=syntax).iterdir())[2]
    whole = path.read_bytes()
    for length in (132, 300, 600, len(whole) // 2, len(whole) - 300):
        path.write_bytes(whole[:length])
        refused(tmp_path, "1 of the DICOM slices are damaged")


@pytest.mark.parametrize("left", ["empty", "zeros", "dangling"])
@pytest.mark.parametrize("names", ["shuffled", "nested"])
def test_slices_that_an_interrupted_copy_left_are_counted(tmp_path: Path, left: str, names: str) -> None:
    folder = write_series(tmp_path / "scan", scan(), names=names)
    (folder / "report.txt").touch()
    (folder / "._IM0003.dcm").write_bytes(b"a system's own")
    (folder / "latest").symlink_to("nowhere")
    np.testing.assert_array_equal(read(folder).array, scan())
    for path in sorted(path for path in folder.rglob("IM*") if path.is_file())[-3:]:
        content = {"empty": b"", "zeros": bytes(path.stat().st_size), "dangling": None}[left]
        path.unlink()
        if content is None:
            path.symlink_to(tmp_path / "gone")
        else:
            path.write_bytes(content)
    refused(folder, "3 of the DICOM slices are damaged or cut short")


def test_slices_without_a_preamble(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", scan())
    for path in sorted(folder.iterdir())[::2]:
        path.write_bytes(path.read_bytes()[132:])  # begins with the file's meta information
    np.testing.assert_array_equal(read(folder).array, scan())


def test_a_subfolder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_series(tmp_path / "scan", scan(), names="nested")
    scandir = os.scandir

    def forbidden(path: str) -> object:
        if os.fspath(path).endswith("2"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    refused(folder, r"something below cannot be read \(Permission denied\)")


def test_too_many_frames_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_series(tmp_path / "scan", scan())
    monkeypatch.setattr(dicom_header, "MAX_SLICES", 9)
    refused(folder, "more than 9 slices")


def test_native_frames_beyond_the_files_size(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", scan(), edit=lambda item, _: item.update({"NumberOfFrames": 3}))
    with pytest.raises(VolumeError, match="10 of the DICOM slices are damaged"):
        dicom_header.read_headers(folder, "scan")  # before any pixel is decoded


def test_a_deflated_file_is_not_unpacked_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_enhanced(tmp_path / "scan.dcm", scan(), syntax=uid.DeflatedExplicitVRLittleEndian)
    np.testing.assert_array_equal(read(path).array, scan())
    monkeypatch.setattr(dicom_pixels, "MAX_INFLATED", 2 * scan().size - 1)
    refused(path, "1 of the DICOM slices unpack to more than")


@pytest.mark.parametrize("syntax", list(COMPRESSORS), ids=lambda syntax: syntax.keyword)
def test_a_truncated_compressed_picture(tmp_path: Path, syntax: uid.UID) -> None:
    """The file itself is complete; JPEG libraries would fill up the rest with grey."""
    values = np.random.default_rng(0).integers(0, 250, (4, 70, 50)).astype(np.int16)

    def narrow(item: Dataset, index: int) -> None:
        if syntax == uid.JPEGBaseline8Bit:
            item.BitsAllocated = item.BitsStored = 8
            item.HighBit, item.PixelData = 7, values[index].astype(np.uint8).tobytes()

    path = sorted(write_series(tmp_path, values, rescale=(1, 0), syntax=syntax, edit=narrow).iterdir())[2]
    assert read(tmp_path).array.shape == (4, 70, 50)
    item = pydicom.dcmread(path)
    picture = next(generate_frames(item.PixelData, number_of_frames=1))
    for share in (0.3, 0.7, 0.95):
        item.PixelData = encapsulate([picture[: int(share * len(picture))]])
        item.save_as(path)
        refused(tmp_path, "1 of the DICOM slices are damaged")


def test_a_truncated_multiframe_file(tmp_path: Path) -> None:
    for syntax in (uid.ExplicitVRLittleEndian, uid.JPEGLSLossless):
        path = write_enhanced(tmp_path / "scan.dcm", scan(), syntax=syntax)
        path.write_bytes(path.read_bytes()[:-300])
        refused(path, "[1-9]0? of the DICOM slices are damaged")
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", "no DICOM images")


@pytest.mark.parametrize(
    "change",
    [
        {"Rows": 60000, "Columns": 60000},
        {"NumberOfFrames": 2_000_000_000},
        {"NumberOfFrames": 15_000},
        {"Rows": 0},
        {"BitsAllocated": 7},
    ],
    ids=str,
)
def test_headers_that_contradict_the_pixels(tmp_path: Path, change: dict[str, object]) -> None:
    folder = write_series(tmp_path, scan()[:2], edit=lambda item, _: item.update(change))
    start = time.process_time()
    refused(folder, "of the DICOM slices (are damaged|state .* frames of|have 7 bits)|voxels that are read")
    assert time.process_time() - start < 3


def test_an_invalid_orientation(tmp_path: Path) -> None:
    folder = write_series(tmp_path, scan(), edit=lambda item, _: item.update({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}))
    parts = read(folder)
    assert parts.axes is None and "no slice positions" in parts.warnings[0]


def test_a_compressed_picture_of_another_size_than_the_header(tmp_path: Path) -> None:
    def shrink(item: Dataset, index: int) -> None:
        if index == 1:
            item.Rows, item.PixelData = 10, item.PixelData[:600]

    for syntax in (uid.JPEGLSLossless, uid.JPEGLosslessSV1):
        folder = write_series(tmp_path / syntax.keyword, scan(), syntax=syntax, edit=shrink)
        odd = next(path for path in folder.iterdir() if pydicom.dcmread(path).Rows == 10)
        item = pydicom.dcmread(odd)
        item.Rows = 20
        item.save_as(odd)
        refused(folder, "1 of the DICOM slices hold a packed picture of another size")


@pytest.mark.parametrize(
    ("centre", "width", "window"),
    [
        (40, 400, (-160, 240)),
        ([50, -600], [350, 1500], (-125, 225)),  # the first of several
        ("40.5", "1", (40, 41)),
        (40, 0, None),
        (40, None, None),
    ],
)
def test_the_window_applies_to_rescaled_values(tmp_path: Path, centre: object, width: object, window: object) -> None:
    def edit(item: Dataset, _: int) -> None:
        item.WindowCenter, item.WindowWidth = centre, width

    folder = write_series(tmp_path / "scan", scan(), edit=edit)
    assert read_volume(folder).window == window
    assert (read_volume(folder).modality, len(read_volume(folder).series)) == ("CT", 1)
    plain = write_series(tmp_path / "plain", scan() + 1024, rescale=(1, 0), edit=edit)
    assert read_volume(plain, hu="csv", rescale=(1, -1024)).window is None  # it was meant for other values

"""Folders of numbered pictures: order, grey levels, warnings and refused files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from med3dvlm.volume import read_volume
from tests.formats.scans import SHAPE, refused


def grey(dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, SHAPE).astype(dtype)


def write(folder: Path, slices: np.ndarray, name: str = "{}.png", first: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(slices, start=first):
        Image.fromarray(picture).save(folder / name.format(number))
    return folder


@pytest.mark.parametrize("name", ["{}.png", "IMG_{:04d}.PNG", "series 3, slice {}.png", "{}_of_10.png"])
def test_slices_in_the_order_of_their_numbers(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "slices", grey(), name)
    (folder / "text.txt").write_text("study_findings: none")
    (folder / "._1.png").write_bytes(b"a system's own")
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array, grey())
    assert (volume.spacing, volume.orientation, volume.unit, volume.array.dtype) == (None, None, "arbitrary", np.int16)
    assert [text.split(";")[0] for text in volume.warnings] == ["the spacing is unknown", "the orientation is unknown"]
    assert read_volume(folder, spacing=(2.5, 0.8, 0.7)).spacing == (2.5, 0.8, 0.7)


def test_sixteen_bits(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_volume(write(tmp_path / "slices", grey(np.uint16))).array, grey(np.uint16))


def test_jpeg_stored_grey_or_as_colour(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(10), np.add.outer(np.arange(20), np.arange(30))).astype(np.uint8) * 3
    plain = read_volume(write(tmp_path / "grey", smooth, "{}.jpg"))
    coloured = read_volume(write(tmp_path / "colour", np.stack([smooth] * 3, axis=-1), "{}.jpeg"))
    assert np.abs(plain.array - smooth).max() <= 8 and np.abs(coloured.array - smooth).max() <= 8
    assert "10 of 10 pictures are stored in colour but show grey alone" in coloured.warnings[0]
    assert not any("colour" in warning for warning in plain.warnings)
    palette = tmp_path / "palette"
    palette.mkdir()
    for number, picture in enumerate(smooth):
        Image.fromarray(picture).convert("P").save(palette / f"{number}.png")
    np.testing.assert_array_equal(read_volume(palette).array, smooth)


def test_real_colour_is_refused(tmp_path: Path) -> None:
    colour = np.stack([grey()] * 3, axis=-1)
    colour[4, 3, 2] = (200, 30, 30)
    refused(write(tmp_path / "slices", colour), "picture 5 of 10, .*is in colour")


def test_other_sizes_are_left_out_and_gaps_give_a_warning(tmp_path: Path) -> None:
    folder = write(tmp_path / "slices", grey())
    for number, size in ((11, (21, 30)), (12, (20, 31))):
        Image.fromarray(np.zeros(size, np.uint8)).save(folder / f"{number}.png")
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array, grey())
    assert "2 of 12 pictures are not of the commonest size 20x30 and are left out" in volume.warnings[0]

    gap = write(tmp_path / "gap", grey())
    (gap / "4.png").unlink()
    assert "1 gap in the numbering of the 9 pictures; slices may be missing" in read_volume(gap).warnings[0]
    even = tmp_path / "even"
    even.mkdir()
    for number, picture in enumerate(grey()):
        Image.fromarray(picture).save(even / f"{2 * number}.png")
    assert not any("gap" in warning for warning in read_volume(even).warnings)


def test_names_without_an_order_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "words", grey())
    Image.fromarray(grey()[0]).save(folder / "overview.png")
    refused(folder, "1 of 11 pictures have no number in their name")
    twice = write(tmp_path / "twice", grey())
    Image.fromarray(grey()[0]).save(twice / "03.png")
    refused(twice, "two pictures have the same number")
    two = write(write(tmp_path / "two", grey()[:5], "a{}.png"), grey()[5:], "b{}.png")
    volume = read_volume(two)
    np.testing.assert_array_equal(volume.array, grey())
    assert "may be several series" in volume.warnings[0]


def test_pictures_that_are_no_scan_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "Secret Name", grey())
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:200])
    refused(folder, "picture 7 of 10, in the order of their numbers, cannot be read; it is damaged")
    (folder / "7.png").write_text("no picture")
    refused(folder, "picture 7 of 10")
    refused(write(tmp_path / "one", grey()[:1]), "2D image")
    mixed = write(write(tmp_path / "mixed", grey()[:5]), grey(np.uint16)[5:], first=6)
    refused(mixed, "some pictures have 8 bits and some 16")
    refused(write(tmp_path / "plain", grey()), "not DICOM", series=1)

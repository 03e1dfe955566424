"""Values that look like HU but are not, or that are HU on another scale, in several formats."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from med3dvlm.formats.base import Parts, VolumeError
from med3dvlm.formats.hu import interpret
from med3dvlm.formats.hu_values import Spread
from med3dvlm.volume import Volume, read_volume
from tests.formats.scans import refused, write_nifti
from tests.formats.test_hu import truth

FORMATS = ["scan.nii", "scan.nrrd", "scan.mha", "scan.npy"]


def write(path: Path, array: np.ndarray) -> Path:
    if path.suffix == ".nii":
        return write_nifti(path, array)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(array), path)
    return path


def head(shared_data: Path) -> np.ndarray:
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(shared_data / "head_ct.nii.gz")))
    return array[::5, ::4, ::4].astype(np.int16)


def warned(volume: Volume, words: str) -> None:
    assert any(words in text for text in volume.warnings), volume.warnings


# Rescaled twice, where no air in sight shows it


def masked(array: np.ndarray, kind: str) -> np.ndarray:
    """Return a scan in HU with masked air."""
    air = array < -200
    return {
        "to -1000": np.where(air, -1000, array),
        "to -1024": np.where(air, -1024, array),
        "to 0": np.where(air, 0, array),
        "soft tissue alone": np.where((array < -100) | (array > 200), -1024, array),
        "soft tissue on 0": np.where((array < -100) | (array > 200), 0, array),
    }[kind].astype(np.int16)


KINDS = ["to -1000", "to -1024", "to 0", "soft tissue alone", "soft tissue on 0"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_scan_rescaled_twice_gives_a_warning(shared_data: Path, tmp_path: Path, kind: str) -> None:
    for hu in (truth(), head(shared_data)):
        twice = masked(hu, kind) - np.int16(1024)
        for name in FORMATS:
            volume = read_volume(write(tmp_path / name, twice))
            assert volume.unit == "arbitrary"
            warned(volume, "rescaled twice")
        warned(read_volume(tmp_path / "scan.nii", unit="HU"), "rescaled twice")
        again = read_volume(tmp_path / "scan.nii", hu="csv", rescale=(1, 1024))  # as the warning says
        np.testing.assert_array_equal(again.array, masked(hu, kind))
        assert again.unit == "HU"

        parts = Parts(twice, modality="CT", rescale=(1.0, -1024.0), hu=True)  # as DICOM has it
        meaning = interpret(parts, "scan")
        assert meaning.unit == "arbitrary" and "state hu='already_hu' (--hu already_hu)" in meaning.warnings[0]
        followed = interpret(parts, "scan", "already_hu")
        assert followed.unit == "HU" and not any("twice" in text for text in followed.warnings)
        np.testing.assert_array_equal(followed.array, masked(hu, kind))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_scan_rescaled_once_gives_no_warning(shared_data: Path, kind: str | None) -> None:
    for hu in (truth(), truth(-2000), truth(-3024), head(shared_data)):
        array = hu if kind is None else masked(hu, kind)
        meaning = interpret(Parts(array, modality="CT", rescale=(1.0, -1024.0), hu=True), "scan")
        assert meaning.unit == "HU" and not any("twice" in text for text in meaning.warnings)


def test_a_crop_of_soft_tissue_rescaled_twice_gives_a_warning() -> None:
    tissue = np.random.default_rng(0).normal(40, 15, (6, 8, 10)).astype(np.int16) - np.int16(1024)
    assert interpret(Parts(tissue, modality="CT", rescale=(1.0, -1024.0), hu=True), "scan").unit == "arbitrary"
    assert interpret(Parts(tissue), "scan").unit == "arbitrary"


def test_single_extreme_values_decide_nothing() -> None:
    """A metal filling or a single voxel may determine the lowest and the highest value."""
    for low, high in ((-1000, 3000), (-1024, 3071), (-2000, 30000), (-32768, 32767)):
        raw = truth() + np.int16(1024)
        raw[0, 0, 0], raw[0, 0, 1] = low, high
        assert interpret(Parts(raw), "scan").unit == "arbitrary"
        assert interpret(Parts(raw, modality="CT", hu=True), "scan").unit == "arbitrary"


# Other scales


@pytest.mark.parametrize(
    ("made", "scale", "rescale"),
    [
        (lambda hu: hu + 1024, "HU + 1024", (1, -1024)),
        (lambda hu: (hu + 1024).astype(np.float32) + 0.25, "HU + 1024", (1, -1024)),
        (lambda hu: hu + 8192, "HU + 8192", (1, -8192)),
        (lambda hu: (hu + np.int32(32768)).astype(np.uint16), "HU + 32768", (1, -32768)),
        (lambda hu: hu - 1024, "HU - 1024", (1, 1024)),
        (lambda hu: hu.astype(np.int32) * 10, "10 x HU", (0.1, 0)),
        (lambda hu: np.rint(hu / 10).astype(np.int16), "HU / 10, percent of water", (10, 0)),
        (lambda hu: (hu / 1000).astype(np.float32), "HU / 1000", (1000, 0)),
        (lambda hu: (1 + hu / 1000).astype(np.float32), "attenuation with water at 1", (1000, -1000)),
    ],
)
@pytest.mark.parametrize("name", FORMATS)
def test_hu_on_another_scale_are_named_with_the_remedy(tmp_path: Path, name: str, made, scale: str, rescale: tuple[float, float]) -> None:
    path = write(tmp_path / name, made(truth()))
    volume = read_volume(path)
    assert volume.unit == "arbitrary"
    warned(volume, f"look like a CT in {scale}")
    warned(volume, f"state rescale=({rescale[0]:g}, {rescale[1]:g}) with hu='csv' (--rescale {rescale[0]:g},{rescale[1]:g} --hu csv)")
    again = read_volume(path, hu="csv", rescale=rescale)
    assert again.unit == "HU" and np.abs(again.array - truth()).max() <= (5 if "percent" in scale else 0.26)


def test_values_that_are_no_ct_have_no_scale() -> None:
    random = np.random.default_rng(0)
    for array in (random.normal(500, 150, (9, 9, 9)), random.integers(0, 256, (9, 9, 9)), random.random((9, 9, 9)), np.zeros((9, 9, 9))):
        assert Spread(array).scale is None
    assert Spread(truth()).scale is None  # it is HU


@pytest.mark.parametrize("name", FORMATS)
def test_negative_numbers_read_as_unsigned(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, truth().view(np.uint16))
    for wish in ({}, {"hu": "header"}, {"unit": "HU"}, {"rescale": (1, -1024)}):
        volume = read_volume(path, **wish)
        np.testing.assert_array_equal(volume.array, truth())
        assert volume.unit == "HU" and volume.array.dtype == np.int16
        warned(volume, "negative numbers that were written as unsigned ones")


def test_only_wrapped_numbers_become_negative() -> None:
    metal = (truth().astype(np.int32) + 1024) * 16  # reaches 65520, all the way
    noise = np.random.default_rng(0).integers(0, 65536, truth().shape)
    for array in (metal, noise, truth(), truth() + 1024):
        assert Spread(array).unwrapped(None) is None
    below = truth().astype(np.int32) + 1024  # a few voxels of air below -1024 in a header's unsigned numbers
    below[0, 0, :3] = 65530
    np.testing.assert_array_equal(np.sort(np.unique(Spread(below - 1024).unwrapped((1, -1024))))[:1], [-1030])


# Other quantities


@pytest.mark.parametrize("hu", [True, False])
def test_the_headers_quantity_counts_more_than_the_values(hu: bool) -> None:
    parts = Parts(truth(), modality="CT", hu=hu, quantity="ml/100ml/s")
    meaning = interpret(parts, "scan")
    assert meaning.unit == "arbitrary" and "the header says that the values are ml/100ml/s" in meaning.notes[-1]
    for wish in ({"unit": "HU"}, {"policy": "header"}, {"policy": "already_hu"}):
        overruled = interpret(parts, "scan", **wish)
        assert overruled.unit == "HU" and any("ml/100ml/s and no HU" in text for text in overruled.warnings)
    with pytest.raises(
        VolumeError,
        match="scan: the header says that the values are ml/100ml/s, yet .* the header with hu='csv' or 'already_hu' .--hu",
    ):
        interpret(parts, "scan", rescale=(1, -1024))
    raw = parts._replace(array=truth() + 1024)
    np.testing.assert_array_equal(interpret(raw, "scan", "csv", (1, -1024)).array, truth())


def test_a_stated_unit_is_not_questioned(tmp_path: Path) -> None:
    assert read_volume(write(tmp_path / "scan.nii", truth() - 1024), unit="arbitrary").warnings == ()
    refused(write(tmp_path / "scan.nii", truth() - 1024), "rescaled twice or not at all", unit="HU")

"""Hounsfield units: the choice of slope and intercept, its reasons, and values that cannot be HU.

The independent answer is `truth`, a chest-like scan in HU, and its stored form truth + 1024.
"""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from med3dvlm.volume import Volume, VolumeError, read_volume
from tests.formats.scans import MARKER, SHAPE, refused, scan, write_nifti

CT_RATE = (1.0, -1024.0)  # RescaleSlope, RescaleIntercept of its metadata


def truth(padding: int | None = None) -> np.ndarray:
    """Return noisy air, lung, soft tissue and bone in HU, with `padding` outside of the field of view."""
    random = np.random.default_rng(0)
    array = random.normal(-990, 10, SHAPE)
    array[1:9, 3:17, 4:26] = random.normal(40, 15, (8, 14, 22))
    array[2:8, 5:12, 6:14] = random.normal(-850, 30, (6, 7, 8))
    array[3:7, 13:15, 12:18] = random.normal(700, 100, (4, 2, 6))
    array = np.clip(np.rint(array), -1024, 3071).astype(np.int16)
    if padding is not None:
        array[:, :2], array[:, :, :3] = padding, padding
    return array


def nifti(path: Path, array: np.ndarray, slope: float, intercept: float) -> Path:
    """Write a NIfTI file by nibabel, then set slope and intercept in its header, NaN included."""
    write_nifti(path, array)
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    path.write_bytes(content)
    return path


# CT-RATE


@pytest.mark.parametrize("header", [(1.0, 0.0), (np.nan, np.nan), (0.0, 0.0)])
@pytest.mark.parametrize("padding", [None, -2000, -8192])
def test_both_versions_of_ct_rate_become_hu(tmp_path: Path, header: tuple[float, float], padding: int | None) -> None:
    """Version 1 holds stored values and a header without slope and intercept, version 2 holds HU; the table is the same."""
    hu = truth(padding)
    stored = truth(None if padding is None else padding + 1024) + np.int16(1024)
    if padding is not None:
        stored[hu == padding] = padding + 1024
    np.testing.assert_array_equal(stored - 1024, hu)
    first = read_volume(nifti(tmp_path / "v1.nii", stored, *header), rescale=CT_RATE)
    second = read_volume(nifti(tmp_path / "v2.nii", hu, *header), rescale=CT_RATE)
    for volume in (first, second):
        np.testing.assert_array_equal(volume.array, hu)
        assert (volume.unit, volume.array.dtype) == ("HU", np.int16)
        assert [text for text in volume.warnings if "padding" not in text] == []
    assert "the stated slope 1 and intercept -1024, which are applied" in first.notes[0]
    assert "HU already" in second.notes[0] and "intercept -1024 are not applied" in second.notes[0]


def test_raw_padding_of_minus_2000_is_not_air(tmp_path: Path) -> None:
    """GE scanners store padding as -2000 among unsigned values; the lowest value alone would say HU."""
    stored = truth() + np.int16(1024)
    stored[:, :2] = -2000
    volume = read_volume(write_nifti(tmp_path / "scan.nii", stored))
    assert volume.unit == "arbitrary" and any("un-rescaled" in text for text in volume.warnings)
    applied = read_volume(tmp_path / "scan.nii", rescale=CT_RATE)
    np.testing.assert_array_equal(applied.array, stored - 1024)
    assert applied.unit == "HU"


@pytest.mark.parametrize("padding", [-2000, -976])  # -976 is -2000 in HU, and as stored looks like air
def test_a_small_body_before_rescaling(tmp_path: Path, padding: int) -> None:
    """In a limb, air has about 24, and tissue, about 1064, is less than a tenth of the voxels."""
    stored = np.random.default_rng(0).normal(24, 8, (20, 40, 60)).astype(np.int16)
    stored[:, 18:24, 20:32] = np.random.default_rng(1).normal(1064, 20, (20, 6, 12)).astype(np.int16)
    stored[:, :, :8] = padding
    path = write_nifti(tmp_path / "limb.nii", stored)
    np.testing.assert_array_equal(read_volume(path, rescale=CT_RATE).array, stored - 1024)
    if padding == -2000:
        volume = read_volume(path)
        assert volume.unit == "arbitrary" and "no values lie near -1000" in volume.warnings[0]
    again = read_volume(write_nifti(tmp_path / "hu.nii", (stored - 1024).astype(np.int16)), rescale=CT_RATE)
    np.testing.assert_array_equal(again.array, stored - 1024)
    assert again.unit == "HU" and "HU already" in again.notes[0]


def test_a_slope_other_than_one(tmp_path: Path) -> None:
    stored = np.rint((truth() + 1000) / 0.5).astype(np.int16)
    volume = read_volume(write_nifti(tmp_path / "scan.nii", stored), rescale=(0.5, -1000))
    np.testing.assert_allclose(volume.array, truth(), atol=1e-3)


# The policies


def test_each_policy_takes_the_slope_and_intercept_that_it_names(tmp_path: Path) -> None:
    stored = (truth() + 1024).astype(np.int16)
    by_header = nifti(tmp_path / "header.nii", stored, 1, -1024)
    stale = nifti(tmp_path / "stale.nii", truth(), 1, -1024)  # HU, in the header of what it was made from
    fraction = nifti(tmp_path / "fraction.nii", truth(), 0.7, -1024.3)
    plain = write_nifti(tmp_path / "plain.nii", stored)
    for volume in (
        read_volume(by_header),
        read_volume(by_header, hu="header"),
        read_volume(by_header, rescale=CT_RATE),
        read_volume(plain, hu="csv", rescale=CT_RATE),
        read_volume(stale, hu="already_hu"),
        read_volume(fraction, hu="already_hu"),
        read_volume(by_header, unit="HU"),
    ):
        np.testing.assert_array_equal(volume.array, truth())
        assert (volume.unit, volume.array.dtype) == ("HU", np.int16)
    assert read_volume(by_header).notes[0] == "the header's slope 1 and intercept -1024 are applied."
    assert "no slope and intercept are applied" in read_volume(stale, hu="already_hu").notes[0]


def test_rescaling_twice_is_an_error(tmp_path: Path) -> None:
    stored = (truth() + 1024).astype(np.int16)
    refused(write_nifti(tmp_path / "hu.nii", truth()), "HU already and hu='csv' would rescale twice", hu="csv", rescale=CT_RATE)
    refused(nifti(tmp_path / "header.nii", stored, 1, -1024), "would rescale twice", hu="csv", rescale=CT_RATE)
    for wish in ({"hu": "header"}, {"unit": "HU"}):  # done once by whoever wrote the file, once by its stale header
        refused(nifti(tmp_path / "stale.nii", truth(), 1, -1024), "only .* lie within -1100..4000, so they were rescaled twice", **wish)
    assert read_volume(tmp_path / "stale.nii").unit == "arbitrary"
    once = read_volume(tmp_path / "hu.nii", hu="csv", rescale=(1, 0))  # changes nothing
    np.testing.assert_array_equal(once.array, truth())


@pytest.mark.parametrize("body", [np.clip(truth(), -150, 250), np.where((truth() > 0) & (truth() < 90), truth(), 0)])
def test_soft_tissue_is_not_rescaled_to_air(tmp_path: Path, body: np.ndarray) -> None:
    """Windowed HU, or a brain on a background of 0, do not reach air; rescaled again they would look like air and lung."""
    path = write_nifti(tmp_path / "body.nii", body.astype(np.int16))
    refused(path, "would turn it into air", hu="csv", rescale=CT_RATE)
    refused(path, "neither as stored .* nor after the stated", rescale=CT_RATE)
    np.testing.assert_array_equal(read_volume(path, hu="already_hu", rescale=CT_RATE).array, body)


def test_ambiguous_values_are_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(5000, 30000, SHAPE).astype(np.int16)
    refused(write_nifti(tmp_path / "noise.nii", noise), "neither as stored .* nor after the stated", rescale=CT_RATE)
    refused(nifti(tmp_path / "both.nii", noise, 0.5, 10), "choose the right ones with hu=", rescale=CT_RATE)


def test_contradicting_and_unknown_arguments(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "scan.nii", truth())
    refused(path, "hu is 'yes' but must be one of auto, header, csv, already_hu", hu="yes")
    refused(path, "hu='csv' needs the slope and intercept", hu="csv")
    refused(path, "unit 'arbitrary' contradicts", hu="header", unit="arbitrary")
    refused(path, "unit 'arbitrary' contradicts", rescale=CT_RATE, unit="arbitrary")
    for rescale in ((1.0,), (0.0, -1024.0), (np.nan, 0.0), (-1.0, 0.0)):
        refused(path, "two numbers", rescale=rescale)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (truth() + 1024, "the lowest is .*no air, fat or water|un-rescaled"),
        (np.clip(truth() + 1030, 1030, None) - 1030, None),  # the body alone: 0 where there was anything below
        (np.clip(truth() + 1024, 40, None) - 40, "un-rescaled"),
        ((truth() + 1024) / 4095, "within 0..1, so they were scaled"),
        (truth().astype(np.int32) * 100, "beyond what 16 bits hold"),
        (truth().astype(np.float32) * 10, "only .* lie within"),
        (np.abs(truth().astype(np.int32)) + 1, "the lowest is"),
    ],
)
def test_values_that_cannot_be_hu(tmp_path: Path, values: np.ndarray, reason: str | None) -> None:
    path = write_nifti(tmp_path / "scan.nii", values)
    for wish in ({"hu": "header"}, {"hu": "already_hu"}, {"unit": "HU"}):
        if reason is None:
            assert read_volume(path, **wish).unit == "HU"
        else:
            refused(path, f"as HU the values cannot be right: .*({reason})", **wish)
    if reason is not None:
        assert read_volume(path).unit != "HU"


# Without a wish


@pytest.mark.parametrize(
    ("low", "high", "unit", "warning"),
    [
        (-1000, 1000, "HU", None),
        (-200, 300, "arbitrary", "no values lie near -1000"),
        (-199, 300, "arbitrary", None),
        (-3024, 3071, "HU", "probably padding"),
        (-4096, 4095, "arbitrary", None),
        (0, 4095, "arbitrary", "un-rescaled"),
        (0, 255, "arbitrary", "segmentation"),
        (0, 1, "unit", "segmentation"),
        (-1, 1, "arbitrary", None),
    ],
)
def test_unit_rule(tmp_path: Path, low: int, high: int, unit: str, warning: str | None) -> None:
    array = np.full(SHAPE, (low + high) // 2, dtype=np.int16)
    array[0, 0, 0], array[MARKER] = low, high
    if low < -1000:
        array[1] = -1000
    volume = read_volume(write_nifti(tmp_path / "scan.nii", array))
    assert volume.unit == unit
    assert [warning in text if warning else text for text in volume.warnings] == ([True] if warning else [])
    assert len(volume.notes) == 1


def test_windowed_hu_count_as_hu_with_a_warning(tmp_path: Path) -> None:
    volume = read_volume(write_nifti(tmp_path / "scan.nii", np.clip(truth(), -500, 300)))
    assert volume.unit == "HU" and any("no values lie near -1000" in text for text in volume.warnings)
    assert read_volume(write_nifti(tmp_path / "air.nii", truth())).warnings == ()
    difference = np.random.default_rng(0).normal(0, 150, SHAPE).astype(np.int16)
    assert read_volume(write_nifti(tmp_path / "map.nii", difference)).unit == "arbitrary"


def test_large_scans_are_judged_by_a_sample(tmp_path: Path) -> None:
    array = np.tile(truth(), (8, 6, 6))  # 80 x 120 x 180, more than a million
    np.save(tmp_path / "scan.npy", array)
    assert read_volume(tmp_path / "scan.npy").unit == "HU"
    np.save(tmp_path / "scan.npy", array + np.int16(1024))
    volume = read_volume(tmp_path / "scan.npy", rescale=CT_RATE)
    np.testing.assert_array_equal(volume.array, array)


def test_segmentations_are_read_with_a_warning(tmp_path: Path) -> None:
    """A scan in coarse grey levels looks the same, so segmentations cannot be refused."""
    organs = (truth() > -500).astype(np.uint8) + (truth() > 300)
    many = (np.arange(10 * 40 * 60).reshape(10, 40, 60) // 200).astype(np.uint8)  # 120 labels, 200 voxels each
    noise = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
    for array, doubted in ((organs, True), (organs.astype(np.float32), True), (many, True), (noise, False), (scan(), False)):
        np.save(tmp_path / "scan.npy", array)
        volume = read_volume(tmp_path / "scan.npy")
        np.testing.assert_array_equal(volume.array, array)
        assert any("may be a segmentation" in text for text in volume.warnings) is doubted


def test_the_real_scan(shared_data: Path, tmp_path: Path) -> None:
    """A head CT in HU, stored as in CT-RATE's first version, gives the same voxels."""
    path = shared_data / "head_ct.nii.gz"
    volume = read_volume(path)
    assert volume.unit == "HU" and "of them within -1100..4000" in volume.notes[0]
    image = nibabel.load(path)
    stored = nibabel.Nifti1Image((np.asarray(image.dataobj) + 1024).astype(np.int16), image.affine)
    nibabel.save(stored, tmp_path / "v1.nii.gz")
    for name, note in ((path, "HU already"), (tmp_path / "v1.nii.gz", "which are applied")):
        again = read_volume(name, rescale=CT_RATE)
        np.testing.assert_array_equal(again.array, volume.array)
        assert note in again.notes[0] and again.unit == "HU"
    with pytest.raises(VolumeError, match="cannot be right"):
        read_volume(tmp_path / "v1.nii.gz", hu="already_hu")
    assert isinstance(volume, Volume)

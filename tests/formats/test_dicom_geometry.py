"""Positions of DICOM slices: order, distances, tilt, and incomplete headers."""

from pathlib import Path

import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from med3dvlm.volume import read_volume
from tests.formats.dicom_files import AFFINE, SAGITTAL, move, read, same_as_nifti, scan, turned, write_enhanced, write_series


def test_missing_slices_are_counted_and_placed(tmp_path: Path) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), only=[0, 1, 2, 3, 5, 6, 9]))
    np.testing.assert_array_equal(parts.array, scan()[[0, 1, 2, 3, 5, 6, 9]])
    np.testing.assert_allclose(np.linalg.norm(parts.axes, axis=0), (0.7, 0.8, 2.5))
    assert parts.slice_positions == pytest.approx((0, 2.5, 5, 7.5, 12.5, 15, 22.5))
    assert parts.warnings == ("3 of 10 slices seem to be missing (1 after slice 4, 2 after slice 6).",)


@pytest.mark.parametrize(
    "heights",
    [
        [0, 2, 4, 6, 8, 10, 12.7, 14.7, 16.7, 18.7],
        [0, 4, 8, 12, 16, 17.1, 24.1, 31.1, 38.1, 45.1],
        [0, 5, 10, 15, 20, 30, 40, 50, 60, 70],  # slabs of 5 and 10 mm, not slices of which some are missing
    ],
    ids=["one gap", "slabs", "slabs of twice the distance"],
)
def test_uneven_distances_keep_their_positions_and_the_stack_its_length(tmp_path: Path, heights: list[float]) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), edit=move(*heights)))
    np.testing.assert_array_equal(parts.array, scan())
    assert parts.slice_positions == pytest.approx(heights) and parts.warnings == ()
    assert 9 * np.linalg.norm(parts.axes[:, 2]) == pytest.approx(heights[-1])


def test_even_distances_need_no_positions(tmp_path: Path) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), edit=move(*(2 * k + 0.03 * (-1) ** k for k in range(10)))))
    assert parts.slice_positions is None and np.linalg.norm(parts.axes[:, 2]) == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize("degrees", [-18.5, 0.4, 18.5, 30])
def test_the_axis_of_the_slices_is_the_true_one_with_a_tilted_gantry(tmp_path: Path, degrees: float) -> None:
    """The table moves along z and the slices are turned about x."""
    angle = np.deg2rad(degrees)

    def tilt(item: Dataset, index: int) -> None:
        item.ImageOrientationPatient = [1, 0, 0, 0, round(float(np.cos(angle)), 9), round(float(np.sin(angle)), 9)]
        item.ImagePositionPatient = [-8, -10, 40 + 3 * index]

    parts = read(write_series(tmp_path / "tilt", scan(), edit=tilt))
    order = slice(None) if np.cos(angle) > 0 else slice(None, None, -1)
    np.testing.assert_array_equal(parts.array, scan()[order])
    wanted = [[-0.7, 0, 0], [0, -0.8 * np.cos(angle), 0], [0, 0.8 * np.sin(angle), 3]]  # columns lead along W, H, D in RAS
    np.testing.assert_allclose(parts.axes, wanted, atol=1e-5)


def test_one_shifted_slice_leaves_the_axis_as_it_is(tmp_path: Path) -> None:
    for odd in (0, 4, 9):
        parts = read(write_series(tmp_path / str(odd), scan(), edit=move(*[(8.0 * (i == odd), 0.5 * i, 2.0 * i) for i in range(10)])))
        assert parts.warnings == ("slices are shifted within their plane by up to 8.0 mm against each other, which is not corrected.",)
        np.testing.assert_allclose(parts.axes[:, 2], (0, -0.5, 2), atol=1e-6)


def test_slices_with_nearly_equal_orientations_are_one_stack(tmp_path: Path) -> None:
    random = np.random.default_rng(4)

    def jitter(item: Dataset, index: int) -> None:
        angle = np.deg2rad(random.uniform(-0.1, 0.1))
        item.ImageOrientationPatient = [round(float(x), 9) for x in (np.cos(angle), np.sin(angle), 0, -np.sin(angle), np.cos(angle), 0)]

    parts = read(write_series(tmp_path / "scan", scan(), edit=jitter))
    np.testing.assert_array_equal(parts.array, scan())
    np.testing.assert_allclose(np.linalg.norm(parts.axes, axis=0), (0.7, 0.8, 2.5), atol=1e-4)
    assert "the orientations of the slices differ from their mean by up to 0.1 degrees" in parts.warnings[0]


def test_slice_locations_replace_missing_positions(tmp_path: Path) -> None:
    def locate(item: Dataset, index: int) -> None:
        del item.ImagePositionPatient
        item.SliceLocation = 100 + 2.5 * index

    parts = read(write_series(tmp_path / "scan", scan(), edit=locate))
    np.testing.assert_array_equal(parts.array, scan())
    np.testing.assert_allclose(parts.axes, AFFINE[:3, :3], atol=1e-6)
    assert "SliceLocation is used instead, taken to grow towards the head" in parts.warnings[0]

    def lost(item: Dataset, index: int) -> None:
        locate(item, index)
        del item.ImageOrientationPatient

    parts = read(write_series(tmp_path / "lost", scan(), edit=lost))
    np.testing.assert_array_equal(parts.array, scan())
    assert parts.axes is None and parts.spacing == pytest.approx((2.5, 0.8, 0.7))


@pytest.mark.parametrize(
    "stated", [{"SpacingBetweenSlices": 2.5}, {"SliceThickness": 2.5}, {"SliceLocationVector": [2.5 * k for k in range(10)]}]
)
def test_frames_without_functional_groups_follow_the_first(tmp_path: Path, stated: dict[str, object]) -> None:
    def plain(item: Dataset) -> None:
        shared, frames = item.SharedFunctionalGroupsSequence[0], item.PerFrameFunctionalGroupsSequence
        item.ImagePositionPatient = frames[0].PlanePositionSequence[0].ImagePositionPatient
        item.ImageOrientationPatient = shared.PlaneOrientationSequence[0].ImageOrientationPatient
        item.PixelSpacing = shared.PixelMeasuresSequence[0].PixelSpacing
        item.RescaleSlope, item.RescaleIntercept = 1, -1024
        item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = uid.CTImageStorage
        item.update(stated)
        del item.SharedFunctionalGroupsSequence, item.PerFrameFunctionalGroupsSequence

    parts = read(write_enhanced(tmp_path / "scan.dcm", scan(), turned(20), edit=plain))
    same_as_nifti(parts, scan(), turned(20), tmp_path)
    assert len(parts.warnings) == 1 and "the position of its first frame alone" in parts.warnings[0]


def test_without_positions_instance_numbers_give_the_order(tmp_path: Path) -> None:
    def blind(item: Dataset, index: int) -> None:
        del item.ImagePositionPatient
        item.InstanceNumber, item.SpacingBetweenSlices = 100 - 3 * index, 2.5

    parts = read(write_series(tmp_path / "scan", scan(), edit=blind))
    np.testing.assert_array_equal(parts.array, scan()[::-1])
    assert parts.axes is None and parts.spacing == (2.5, 0.8, 0.7)
    assert parts.warnings == (
        "the DICOM files state no slice positions; the order of the slices is that of their instance and frame numbers.",
    )


def test_without_pixel_spacing(tmp_path: Path) -> None:
    def detector(item: Dataset, index: int) -> None:
        item.ImagerPixelSpacing = item.PixelSpacing
        del item.PixelSpacing

    parts = read(write_series(tmp_path / "scan", scan(), edit=detector))
    np.testing.assert_array_equal(parts.array, scan())
    assert (parts.axes, parts.spacing) == (None, None)
    np.testing.assert_allclose(parts.direction, np.diag([-1, -1, 1]))  # AFFINE's without its lengths
    assert len(parts.warnings) == 1 and "no PixelSpacing (ImagerPixelSpacing would be that of the detector" in parts.warnings[0]


def test_the_orientation_is_read_without_pixel_spacing(tmp_path: Path) -> None:
    def forget(item: Dataset, index: int) -> None:
        del item.PixelSpacing

    whole = read_volume(write_series(tmp_path / "whole", scan(), SAGITTAL))
    path = write_series(tmp_path / "scan", scan(), SAGITTAL, edit=forget)
    volume = read_volume(path, spacing=whole.spacing)
    assert volume.orientation == whole.orientation and volume.plane == "sagittal"
    np.testing.assert_allclose(volume.direction, whole.direction, atol=1e-6)
    np.testing.assert_array_equal(volume.array, whole.array)
    assert read_volume(path).spacing is None

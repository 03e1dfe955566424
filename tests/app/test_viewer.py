"""The viewer against nibabel's reorientation and hand-worked pictures."""

import html
import itertools
import sys
from pathlib import Path

import nibabel.orientations
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "app"))

from viewer import LONGEST_SIDE, WINDOWS, default_window, describe, display_planes, escape, slice_count

from med3dvlm.volume import Volume

ORIENTATIONS = ["".join(o) for axes in itertools.permutations(("LR", "PA", "IS")) for o in itertools.product(*axes)]


def volume_of(array: np.ndarray, orientation: str | None = "IPL", **more: object) -> Volume:
    return Volume(array, **{"spacing": (1.0, 1.0, 1.0), "orientation": orientation, "unit": "arbitrary", **more})


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_is_shown_as_a_radiologist_looks_at_it(orientation: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, (10, 20, 30)).astype(np.int16)
    array.flat[:2] = 0, 255  # so that the default window leaves the values as they are
    volume = volume_of(array, orientation)
    axes = nibabel.orientations.axcodes2ornt(tuple(orientation))
    ras = nibabel.orientations.apply_orientation(array, axes)  # (X, Y, Z) growing to right, anterior, superior

    planes = display_planes(volume)

    # the first slices are the most superior, the most anterior and the rightmost one
    expected = {"axial": ras[::-1, ::-1, -1].T, "coronal": ras[::-1, -1, ::-1].T, "sagittal": ras[-1, ::-1, ::-1].T}
    for name, picture in expected.items():
        np.testing.assert_array_equal(planes[name][0], picture)
        assert planes[name][0].dtype == np.uint8
    counts = [len(planes[name]) for name in ("axial", "coronal", "sagittal")]
    assert counts == [slice_count(volume, name) for name in planes] == list(ras.shape[::-1])


def test_a_ball_is_round_in_every_plane_whatever_the_spacing() -> None:
    spacing = np.array([4.0, 0.9, 1.7])
    z, y, x = np.indices((21, 91, 51)) - np.array([10, 45, 25]).reshape(3, 1, 1, 1)
    ball = (spacing[0] * z) ** 2 + (spacing[1] * y) ** 2 + (spacing[2] * x) ** 2 < 30**2
    volume = volume_of(ball.astype(np.int16), "SPL", spacing=tuple(spacing))

    for name, slices in display_planes(volume).items():
        inside = slices[len(slices) // 2] > 127
        height, width = np.ptp(np.nonzero(inside.any(1))[0]) + 1, np.ptp(np.nonzero(inside.any(0))[0]) + 1
        assert abs(height - width) <= 0.06 * height, name  # half a coarse voxel at either end
        assert inside.sum() == pytest.approx(np.pi / 4 * height * width, rel=0.05)


def test_a_picture_has_the_proportions_of_the_patient_and_a_bounded_size() -> None:
    array = np.random.default_rng(1).normal(size=(10, 20, 30)).astype(np.float32)
    planes = display_planes(volume_of(array, "SPL", spacing=(5.0, 0.5, 1.0)))
    assert {name: planes[name][3].shape for name in planes} == {
        "axial": (20, 60),  # 10 x 30 mm, pixels of 0.5 mm
        "coronal": (50, 30),
        "sagittal": (100, 20),
    }
    huge = display_planes(volume_of(array, "SPL", spacing=(500.0, 0.01, 0.01)))["coronal"][0]
    assert huge.shape == (LONGEST_SIDE, 1)


def test_windows() -> None:
    ramp = np.array([-1000, -160, 40, 240, 1000, 0], dtype=np.int16).reshape(1, 2, 3).repeat(2, 0)
    ct = volume_of(ramp, unit="HU")
    np.testing.assert_array_equal(display_planes(ct)["axial"][0], [[0, 0, 128], [255, 255, 102]])
    brain = display_planes(ct, WINDOWS["Brain"])["axial"][0]
    np.testing.assert_array_equal(brain, [[0, 0, 128], [255, 255, 0]])
    assert default_window(ct) == (-160, 240)
    assert default_window(volume_of(ramp)) == (-1000, 1000)
    assert display_planes(volume_of(ramp))["axial"][0].min() == 0
    assert display_planes(volume_of(ramp))["axial"][0].max() == 255
    assert all(low < high for low, high in WINDOWS.values())


def test_a_volume_without_geometry_is_shown_as_stored() -> None:
    array = np.arange(10 * 20 * 30, dtype=np.int16).reshape(10, 20, 30)
    volume = Volume(array)
    picture = display_planes(volume, (0, 255 * 1000))["axial"][9]
    np.testing.assert_array_equal(picture, np.round(array[9] / 1000))
    assert slice_count(volume, "sagittal") == 30
    assert "shown as stored" in html.unescape(describe(volume))


def test_description_states_what_was_read_and_nothing_that_acts_or_identifies() -> None:
    array = np.zeros((10, 20, 30), np.int16)
    array[0, 0, 0] = 700
    tilt = np.array([[0, 0, -1], [np.sin(0.2), -np.cos(0.2), 0], [np.cos(0.2), np.sin(0.2), 0]], dtype=float)
    volume = Volume(
        array,
        spacing=(1.5, 0.75, 0.75),
        orientation="SPL",
        direction=tilt,
        unit="HU",
        source="/tmp/secret/<img src=x onerror=alert(1)> ![a](b) | *x*.nii",
        warnings=("The slices | are <b>uneven</b>.",),
    )
    table = describe(volume)
    text = html.unescape(table)
    for fact in ("10 × 20 × 30", "1.5 × 0.75 × 0.75 mm", "15 × 15 × 22 mm", "SPL, axial slices, tilted by 11°"):
        assert fact in text
    for fact in ("Hounsfield units", "0 to 700", "The slices | are <b>uneven</b>."):
        assert fact in text
    assert "secret" not in text
    assert not set("<>![]*") & set(table)
    assert all(line.count("|") == 3 for line in table.splitlines())
    assert escape("a\n|b") == "a &#124;b"

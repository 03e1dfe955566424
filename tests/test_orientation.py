"""Display axes of every orientation against nibabel, and pictures of slices."""

from itertools import permutations, product

import nibabel
import numpy as np
import pytest

from med3dvlm.geometry.orientation import direction_of, for_screen, is_orientation, nearest_letters, slice_axes
from med3dvlm.plots.slices import draw_slice, grey

ORIENTATIONS = ["".join(letters) for pairs in permutations(("LR", "AP", "IS")) for letters in product(*pairs)]
VOXELS = np.arange(2 * 3 * 4).reshape(2, 3, 4)


@pytest.mark.parametrize("letters", ORIENTATIONS)
def test_scans_are_reoriented_for_display(letters: str) -> None:
    assert is_orientation(letters) and nearest_letters(direction_of(letters)) == letters
    order, flips = for_screen(letters)
    shown = VOXELS.transpose(order)[flips]
    codes = (nibabel.orientations.axcodes2ornt(tuple(one)) for one in (letters, "IPL"))
    np.testing.assert_array_equal(shown, nibabel.orientations.apply_orientation(VOXELS, nibabel.orientations.ornt_transform(*codes)))
    for cut in range(3):
        down, across, turned_down, turned_across = slice_axes(cut, letters)
        assert letters[down] in "IS" or letters[across] in "LR"  # head and feet are above each other, left and right beside
        assert letters[down] in ("SA" if turned_down else "IP") and letters[across] in ("RA" if turned_across else "LP")
        picture = np.take(VOXELS, 0, cut).transpose() if down > across else np.take(VOXELS, 0, cut)
        picture = picture[:: -1 if turned_down else 1, :: -1 if turned_across else 1]
        place = order.index(cut)
        np.testing.assert_array_equal(np.take(shown, -1 if flips[place].step == -1 else 0, place), picture)


def test_a_scan_of_unknown_orientation_is_unchanged() -> None:
    assert for_screen(None) == for_screen("IPL") == ((0, 1, 2), (slice(None, None, 1),) * 3)
    assert slice_axes(1, None) == (0, 2, False, False)
    assert not any(map(is_orientation, ("SP", "SSL", "spl", "SPX", "")))


def test_pictures_of_slices_have_true_proportions() -> None:
    values = np.array([[-200.0, -100.0, 0.0], [100.0, 101.0, 300.0]])
    assert grey(values, (-100, 100)).tolist() == [[0, 0, 128], [255, 255, 255]]  # 127.5 to the even number
    assert draw_slice(values, (-100, 100), (2.0, 1.0), 100).size == (3, 4)
    assert draw_slice(np.zeros((40, 30)), (0, 1), (1.0, 1.0), 20).size == (15, 20)

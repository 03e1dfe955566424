"""Volume, longest diameter, bounding box and side of masks, by plain loops and on shapes of known size."""

import itertools
import math

import numpy as np
import pytest

from med3dvlm import Volume
from med3dvlm.geometry.measurements import (
    VoxelPositions,
    body_middle,
    bounding_box,
    components,
    extent_mm,
    longest_diameter_mm,
    side_of,
    volume_ml,
)

SHAPE = (12, 17, 23)


def oblique() -> VoxelPositions:
    a, b = math.radians(25), math.radians(-15)
    about_x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    about_z = np.array([[math.cos(b), -math.sin(b), 0], [math.sin(b), math.cos(b), 0], [0, 0, 1]])
    axes = about_z @ about_x @ np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]], float)
    return VoxelPositions(np.array([5.0, -7.0, 11.0]), axes * (2.5, 1.1, 0.8), np.arange(SHAPE[0], dtype=float))


def uneven() -> VoxelPositions:
    slices = np.cumsum([0, *[1.0] * 6, *[1.8] * 5])
    return VoxelPositions(np.zeros(3), np.array([[0, 0, -0.9], [0.4, -1.2, 0], [2, 0, 0]]), slices)  # sheared, too


@pytest.mark.parametrize("positions", [oblique(), uneven()], ids=["oblique", "uneven and sheared"])
@pytest.mark.parametrize("share", [0.004, 0.02])
@pytest.mark.parametrize("seed", [0, 1])
def test_by_plain_loops(positions: VoxelPositions, share: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random(SHAPE) < share
    mask[4:6, 5:9, 6:8] = True
    voxels = [tuple(map(int, voxel)) for voxel in np.argwhere(mask)]

    def middle(voxel: tuple[int, ...]) -> np.ndarray:
        return (
            positions.origin
            + positions.slices[voxel[0]] * positions.steps[:, 0]
            + voxel[1] * positions.steps[:, 1]
            + voxel[2] * positions.steps[:, 2]
        )

    groups: list[list[tuple[int, ...]]] = []  # voxels that share a corner, by filling
    left = set(voxels)
    while left:
        group, front = [], [left.pop()]
        while front:
            one = front.pop()
            group.append(one)
            near = {other for other in left if max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1}
            left -= near
            front += near
        groups.append(group)
    longest = 0.0
    for group in groups:
        faces = [middle(voxel) + sign / 2 * positions.steps[:, axis] for voxel in group for axis in range(3) for sign in (-1, 1)]
        longest = max(longest, *(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(faces, 2)))
    assert longest_diameter_mm(mask, positions) == pytest.approx(longest, abs=1e-9)
    assert sorted(map(len, groups), reverse=True) == [int(part.sum()) for part in components(mask)]
    np.testing.assert_array_equal(np.sum(components(mask), axis=0), mask)

    total = 0.0
    for voxel in voxels:
        number = voxel[0]
        ends = [positions.slices[max(number - 1, 0)], positions.slices[number], positions.slices[min(number + 1, SHAPE[0] - 1)]]
        thick = (ends[2] - ends[0]) / (2 if 0 < number < SHAPE[0] - 1 else 1)
        total += thick * abs(float(np.dot(positions.steps[:, 0], np.cross(positions.steps[:, 1], positions.steps[:, 2])))) / 1000
    assert volume_ml(mask, positions) == pytest.approx(total, rel=1e-9)

    corners = [middle(voxel) + positions.steps @ np.array(signs) / 2 for voxel in voxels for signs in itertools.product((-1, 1), repeat=3)]
    low, high = extent_mm(mask, positions)
    np.testing.assert_allclose(low, np.min(corners, axis=0), atol=1e-9)
    np.testing.assert_allclose(high, np.max(corners, axis=0), atol=1e-9)
    assert bounding_box(mask) == (
        tuple(min(voxel[axis] for voxel in voxels) for axis in range(3)),
        tuple(max(voxel[axis] for voxel in voxels) + 1 for axis in range(3)),
    )


def test_a_ball_a_row_and_a_voxel() -> None:
    """A radius of 20 mm gives 33.5 ml and 40 mm, to a voxel; a row of n voxels has n edges; a single voxel its longest edge."""
    positions = VoxelPositions(np.zeros(3), np.diag([1.5, 1.0, 0.8]), np.arange(34.0))
    index = np.indices((34, 50, 62))
    distance = np.sqrt(sum(((index[axis] - middle) * positions.steps[axis, axis]) ** 2 for axis, middle in enumerate((16, 25, 31))))
    ball = distance <= 20
    assert volume_ml(ball, positions) == pytest.approx(4 / 3 * math.pi * 8, rel=0.01)
    assert longest_diameter_mm(ball, positions) == pytest.approx(40, abs=1.5)
    row = np.zeros(ball.shape, bool)
    row[3, 4, 5:15] = True
    assert longest_diameter_mm(row, positions) == pytest.approx(10 * 0.8)
    row[3, 4, 6:] = False
    assert longest_diameter_mm(row, positions) == pytest.approx(1.5)
    assert longest_diameter_mm(~row & row, positions) == 0 and bounding_box(~row & row) is None and extent_mm(~row & row, positions) is None


@pytest.mark.parametrize("letters", ["SPL", "SPR", "LIP", "AIR"])
def test_sides_are_those_of_the_patient(letters: str) -> None:
    """For an off-centre body in any orientation, left is the patient's left of the body's mid-plane."""
    shown = np.full((20, 30, 40), -1000, np.int16)  # S, P, L
    shown[:, 4:26, 12:38] = 0  # the mid-plane lies at 24.5, right of it 12 to 24, left 25 to 37
    boxes = {
        "left": [np.s_[5:9, 10:14, 27:31]],
        "right": [np.s_[5:9, 10:14, 20:24]],  # left of the picture's own middle
        "both": [np.s_[5:9, 10:14, 16:20], np.s_[5:9, 10:14, 30:34]],
        "midline": [np.s_[5:9, 10:14, 22:29]],
    }
    from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform

    moves = ornt_transform(axcodes2ornt("SPL"), axcodes2ornt(letters))
    volume = Volume(apply_orientation(shown, moves).copy(), (1.5, 1.2, 0.9), letters, unit="HU")
    middle = body_middle(volume.array, volume.voxel_positions, True)
    for side, parts in boxes.items():
        mask = np.zeros(shown.shape, bool)
        for part in parts:
            mask[part] = True
        turned = np.ascontiguousarray(apply_orientation(mask, moves))
        assert side_of(turned, volume.voxel_positions, middle) == side
    assert side_of(np.zeros(volume.shape, bool), volume.voxel_positions, middle) is None


def test_positions_agree_with_the_affine_and_with_uneven_slices() -> None:
    positions = oblique()
    volume = Volume(
        np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16),
        (2.5, 1.1, 0.8),
        "SPL",
        positions.steps / (2.5, 1.1, 0.8),
        "HU",
        origin=positions.origin,
    )
    voxels = np.array([[0, 0, 0], [3, 5, 7], [11, 2, 20]])
    np.testing.assert_allclose(volume.voxel_positions.at(voxels), (np.c_[voxels, np.ones(3)] @ volume.affine.T)[:, :3], atol=1e-9)
    heights = np.cumsum([0, *[2.0] * 5, *[3.0] * 6])
    slabs = Volume(volume.array, (2.5, 1.1, 0.8), "SPL", volume.direction, "HU", origin=positions.origin, slice_positions=tuple(heights))
    np.testing.assert_allclose(np.linalg.norm(slabs.voxel_positions.at(np.array([[9, 0, 0]])) - positions.origin), heights[9], atol=1e-9)
    assert Volume(volume.array, (2.5, 1.1, 0.8)).voxel_positions is None

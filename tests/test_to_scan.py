"""From a model's grid back to the scan: a ball at a position in mm returns there after preprocessing."""

import itertools
import math
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from med3dvlm import Volume, VolumeProcessor, read_volume

SHAPE, SPACING = (26, 34, 42), (2.5, 1.2, 1.0)  # (D, H, W)
CENTRE, RADIUS = np.array([7.0, -11.0, 5.0]), 8.0  # mm in RAS
HALFWAY = {
    "m3d": (1040 + 1900) / 2 / 1900,
    "hu_window": (1040 + 1900) / 2 / 2000,
    "ct_rate": 0.47,
}  # between the body's 40 and the ball's 900 HU
PROCESSORS = {
    "m3d, upsampled": {"recipe": "m3d", "size": (52, 68, 84)},
    "hu_window, other proportions": {"recipe": "hu_window", "size": (24, 40, 30), "resize": "trilinear"},
    "ct_rate, padded": {"recipe": "ct_rate", "size": (60, 64, 60), "spacing": (1.5, 0.9, 0.9)},
    "ct_rate, cropped": {"recipe": "ct_rate", "size": (22, 25, 23), "spacing": (1.5, 1.1, 1.1)},
    "ct_rate, coarser": {"recipe": "ct_rate", "size": (20, 26, 20), "spacing": (3.1, 2.0, 1.7)},
}


def turned(degrees: float) -> np.ndarray:
    """Return a rotation about x and then about z."""
    a, b = math.radians(degrees), math.radians(degrees / 2)
    about_x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    about_z = np.array([[math.cos(b), -math.sin(b), 0], [math.sin(b), math.cos(b), 0], [0, 0, 1]])
    return about_z @ about_x


def directions(letters: str, degrees: float = 0.0) -> np.ndarray:
    """Return 3x3 columns D, H, W: axes towards the letters, then turned."""
    ends = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    return turned(degrees) @ np.array([ends[letter] for letter in letters], float).T


def drawn(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return HU of a body with a bright ball at positions (D, H, W, 3) in mm, and the ball's mask. The body ends within the volume."""
    ball = np.linalg.norm(places - CENTRE, axis=-1) <= RADIUS
    body = np.zeros(ball.shape, bool)
    body[2:-1, 3:-4, 2:-5] = True
    return np.where(ball, 900, np.where(body, 40, -1000)).astype(np.int16), ball


def affine_of(columns: np.ndarray) -> np.ndarray:
    """Return an affine of (D, H, W) that puts the ball near the centre of the volume."""
    affine = np.eye(4)
    affine[:3, :3] = columns * SPACING
    affine[:3, 3] = CENTRE - affine[:3, :3] @ (np.array(SHAPE) * (0.45, 0.52, 0.55))
    return affine


def places_of(affine: np.ndarray) -> np.ndarray:
    return np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1) @ affine[:3, :3].T + affine[:3, 3]


def check(found: np.ndarray, places: np.ndarray, processor: VolumeProcessor, steps: np.ndarray) -> None:
    """Assert that voxels at least a step of the coarser grid away from the ball's surface are right, and the centre to half a voxel.

    Args:
        steps: mm of a voxel of the model along each axis of the scan.
    """
    distance = np.linalg.norm(places - CENTRE, axis=-1)
    margin = float(np.linalg.norm(np.maximum(steps, SPACING)) / 2) + 0.3  # half the diagonal of a voxel
    assert found[distance < RADIUS - margin].all()
    assert not found[distance > RADIUS + margin].any()
    middle = places[found].mean(axis=0)
    assert np.abs(middle - CENTRE).max() < 0.5 * max(*steps, *SPACING), processor


@pytest.mark.parametrize("settings", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize(("letters", "degrees"), [("SPL", 0), ("IAR", 0), ("PSR", 0), ("LIP", 0), ("SAL", 22), ("AIL", 17)])
def test_a_ball_returns_to_its_position(settings: dict[str, Any], letters: str, degrees: float, tmp_path: Path) -> None:
    """Scans on disk are flipped, swapped, oblique and anisotropic; positions in mm are by the file's affine as nibabel reads it."""
    affine = affine_of(directions(letters, degrees))
    array, _ = drawn(places_of(affine))
    stored = affine[:, [2, 1, 0, 3]]  # NIfTI has (x, y, z)
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), stored), tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz", unit="HU")
    processor = VolumeProcessor(**settings)
    made = processor.transform(volume)[0]
    found = processor.to_scan(made > HALFWAY[processor.recipe], volume)
    assert found.dtype == torch.bool and found.shape == SHAPE
    image = nibabel.load(tmp_path / "scan.nii.gz")
    indices = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    places = nibabel.affines.apply_affine(image.affine, indices[..., ::-1])
    steps = np.abs(processor.placement(volume)[:3, :3]).sum(axis=1) * SPACING
    check(found.numpy(), places, processor, steps)
    soft = processor.to_scan(made[None, None], volume)  # scores, with two axes more
    assert soft.shape == (1, 1, *SHAPE)
    check((soft[0, 0] > HALFWAY[processor.recipe]).numpy(), places, processor, steps)


@pytest.mark.parametrize("settings", list(PROCESSORS.values())[1:4], ids=list(PROCESSORS)[1:4])
@pytest.mark.parametrize("case", ["tilted", "tilted the other way", "uneven", "tilted and uneven"])
def test_masks_of_straightened_scans_lie_on_the_stored_slices(settings: dict[str, Any], case: str) -> None:
    columns = directions("SPL", 5)
    if "tilted" in case:
        lean = columns[:, 0] + (-0.25 if "other" in case else 0.35) * columns[:, 1] + 0.1 * columns[:, 2]
        columns = np.stack([lean / np.linalg.norm(lean), columns[:, 1], columns[:, 2]], axis=1)
    heights = None
    affine = affine_of(columns)
    places = places_of(affine)
    if "uneven" in case:
        heights = np.cumsum([0.0, *[2.0] * 10, *[3.0] * 15])
        normal = np.cross(columns[:, 1], columns[:, 2])
        rise = heights / abs(normal @ columns[:, 0])
        for number in range(SHAPE[0]):  # along the D axis to the slice's height
            places[number] += (rise[number] - SPACING[0] * number) * columns[:, 0]
    array, _ = drawn(places)
    volume = Volume(array, SPACING, "SPL", columns, "HU", slice_positions=None if heights is None else tuple(heights))
    assert not volume.regular
    processor = VolumeProcessor(**settings, straighten=True)
    made = processor.transform(volume)[0]
    found = processor.to_scan(made > HALFWAY[processor.recipe], volume)
    straight = volume.straighten()
    steps = np.abs(processor.placement(straight)[:3, :3]).sum(axis=1) * np.array(straight.spacing)
    assert found.shape == SHAPE
    check(found.numpy(), places, processor, np.maximum(steps, (3.0, *SPACING[1:])))  # slices are up to 3 mm apart


@pytest.mark.parametrize("settings", PROCESSORS.values(), ids=PROCESSORS)
def test_by_plain_loops(settings: dict[str, Any]) -> None:
    """Random voxels: linear between eight voxels for real numbers, nearest for whole ones, 0 outside."""
    array, _ = drawn(places_of(affine_of(directions("AIL"))))
    volume = Volume(array, SPACING, "AIL", unit="HU")
    processor = VolumeProcessor(**settings)
    generator = np.random.default_rng(0)
    values = generator.random(processor.size)
    labels = generator.integers(0, 200, processor.size)
    inverse = np.linalg.inv(processor.placement(volume))
    soft, hard = processor.to_scan(values, volume), processor.to_scan(labels, volume)
    assert soft.dtype == torch.float64 and hard.dtype == torch.int64
    size, inside = np.array(processor.size), 0
    for voxel in generator.integers(0, SHAPE, (300, 3)):
        place = (inverse @ [*voxel, 1])[:3]
        if (place < -0.5 - 1e-9).any() or (place > size - 0.5 + 1e-9).any():
            assert soft[tuple(voxel)] == hard[tuple(voxel)] == 0
            continue
        inside += 1
        place = np.clip(place, 0, size - 1)
        expected = 0.0
        for corner in itertools.product((0, 1), repeat=3):
            index = np.minimum(np.floor(place).astype(int) + corner, size - 1)
            share = np.abs(1 - np.array(corner) - (place - np.floor(place)))
            expected += float(np.prod(share)) * values[tuple(index)]
        assert abs(float(soft[tuple(voxel)]) - expected) < 1e-4
        if np.abs(place % 1 - 0.5).min() > 1e-3:  # else two are as near
            assert hard[tuple(voxel)] == labels[tuple(np.rint(place).astype(int))]
    assert inside > 20


def test_empty_masks_and_wrong_shapes() -> None:
    array, _ = drawn(places_of(affine_of(directions("SPL"))))
    volume = Volume(array, SPACING, "SPL", unit="HU")
    processor = VolumeProcessor("m3d", size=(12, 10, 14))
    assert not processor.to_scan(torch.zeros(2, 12, 10, 14), volume).any()
    with pytest.raises(ValueError, match=r"\(12, 10, 13\) but must end on \(D, H, W\) = \(12, 10, 14\)"):
        processor.to_scan(torch.zeros(12, 10, 13), volume)

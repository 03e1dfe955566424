"""Heat of phrases and answers against their formulas, and its way back into the scan: a bright blob is put in and found again."""

import itertools

import numpy as np
import pytest

from med3dvlm import Volume, VolumeProcessor
from med3dvlm.grounding import Heat, place

# (recipe, settings): some sizes smaller than the scan's and some larger
PROCESSORS = [
    ("m3d", {"size": (7, 8, 8)}),  # 2 and 3 voxels of the cropped scan to one
    ("m3d", {"size": (40, 36, 44), "resize": "trilinear"}),
    ("hu_window", {"size": (7, 8, 8), "hu_range": (-900.0, 600.0)}),
    ("ct_rate", {"size": (20, 30, 28), "spacing": (1.8, 1.3, 1.0)}),  # cropped along some axes and padded along others
    ("ct_clip", {"size": (40, 60, 50), "spacing": (1.5, 0.75, 0.75)}),
]
ORIENTATIONS = [None, "SPL", "ILA", "PIL", "ASR", "LIP", "RSP"]  # axial, coronal and sagittal, as displayed, flipped and swapped
SHAPE, SPACING = (18, 27, 33), (2.2, 1.1, 0.9)


def scan(orientation: str | None, blob: tuple[int, int, int] | None) -> Volume:
    """Air around a body that is off the middle, with a bright corner and a blob of 3 voxels' edge in it."""
    array = np.full(SHAPE, -1000, np.int16)
    array[3:17, 4:20, 8:32] = 0
    array[3:5, 4:6, 8:10] = 1000
    if blob is not None:
        array[tuple(slice(middle - 1, middle + 2) for middle in blob)] = 1000
    return Volume(array, SPACING, orientation, unit="HU", source="scan")


@pytest.mark.parametrize(("recipe", "settings"), PROCESSORS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_blob_is_found_again(recipe: str, settings: dict[str, object], orientation: str | None) -> None:
    """Its middle in what the model sees, brought back, is its middle in the scan: to half of what a shift by half a voxel would make."""
    processor = VolumeProcessor(recipe, **settings)
    for blob in ((6, 11, 17), (12, 14, 22)):
        volume = scan(orientation, blob)
        weights = (processor.transform(volume) - processor.transform(scan(orientation, None)))[0].numpy().astype(np.float64)
        assert weights.sum() > 0, "the blob must be in the picture"
        middle = [(weights * index).sum() / weights.sum() for index in np.indices(weights.shape)]
        placement = processor.placement(volume)
        found = placement @ [*middle, 1]
        assert np.abs(found[:3] - blob).max() < 0.25


@pytest.mark.parametrize(("recipe", "settings"), PROCESSORS)
@pytest.mark.parametrize("orientation", ["SPL", "ILA", "RSP"])
def test_heat_is_placed_on_the_blob(recipe: str, settings: dict[str, object], orientation: str) -> None:
    """A grid of patches that holds the mean of what they see, as an encoder might: its overlay is highest within a patch of the blob."""
    processor, blob = VolumeProcessor(recipe, **settings), (7, 12, 18)
    volume = scan(orientation, blob)
    made = (processor.transform(volume) - processor.transform(scan(orientation, None)))[0].numpy()
    patch = (4, 4, 2) if recipe.startswith("ct") else (1, 2, 2)
    grid = tuple(length // edge for length, edge in zip(processor.size, patch, strict=True))
    values = np.zeros(grid, np.float32)
    for cell in itertools.product(*map(range, grid)):
        values[cell] = made[tuple(slice(index * edge, (index + 1) * edge) for index, edge in zip(cell, patch, strict=True))].max()
    cells = np.diag([*map(float, patch), 1.0])
    cells[:3, 3] = [(edge - 1) / 2 for edge in patch]
    overlay = place(Heat(values, cells, processor.size), volume, processor)
    assert overlay.shape == SHAPE and overlay.dtype == np.float32 and overlay.flags.c_contiguous
    assert overlay.min() == 0 and overlay.max() <= 1
    steps = np.abs(processor.placement(volume)[:3, :3]) @ np.array(patch)  # a cell's edges in voxels of the scan
    highest = np.argwhere(overlay >= overlay.max() - 1e-6)
    assert (np.abs(highest - blob) <= steps / 2 + 1.5).all(axis=1).any()
    coarse = place(Heat(values, cells, processor.size), volume, processor, step=2)
    np.testing.assert_array_equal(coarse, overlay[::2, ::2, ::2])


def test_placing_by_plain_loops() -> None:
    """Trilinear between the cells' middles, the ends go on, what was cropped away is 0: voxel by voxel."""
    processor = VolumeProcessor("m3d", size=(12, 10, 14))
    volume = scan("ILA", (6, 11, 17))
    generator = np.random.default_rng(0)
    values = generator.random((3, 2, 4)).astype(np.float32)
    cells = np.diag([4.0, 5.0, 3.5, 1.0])
    cells[:3, 3] = (1.5, 2.0, 0.0)
    overlay = place(Heat(values, cells, (12, 10, 14)), volume, processor)
    shown = np.clip((values - np.median(values)) / (values.max() - np.median(values)), 0, 1)
    inverse = np.linalg.inv(processor.placement(volume))
    outside = 0
    for voxel in generator.integers(0, SHAPE, (300, 3)):
        seen = (inverse @ [*voxel, 1])[:3]
        if (seen < -0.5).any() or (seen > np.array([12, 10, 14]) - 0.5).any():
            outside += 1
            assert overlay[tuple(voxel)] == 0
            continue
        place_in_grid = np.clip((seen - cells[:3, 3]) / np.diag(cells)[:3], 0, np.array(values.shape) - 1)
        expected = 0.0
        for corner in itertools.product((0, 1), repeat=3):
            index = np.minimum(np.floor(place_in_grid).astype(int) + corner, np.array(values.shape) - 1)
            share = np.abs(1 - np.array(corner) - (place_in_grid - np.floor(place_in_grid)))
            expected += share.prod() * shown[tuple(index)]
        assert overlay[tuple(voxel)] == pytest.approx(expected, abs=1e-6)
    assert 0 < outside < 300


def test_even_heat_shows_nothing() -> None:
    processor = VolumeProcessor("m3d", size=(12, 10, 14))
    heat = Heat(np.full((3, 2, 4), 0.5, np.float32), np.eye(4), (12, 10, 14))
    assert not place(heat, scan("SPL", (6, 11, 17)), processor).any()

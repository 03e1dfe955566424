"""Overlap, surface distances and components, by plain loops and on shapes of known distance."""

import math

import numpy as np
import pytest

from med3dvlm.metrics.segmentation import component_counts, dice, surface_scores

SHAPE = (9, 12, 14)


def box(*edges: slice) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[edges] = True
    return mask


def test_dice_by_counting() -> None:
    generator = np.random.default_rng(0)
    first, second = (generator.random(SHAPE) < 0.3 for _ in range(2))
    pairs = list(zip(first.ravel().tolist(), second.ravel().tolist(), strict=True))
    assert dice(first, second) == pytest.approx(2 * sum(a and b for a, b in pairs) / sum(a + b for a, b in pairs))
    assert dice(first, ~first) == 0 and dice(first & ~first, first & ~first) == 1 and dice(first, first & ~first) == 0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 1.2, 0.8)])
def test_surfaces_by_plain_loops(spacing: tuple[float, float, float]) -> None:
    """Surface voxels have a neighbour (of six) outside the mask; distances between their middles."""
    first, second = box(slice(2, 6), slice(3, 9), slice(2, 9)), box(slice(3, 7), slice(3, 8), slice(4, 12))

    def surface(mask: np.ndarray) -> list[tuple[int, ...]]:
        steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
        padded = np.pad(mask, 1)
        return [tuple(v) for v in np.argwhere(mask) if not all(padded[tuple(v + 1 + np.array(step))] for step in steps)]

    def distances(ones: list[tuple[int, ...]], others: list[tuple[int, ...]]) -> list[float]:
        return [min(math.dist(np.multiply(one, spacing), np.multiply(other, spacing)) for other in others) for one in ones]

    there, back = distances(surface(first), surface(second)), distances(surface(second), surface(first))
    near, far = surface_scores(first, second, spacing, 1.3)
    assert near == pytest.approx(sum(value <= 1.3 for value in there + back) / len(there + back), abs=1e-6)
    assert far == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=1e-5)
    assert surface_scores(first, first, spacing, 0.1) == (1, 0)
    empty = surface_scores(first & ~first, first, spacing, 1)
    assert empty[0] == 0 and math.isnan(empty[1])


def test_the_edge_of_the_volume_is_a_surface() -> None:
    """Two boxes at the edge differ by one voxel in length; the surface at the edge of the volume counts."""
    near, far = surface_scores(box(slice(0, 3), slice(0, 4), slice(0, 5)), box(slice(0, 3), slice(0, 4), slice(0, 6)), (1, 1, 1), 0.5)
    assert 0 < near < 1 and far == 1


def test_components() -> None:
    true = (
        box(slice(1, 3), slice(1, 3), slice(1, 3))
        | box(slice(5, 8), slice(6, 9), slice(6, 9))
        | box(slice(1, 2), slice(10, 12), slice(1, 2))
    )
    drawn = box(slice(1, 3), slice(1, 3), slice(1, 4))  # the first, a little larger
    drawn |= box(slice(5, 6), slice(6, 7), slice(6, 7))  # a voxel of 27: too little to be the second
    drawn |= box(slice(4, 5), slice(1, 2), slice(12, 13))  # nothing
    assert component_counts(drawn, true) == (1, 2, 2)
    assert component_counts(true, true) == (3, 0, 0)
    nothing = true & ~true
    assert component_counts(nothing, true) == (0, 0, 3) and component_counts(true, nothing) == (0, 3, 0)
    whole = box(slice(0, 9), slice(0, 12), slice(0, 14))
    assert component_counts(whole, whole)[0] == 1 and component_counts(nothing, nothing) == (0, 0, 0)

"""Scores of a predicted mask against the true one.

Shapes: masks are (D, H, W) of booleans; spacing is (z, y, x) in mm.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from med3dvlm.geometry.measurements import NEIGHBOURS, bounding_box

Mask = NDArray[np.bool_]
MIN_OVERLAP = 0.1  # intersection over union from which on two components are the same
MARGIN = 2  # voxels around both masks, beyond which nothing changes a distance


def dice(drawn: Mask, true: Mask) -> float:
    """Return twice the common voxels divided by all voxels of both; 1 for two empty masks."""
    total = int(drawn.sum()) + int(true.sum())
    return 2 * int((drawn & true).sum()) / total if total else 1.0


def surface_scores(drawn: Mask, true: Mask, spacing: Sequence[float], tolerance: float) -> tuple[float, float]:
    """Return the normalised surface distance, the share of both surfaces that lies within `tolerance` mm of the other, and the 95th
    percentile of the Hausdorff distance in mm, by MONAI; (0, NaN) where one of the masks is empty.
    """
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice

    both = bounding_box(drawn | true)
    if both is None or not drawn.any() or not true.any():
        return 0.0, float("nan")
    box = tuple(slice(max(first - MARGIN, 0), after + MARGIN) for first, after in zip(*both, strict=True))
    # A surface at the volume's edge is one, too.
    ours, theirs = (torch.from_numpy(np.pad(mask[box], MARGIN))[None, None] for mask in (drawn, true))
    options: Any = {"include_background": True, "spacing": list(spacing)}
    near = compute_surface_dice(ours, theirs, class_thresholds=[tolerance], **options)
    far = compute_hausdorff_distance(ours, theirs, percentile=95, **options)
    return float(near), float(far)


def component_counts(drawn: Mask, true: Mask) -> tuple[int, int, int]:
    """Count the components that both masks have, that only `drawn` has, and that only `true` has.

    Pairs are made from the largest overlap downwards, each component in one pair, as long as their intersection over union is at least
    `MIN_OVERLAP`. Voxels that share a corner are of one component.
    """
    from scipy.ndimage import label

    (ours, count), (theirs, wanted) = (label(mask, NEIGHBOURS) for mask in (drawn, true))
    both = np.bincount((ours * (wanted + 1) + theirs).ravel(), minlength=(count + 1) * (wanted + 1)).reshape(count + 1, wanted + 1)
    sizes, wanted_sizes = both.sum(axis=1)[1:, None], both.sum(axis=0)[None, 1:]
    overlap = both[1:, 1:] / np.maximum(sizes + wanted_sizes - both[1:, 1:], 1)
    pairs = 0
    while overlap.size and overlap.max() >= MIN_OVERLAP:
        row, column = np.unravel_index(int(overlap.argmax()), overlap.shape)
        overlap[row], overlap[:, column] = 0, 0
        pairs += 1
    return pairs, count - pairs, wanted - pairs

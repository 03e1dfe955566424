"""Losses of masks: of every voxel (Dice and cross entropy), of presence, and of tokens of a coarse grid.

Shapes: B volumes of D, H, W voxels; K prompts a volume; N cells of a grid.
"""

import torch
from torch import Tensor, nn

from med3dvlm.encoders.base import Size

SEGMENTATION_LOSSES = ("dice_balanced_ce", "dice_ce", "dice_focal")
BALANCE = (0.2, 5.0)  # weights of the mean cross entropy within a mask and of that outside, where they are balanced


def mask_losses(
    logits: Tensor, presence: Tensor, masks: Tensor, asked: Tensor | None, segmentation_loss: str, presence_weight: float
) -> Tensor:
    """The loss of each volume (B): the sum of three terms, each a mean over the volume's prompts.

    MONAI's Dice loss, of prompts whose mask is not empty; of voxels the mean cross entropy ("dice_ce"), the mean focal loss
    ("dice_focal"), or the mean cross entropy within the mask and that outside, weighted by BALANCE ("dice_balanced_ce"), without which
    a short training never finds lesions of a few voxels; and `presence_weight` times cross entropy of presence.

    Args:
        logits: (B, K, D, H, W).
        presence: (B, K), logits.
        masks: (B, K, D, H, W), as in `Med3DSegmenter.forward`.
        asked: (B, K), where there is a prompt; None for everywhere.

    Raises:
        ValueError: masks and logits differ in shape.
    """
    from monai.losses.dice import DiceLoss
    from monai.losses.focal_loss import FocalLoss

    if masks.shape != logits.shape:
        raise ValueError(f"masks are {tuple(masks.shape)} but the logits {tuple(logits.shape)}")
    logits, shape = logits.flatten(0, 1).unsqueeze(1), masks.shape[:2]  # (B * K, 1, D, H, W)
    wanted = masks.flatten(0, 1).unsqueeze(1).to(logits.dtype)
    there = masks.flatten(2).any(dim=2).to(logits.dtype)  # (B, K)
    weights = torch.ones_like(there) if asked is None else asked.to(logits.dtype)
    if segmentation_loss == "dice_focal":
        voxelwise = FocalLoss(gamma=2.0, reduction="none")(logits, wanted)
    else:
        voxelwise = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if segmentation_loss == "dice_balanced_ce":
        within, outside = balanced_mean(voxelwise.flatten(1), wanted.flatten(1))
        by_prompt = BALANCE[0] * within + BALANCE[1] * outside
    else:
        by_prompt = voxelwise.flatten(1).mean(dim=1)
    of_presence = nn.functional.binary_cross_entropy_with_logits(presence, there, reduction="none")  # (B, K)
    each = by_prompt.view(shape) + presence_weight * of_presence
    counted = weights * there
    chosen = counted.flatten().nonzero().squeeze(1)
    dice = torch.zeros_like(there).flatten()
    if len(chosen):
        dice = dice.index_put((chosen,), DiceLoss(sigmoid=True, reduction="none")(logits[chosen], wanted[chosen]).flatten().to(dice.dtype))
    return prompt_mean(each, weights) + prompt_mean(dice.view(shape), counted)


def balanced_mean(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the last axis where `wanted` is 1 and where it is 0; 0 where there is nothing of the kind."""
    inside, within = wanted.sum(dim=-1), (values * wanted).sum(dim=-1)
    return within / inside.clamp(min=1), (values.sum(dim=-1) - within) / (wanted.shape[-1] - inside).clamp(min=1)


def held_by_cells(masks: Tensor, grid: Size) -> Tensor:
    """Whether a part of a mask lies in each cell of a grid that divides the volume evenly: (B, K, D, H, W) -> (B, K, N), 1 or 0, uint8."""
    held = masks.bool().view(torch.uint8)  # a tenth of the time that booleans take
    for axis, cells in enumerate(grid, start=2):
        share = -(-held.shape[axis] // cells)
        held = nn.functional.pad(held, (0, 0) * (4 - axis) + (0, cells * share - held.shape[axis]))
        held = held.unflatten(axis, (cells, share)).amax(dim=axis + 1)
    return held.flatten(2)


def prompt_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Over a volume's prompts, (B, K) -> (B); 0 where nothing has a weight."""
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

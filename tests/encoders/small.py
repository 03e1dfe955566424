"""The encoders of every family, narrow and shallow, and a small volume with unequal axes that each takes."""

import os
from typing import Any

import torch
from torch import nn

from med3dvlm.encoders import Encoder, Size, build_encoder

ODD: Size = (10, 20, 30)
WIDTHS = (6, 8, 10, 12, 16)
# family -> (name, size, overrides)
SMALL: dict[str, tuple[str, Size, dict[str, Any]]] = {
    "dcformer": ("dcformer_nano", ODD, {"blocks": (1, 2, 1, 1), "widths": WIDTHS}),
    "convnext3d": ("convnext3d_nano", ODD, {"blocks": (1, 2, 1, 1), "widths": WIDTHS}),
    "poolformer3d": ("poolformer3d_nano", ODD, {"blocks": (1, 2, 1, 1), "widths": WIDTHS}),
    "transunet3d": ("transunet3d_naive", ODD, {"blocks": (1, 2, 1, 2), "widths": WIDTHS, "head_width": 8}),
    "vit3d": ("vit3d_naive", (12, 16, 40), {"patch": (4, 8, 8), "width": 24, "depth": 5, "heads": 3}),
    "vit3d_m3d": ("vit3d_m3d", (8, 48, 32), {"width": 24, "depth": 4, "heads": 3}),
    "ctvit": (
        "ctvit",
        (30, 40, 20),
        {"dim": 24, "codebook_size": 16, "spatial_depth": 1, "temporal_depth": 1, "heads": 2, "head_width": 8},
    ),
}


def small_encoder(family: str) -> tuple[Encoder, Size]:
    """Return an encoder with weights away from their neutral values, and the size of a volume."""
    name, size, overrides = SMALL[family]
    return randomised(build_encoder(name, size=size, **overrides)), size


def randomised(model: nn.Module) -> Any:
    """Move every vector of parameters and every running statistic away from its initial value, so that a forgotten one is noticed."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.normal_(0.5, 0.2)
    return model


def killed(*_: object) -> None:
    """Kill this process as the kernel kills one that takes too much memory."""
    os._exit(9)

"""Layers whose input and weights may differ in type. Every encoder is built of them, which guarantees its precision, whatever autocast, DeepSpeed,
`.to(torch.bfloat16)` or a loader does to the weights:

- Products are computed in the type of the input. The weights are cast to it at the call, which costs nothing where the types are equal, and which
  gradient checkpointing and ZeRO-3 (it brings parameters when a layer is called, or when another module reads them) repeat by themselves.
- Norms compute their statistics and what they make of them in float32 (in float64 for float64) and give the type of the input.
- Running statistics, and CT-ViT's codebook, are stored in float32 at least: `WideBuffers`.
- `Encoder.forward` decides the type of the activations once, where the volume enters, and switches autocast off: see `base.compute_type`.

Channels come last, (..., C), as everywhere inside an encoder.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """float32 for a narrower type, else the type itself."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return x.to(wide_type(x.dtype))


def cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The parameter, if there is one, in that type."""
    return None if parameter is None else parameter.to(dtype)


class Linear(nn.Linear):
    """A linear layer over the channels: (..., C_in) -> (..., C_out)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), cast(self.bias, x.dtype))


class Conv3d(nn.Conv3d):
    """A 3D convolution: (B, d, h, w, C_in) -> (B, d', h', w', C_out)."""

    def forward(self, x: Tensor) -> Tensor:
        # In the default memory format: torch 2.14 gives wrong gradients for depthwise channels-last kernels in bfloat16.
        y = self._conv_forward(x.movedim(-1, 1).contiguous(), self.weight.to(x.dtype), cast(self.bias, x.dtype))
        return y.movedim(1, -1)


class LayerNorm(nn.LayerNorm):
    """Every cell to mean 0 and deviation 1 over its channels, then a factor and a shift a channel: (..., C) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x)
        y = F.layer_norm(wide, self.normalized_shape, cast(self.weight, wide.dtype), cast(self.bias, wide.dtype), self.eps)
        return y.to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """Every volume to mean 0 and deviation 1 over its cells and a group's channels, then a factor and a shift a channel: (B, ..., C) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x).movedim(-1, 1)
        # Not F.group_norm, which refuses a single cell even where a group has several channels.
        y = torch.group_norm(wide, self.num_groups, cast(self.weight, wide.dtype), cast(self.bias, wide.dtype), self.eps)
        return y.movedim(1, -1).to(x.dtype)


class WideBuffers(nn.Module):
    """A module whose buffers stay in float32 at least when it is cast to less, by `.to(torch.bfloat16)` or as part of a larger model."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype != wide_type(buffer.dtype):
                self._buffers[name] = widened(before[name]).to(buffer.device)  # type: ignore[arg-type]
        return self


def require_cells(cells: Tensor) -> None:
    """Raises ValueError where a batch (cells, C) is too small for batch norm to learn from."""
    if len(cells) == 1:
        raise ValueError(
            "batch norm needs more than one cell, and a batch of one such small volume leaves one; train with larger volumes, or "
            "with batches of several (--dataloader-drop-last true leaves out a smaller last one)"
        )


class BatchNorm(nn.BatchNorm1d, WideBuffers):
    """Batch norm over every axis but the last: (..., C) -> the same."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        # They follow torch's default type, which transformers sets to that of the weights while it builds a model.
        self.running_mean, self.running_var = widened(self.running_mean), widened(self.running_var)

    def forward(self, x: Tensor) -> Tensor:
        cells = widened(x).reshape(-1, x.shape[-1])
        if self.training:
            require_cells(cells)
            self.num_batches_tracked.add_(1)
        weight, bias = self.weight.to(cells.dtype), self.bias.to(cells.dtype)
        y = F.batch_norm(cells, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps)
        return y.view(x.shape).to(x.dtype)

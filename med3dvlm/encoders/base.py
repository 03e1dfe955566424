"""What every vision encoder promises: a volume goes in, a list of stage tokens comes out.

Shapes: B batch; D, H, W voxels of the volume; d, h, w cells of a grid; C channels.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Size = tuple[int, int, int]


class Encoder(nn.Module):
    """`encoder(volume)` gives the tokens (B, d*h*w, C) of every stage, d outermost, the finest grid first.

    A family of encoders fills in `widths`, `stride`, `grids` and `encode`.

    Attributes:
        widths: channels C of every output.
        stride: volumes whose axes are multiples of it are divided without remainder.
        gradient_checkpointing: keep only what passes between stages for the backward pass and compute the rest again: less memory, about a
            third more time. Values and gradients stay as they are.
    """

    widths: tuple[int, ...]
    gradient_checkpointing: bool = False
    result_dtype: torch.dtype | None = None

    @property
    def stride(self) -> int:
        raise NotImplementedError

    def grids(self, size: Size) -> list[Size]:
        """The grid (d, h, w) of every output for a volume of `size` (D, H, W).

        Raises:
            ValueError: the encoder does not take that size.
        """
        raise NotImplementedError

    def centres(self, size: Size) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        """Where the cells of every output look, as (first, step) along D, H, W: cell i of an axis has its middle at voxel first + step * i.

        This is for encoders of patches; others say their own.
        """
        steps = [tuple(voxels / cells for voxels, cells in zip(size, grid, strict=True)) for grid in self.grids(size)]
        return [(tuple((step - 1) / 2 for step in each), each) for each in steps]

    def encode(self, volume: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) -> [(B, d*h*w, C)], after `forward` has checked the volume."""
        raise NotImplementedError

    def forward(self, volume: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W), cast to the type of the weights -> [(B, d*h*w, C) for every stage].

        Raises:
            ValueError: the shape is another one, or the encoder does not take that size.
        """
        if volume.ndim != 5 or volume.shape[1] != 1:
            raise ValueError(f"the encoder takes volumes of shape (B, 1, D, H, W), not {tuple(volume.shape)}; add or select axes")
        _, _, depth, height, width = volume.shape
        self.grids((depth, height, width))
        emulated = volume.device.type == "cpu" and not bfloat16_is_native()
        with torch.autocast("cpu", enabled=False) if emulated else nullcontext():
            stages = self.encode(volume.to(next(self.parameters()).dtype))
        return stages if self.result_dtype is None else [tokens.to(self.result_dtype) for tokens in stages]

    def for_inference(self, dtype: torch.dtype = torch.float32) -> "Encoder":
        """A copy for prediction, whose tokens are in `dtype`: evaluation mode, no gradients.

        It computes in `dtype` too, unless that is bfloat16 on a CPU without instructions for it, where float32 is several times faster.
        """
        fast = self.fused(copy.deepcopy(self).eval().requires_grad_(False)).requires_grad_(False)
        fast.result_dtype = dtype
        emulated = dtype == torch.bfloat16 and next(self.parameters()).device.type == "cpu" and not bfloat16_is_native()
        return fast.float() if emulated else fast.to(dtype)

    @staticmethod
    def fused(encoder: "Encoder") -> "Encoder":
        """The encoder, in evaluation mode, with cheaper operations in place of some; families that know none leave it as it is."""
        return encoder

    def run_stage(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        """One layer after the other; with `gradient_checkpointing` nothing between them is kept for the backward pass."""

        def stage(x: Tensor) -> Tensor:
            for layer in layers:
                x = layer(x)
            return x

        if self.gradient_checkpointing and torch.is_grad_enabled():
            again = _StatisticsKept(layers)
            result: Tensor = checkpoint(stage, x, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
            return result
        return stage(x)


class _StatisticsKept:
    """While it is entered, batch norms do not follow the batch: they did when its activations were computed for the first time."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.norms: list[Any] = [
            module for layer in layers for module in layer.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        self.before: list[tuple[float | None, Tensor]] = []

    def __enter__(self) -> None:
        self.before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, batches) in zip(self.norms, self.before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def bfloat16_is_native() -> bool:
    """Whether this CPU computes in bfloat16 itself."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_size(size: Sequence[int]) -> Size:
    """`size` as three positive numbers.

    Raises:
        ValueError: it is something else.
    """
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"the size of a volume is three positive numbers (D, H, W), not {tuple(size)}")
    depth, height, width = size
    return depth, height, width


def written(size: Sequence[int]) -> str:
    """(32, 256, 256) -> "32x256x256"."""
    return "x".join(map(str, size))


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Numbers of trainable and frozen parameters, a shared one counted once."""
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return {"trainable": trainable, "frozen": sum(parameter.numel() for parameter in module.parameters()) - trainable}

"""What every vision encoder promises: a volume goes in, a list of stage tokens comes out.

Shapes: B batch; D, H, W voxels of the volume; d, h, w cells of a grid; C channels.
"""

import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from med3dvlm.encoders.layers import wide_type

Size = tuple[int, int, int]
BFLOAT16_SPEEDUP = 1.2  # of a matrix product against float32, from which a CPU counts as fast in bfloat16


class Encoder(nn.Module):
    """`encoder(volume)` gives the tokens (B, d*h*w, C) of every stage, d outermost, the finest grid first.

    Weights are float64, float32 or bfloat16, and tokens come in their type; `compute_type` says what is computed in, autocast included.
    What is kept in float32 then, `layers` says. A family of encoders fills in `widths`, `stride`, `grids` and `encode`.

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
        """(B, 1, D, H, W) -> [(B, d*h*w, C) for every stage], in the type of the weights.

        Raises:
            ValueError: the shape is another one, the encoder does not take that size, or the weights or autocast are float16.
        """
        if volume.ndim != 5 or volume.shape[1] != 1:
            raise ValueError(f"the encoder takes volumes of shape (B, 1, D, H, W), not {tuple(volume.shape)}; add or select axes")
        _, _, depth, height, width = volume.shape
        self.grids((depth, height, width))
        device, weights = volume.device.type, next(self.parameters()).dtype
        dtype = compute_type(weights, device)
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            stages = self.encode(volume.to(dtype))
        return [tokens.to(self.result_dtype or weights) for tokens in stages]

    def for_inference(self, dtype: torch.dtype = torch.float32) -> "Encoder":
        """A copy for prediction, whose tokens are in `dtype`: evaluation mode, no gradients.

        It computes in `dtype` too, unless that is bfloat16 on a CPU that is faster in float32.

        Raises:
            ValueError: `dtype` is float16, or the weights are.
        """
        own = next(self.parameters())
        refuse_float16(own.dtype)
        computing = compute_type(dtype, own.device.type)
        wide = copy.deepcopy(self).eval().requires_grad_(False).to(wide_type(own.dtype))  # weights are folded before they are rounded
        fast = self.fused(wide).requires_grad_(False).to(computing)
        fast.result_dtype = dtype
        return fast

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


def compute_type(weights: torch.dtype, device: str) -> torch.dtype:
    """The type of an encoder's activations: that of autocast, where it is on, or of the weights; float32 for bfloat16 on CPUs that are slow at it.

    Raises:
        ValueError: that is float16.
    """
    autocast = weights != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    wanted = torch.get_autocast_dtype(device) if autocast else weights
    refuse_float16(wanted)
    slow = wanted == torch.bfloat16 and device == "cpu" and not bfloat16_is_fast()
    return torch.float32 if slow else wanted


def refuse_float16(dtype: torch.dtype) -> None:
    """Raises ValueError for float16."""
    if dtype == torch.float16:
        raise ValueError(
            "encoders do not compute in float16, whose largest number, 65504, their features may exceed; "
            "use float32 or bfloat16 (--bf16 true, dtype=torch.bfloat16)"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies matrices faster in bfloat16 than in float32, measured once in a process.

    Emulated bfloat16 reached 0.02 to 0.4 times the speed of float32, AVX-512's instructions 0.67 on one processor and 2.1 on another (where an
    encoder was as a whole 1.5 times as fast in training and 2 times in inference), AMX 6. No processor seen so far lies near the threshold,
    so that all processes and runs on a machine have come to the same answer.
    """
    return _bfloat16_speedup() > BFLOAT16_SPEEDUP


@cache
def _bfloat16_speedup() -> float:
    """By the processor's time of one thread, whatever else the machine does: the shortest of six products in either type, which take turns."""
    threads = torch.get_num_threads()
    full = torch.ones(384, 384)
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    matrices = {dtype: full.to(dtype) for dtype in seconds}
    torch.set_num_threads(1)
    try:
        for _ in range(6):
            for dtype, matrix in matrices.items():
                started = time.thread_time()
                torch.mm(matrix, matrix)
                seconds[dtype].append(time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


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

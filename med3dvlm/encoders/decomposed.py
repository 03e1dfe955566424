"""The decomposed convolution: three 1D convolutions along D, H and W, each with its own batch norm, summed (DCFormer paper, Algorithm 1).

In training the backward pass of a large volume keeps the input alone and convolves again: the stem's grid is so large that the three outputs, which
batch norm would otherwise keep, are most of a training step's memory.

Shapes as in `hierarchy`; channels come last.
"""

from typing import Any

import torch
from torch import Tensor, nn

from med3dvlm.encoders.layers import BatchNorm, require_cells, wide_type, widened

aten = torch.ops.aten
FEW_CHANNELS = 8  # that a convolution gathers the cells of: those of the volume itself
LARGE_VOLUME = 2**20  # numbers in a volume's features from which the products of `_weight_gradient` and convolving again pay


def neighbours(x: Tensor, axis: int, kernel: int, stride: int) -> Tensor:
    """What a convolution along an axis sees, zeros beyond the grid: (B, D, H, W, C) -> (B, d, h, w, C * k)."""
    thinned = x[tuple(slice(None, None, 1 if other in (0, axis + 1) else stride) for other in range(4))]
    padding = [0, 0] * (3 - axis) + [kernel // 2, kernel // 2]
    return nn.functional.pad(thinned, padding).unfold(axis + 1, kernel, stride).flatten(4)


class AxisConv(nn.Module):
    """A 1D convolution along one axis of (B, d, h, w, C), strided along all three.

    Computed as a 2D convolution over a view that folds the other axes: no copy, and on CPUs several times faster than the Conv3d with the same
    weights, whose channels-last kernels besides are wrong or crash at some sizes in torch 2.14. Of few channels it is a product of gathered cells.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, axis: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        reference = nn.Conv1d(in_channels, out_channels, kernel_size, groups=groups)
        self.weight: Tensor = reference.weight  # (C_out, C_in / groups, k)
        self.bias: Any = reference.bias  # (C_out)
        self.axis, self.stride, self.groups = axis, stride, groups

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(B, d, h, w, C_in) -> (B, d', h', w', C_out)."""
        if self._gathers(x):
            return nn.functional.linear(neighbours(x, self.axis, weight.shape[2], self.stride), weight.flatten(1), bias)
        x = self._thinned(x)
        image, stride, padding = self._geometry(weight)
        y = nn.functional.conv2d(self._folded(x), image, bias, stride, padding, groups=self.groups).movedim(1, -1)
        return y.unflatten(2, x.shape[2:4]) if self.axis == 0 else y.unflatten(0, x.shape[:2])

    def gradients(self, dy: Tensor, x: Tensor, weight: Tensor, of_input: bool) -> tuple[Tensor | None, Tensor]:
        """Of the input (if wanted) and of the weight, given that of the output."""
        thinned = self._thinned(x)
        image, stride, padding = self._geometry(weight)
        large = x.device.type == "cpu" and self.groups == self.stride == 1 and x[0].numel() >= LARGE_VOLUME
        by_products = large and self.axis < 2 or self._gathers(x)  # along W, whose slices have gaps, the convolution's own is as fast
        if by_products:
            dweight = self._weight_gradient(dy, x, weight.shape[2]).reshape(weight.shape).to(weight.dtype)
            if not of_input:
                return None, dweight
        arguments = (self._folded(dy), self._folded(thinned), image)
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and self.groups > 1:
            # In torch 2.14 the weight's gradient of a depthwise convolution in bfloat16 is garbage on CPUs where the kernel is longer than the axis.
            arguments = tuple(tensor.float() for tensor in arguments)  # type: ignore[assignment]
        dx, of_weight, _ = aten.convolution_backward(
            *arguments, None, stride, padding, (1, 1), False, (0, 0), self.groups, (of_input, not by_products, False)
        )
        if not by_products:
            dweight = of_weight.reshape(weight.shape).to(weight.dtype)
        if of_input:
            dx = dx.movedim(1, -1).reshape(thinned.shape).to(x.dtype)
            if self.stride > 1:
                spread = torch.zeros_like(x)
                self._thinned(spread).copy_(dx)
                dx = spread
        return dx, dweight

    def _weight_gradient(self, dy: Tensor, x: Tensor, kernel: int) -> Tensor:
        """Matrix products by tap over slices of each volume: up to seven times faster on CPUs than the convolution's own. (C_out, C_in, k)"""
        if self._gathers(x):
            gathered = neighbours(x, self.axis, kernel, self.stride).reshape(-1, x.shape[-1] * kernel)
            return (gathered.T @ dy.reshape(-1, dy.shape[-1])).T.unflatten(1, (-1, kernel))  # twelve times faster than its transpose
        cells = x.shape[1 + self.axis]
        taps = x.new_zeros(kernel, dy.shape[-1], x.shape[-1], dtype=wide_type(x.dtype))
        for tap in range(kernel):
            shift = tap - kernel // 2
            overlap = max(cells - abs(shift), 0)
            for inputs, outputs in zip(x, dy, strict=True):  # (d, h, w, C) each
                inputs = inputs.narrow(self.axis, min(max(shift, 0), cells), overlap).flatten(1, 2)
                outputs = outputs.narrow(self.axis, min(max(-shift, 0), cells), overlap).flatten(1, 2)
                taps[tap] += (outputs.transpose(1, 2) @ inputs).sum(dim=0)
        return taps.movedim(0, -1)

    def _gathers(self, x: Tensor) -> bool:
        return x.shape[-1] <= FEW_CHANNELS and self.groups == 1

    def _thinned(self, x: Tensor) -> Tensor:
        """What the strides leave along the other two axes."""
        step = [slice(None) if axis == self.axis else slice(None, None, self.stride) for axis in range(3)]
        return x[:, step[0], step[1], step[2]]

    def _folded(self, x: Tensor) -> Tensor:
        """As images, channels second: rows along D, (B, C, d, h*w), or slices, (B*d, C, h, w)."""
        return (x.flatten(2, 3) if self.axis == 0 else x.flatten(0, 1)).movedim(-1, 1)

    def _geometry(self, weight: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
        """Kernel, stride and padding over those images: along the columns for W, along the rows otherwise."""
        reach = weight.shape[2] // 2
        if self.axis == 2:
            return weight.unsqueeze(2).contiguous(memory_format=torch.channels_last), (1, self.stride), (0, reach)
        return weight.unsqueeze(3).contiguous(memory_format=torch.channels_last), (self.stride, 1), (reach, 0)


class DecomposedConv(nn.Module):
    """The sum of three 1D convolutions along D, H and W, each with bias and its own batch norm: (B, d, h, w, C_in) -> (B, d', h', w', C_out)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        branches: list[Any] = [
            nn.Sequential(AxisConv(in_channels, out_channels, kernel_size, axis, stride, groups), BatchNorm(out_channels))
            for axis in range(3)
        ]
        self.depth, self.height, self.width = branches

    @property
    def branches(self) -> list[Any]:
        """Convolution and batch norm along D, H and W."""
        return [self.depth, self.height, self.width]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.depth(x) + self.height(x) + self.width(x)
        wide = wide_type(x.dtype)
        parameters = [
            parameter
            for conv, norm in self.branches
            for parameter in (conv.weight.to(x.dtype), conv.bias.to(x.dtype), norm.weight.to(wide), norm.bias.to(wide))
        ]
        return _NormalisedSum.apply(x, self.branches, *parameters)


class _NormalisedSum(torch.autograd.Function):
    """The sum over the branches of BatchNorm(conv(x)) in training mode.

    Parameters, branch after branch: weight and bias of the convolution in the type of x, those of the norm in float32 at least.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, branches: list[Any], *parameters: Tensor) -> Tensor:
        total: Any = None
        offset = parameters[3].new_zeros(())
        statistics, outputs = [], []
        for number, (conv, norm) in enumerate(branches):
            weight, bias, gain, shift = parameters[4 * number : 4 * number + 4]
            y = conv.convolve(x, weight, bias)
            cells = y.reshape(-1, y.shape[-1])  # (cells, C)
            require_cells(cells)
            # Not torch's own, which sums channels-last data so roughly that gradients of the whole encoder are up to 2 % off.
            mean = cells.mean(dim=0, dtype=gain.dtype)
            variance = (cells - mean).square_().mean(dim=0)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * (len(cells) / (len(cells) - 1)), norm.momentum)
            norm.num_batches_tracked += 1
            inverse = torch.rsqrt(variance + norm.eps)
            factor = gain * inverse
            offset = offset + (shift - mean * factor)
            total = cells * factor if total is None else total.addcmul_(cells, factor)
            statistics += [mean, inverse]
            if x[0].numel() < LARGE_VOLUME:
                outputs.append(y)
        ctx.save_for_backward(x, *parameters, *statistics, *outputs)
        ctx.branches = branches
        return total.add_(offset).view(y.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        count, cells = len(ctx.branches), (-1, dy.shape[-1])
        parameters, statistics, outputs = rest[: 4 * count], rest[4 * count : 6 * count], rest[6 * count :]
        dx, of_parameters = None, []
        for number, (conv, norm) in enumerate(ctx.branches):
            weight, bias, gain, _ = parameters[4 * number : 4 * number + 4]
            mean, inverse = statistics[2 * number : 2 * number + 2]
            y = outputs[number] if outputs else conv.convolve(x, weight, bias)
            dcells, dgain, dshift = aten.native_batch_norm_backward(
                widened(dy).reshape(cells), widened(y).reshape(cells), gain, None, None, mean, inverse, True, norm.eps, [True] * 3
            )
            of_input, dweight = conv.gradients(dcells.view(y.shape).to(x.dtype), x, weight, ctx.needs_input_grad[0])
            if of_input is not None:
                dx = of_input if dx is None else dx.add_(of_input)
            del y, dcells, of_input  # before the next branch makes its own
            of_parameters += [dweight, torch.zeros_like(bias), dgain, dshift]  # batch norm takes away what a bias adds
        return (dx, None, *of_parameters)

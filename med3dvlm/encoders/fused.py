"""DCFormer for inference: the same function in fewer and cheaper operations. `DCFormer.for_inference` makes it.

- Every batch norm is folded into its convolution, the three biases of a decomposed convolution are one, a block's scale goes into its MLP.
- The first convolution, which has few input channels, is one matrix product over gathered voxels.
- The three convolutions of the other stem layers share their middle tap: 7 products of matrices a cell instead of 9.

Shapes as in `hierarchy`; channels come last.
"""

from typing import Any

import torch
from torch import Tensor, nn

from med3dvlm.encoders.decomposed import FEW_CHANNELS, DecomposedConv, neighbours
from med3dvlm.encoders.hierarchy import ChannelMLP, MetaNeXtBlock

CHANNELS_LAST = torch.channels_last


def fuse(encoder: Any) -> Any:
    """Replace the parts of a DCFormer in evaluation mode by their fused forms, in place."""
    encoder.stem = nn.Sequential(*(_fused_conv(layer) if isinstance(layer, DecomposedConv) else layer for layer in encoder.stem))
    for stage in encoder.stages:
        for number, layer in enumerate(stage):
            if isinstance(layer, MetaNeXtBlock):
                stage[number] = FusedBlock(layer)
    return encoder


class GatheredConv(nn.Module):
    """A decomposed convolution of few channels as a matrix product: (B, D, H, W, C_in) -> (B, d, h, w, C_out)."""

    def __init__(self, weights: list[Tensor], bias: Tensor, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = weights[0].shape[2], stride
        self.weight = nn.Parameter(torch.cat([weight.flatten(1) for weight in weights], dim=1))  # (C_out, 3 C_in k)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        gathered = torch.cat([neighbours(x, axis, self.kernel_size, self.stride) for axis in range(3)], dim=-1)
        return nn.functional.linear(gathered, self.weight.to(x.dtype), self.bias.to(x.dtype))


class FoldedConv(nn.Module):
    """Convolutions along D, H and W, summed, of stride 1 and with one bias: (B, d, h, w, C_in) -> (B, d, h, w, C_out)."""

    def __init__(self, weights: list[Tensor], bias: Tensor, groups: int) -> None:
        super().__init__()
        depth, height, width = weights
        self.groups, self.reach = groups, depth.shape[2] // 2
        self.dilation = 1
        if (
            groups == 1 and self.reach == 1
        ):  # all three see the cell itself: give that to W, and two taps, two cells apart, are left of D and H
            width = width.clone()
            width[:, :, 1] += depth[:, :, 1] + height[:, :, 1]
            depth, height, self.dilation = depth[:, :, ::2], height[:, :, ::2], 2
        self.depth, self.height = (nn.Parameter(weight.unsqueeze(3).contiguous(memory_format=CHANNELS_LAST)) for weight in (depth, height))
        self.width = nn.Parameter(width.unsqueeze(2).contiguous(memory_format=CHANNELS_LAST))
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        slices, columns = x.flatten(0, 1).movedim(-1, 1), x.flatten(2, 3).movedim(-1, 1)  # (B*d, C, h, w), (B, C, d, h*w)
        rows: dict[str, Any] = {"padding": (self.reach, 0), "dilation": (self.dilation, 1), "groups": self.groups}
        y = nn.functional.conv2d(slices, self.width.to(x.dtype), self.bias.to(x.dtype), padding=(0, self.reach), groups=self.groups)
        y += nn.functional.conv2d(slices, self.height.to(x.dtype), **rows)
        z = nn.functional.conv2d(columns, self.depth.to(x.dtype), **rows)
        shape = (*x.shape[:4], self.bias.shape[0])
        return z.movedim(1, -1).reshape(shape).add_(y.movedim(1, -1).reshape(shape))


class FusedBlock(nn.Module):
    """A DCFormer block: (B, d, h, w, C) -> the same, in the memory of its input."""

    def __init__(self, block: MetaNeXtBlock) -> None:
        super().__init__()
        self.mixer = _fused_conv(block.mixer)
        self.mlp: ChannelMLP = block.mlp
        self.mlp.reduce.weight.mul_(block.scale.unsqueeze(1))
        self.mlp.reduce.bias.mul_(block.scale)

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.mlp(self.mixer(x)))


def _fused_conv(layer: Any) -> nn.Module:
    branches = [_folded(*branch) for branch in layer.branches]
    weights, bias = [weight for weight, _ in branches], torch.stack([bias for _, bias in branches]).sum(dim=0)
    convolution = layer.depth[0]
    if weights[0].shape[1] <= FEW_CHANNELS and convolution.groups == 1:
        return GatheredConv(weights, bias, convolution.stride)
    return FoldedConv(weights, bias, convolution.groups)


def _folded(convolution: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in / groups, k) and bias (C_out) of a convolution and the batch norm after it."""
    gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return convolution.weight * gain.view(-1, 1, 1), (convolution.bias - norm.running_mean) * gain + norm.bias

"""DCFormer: 3D convolutions decomposed into three 1D ones (DCFormer paper, section 3; sizes from the released code).

    block(x) = x + scale * MLP(conv_D(x) + conv_H(x) + conv_W(x)),   each conv depthwise along one axis, with its own batch norm

Shapes as in `hierarchy`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from med3dvlm.encoders.hierarchy import ChannelMLP, Downsample, HierarchicalEncoder

# blocks of the four stages, widths of stem and stages
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "nano": ((1, 1, 1, 1), (32, 32, 64, 128, 256)),
    "naive": ((2, 2, 2, 2), (32, 64, 128, 256, 512)),
    "tiny": ((2, 3, 3, 2), (64, 96, 192, 384, 768)),
    "small": ((2, 3, 6, 2), (64, 96, 192, 384, 768)),
    "base": ((2, 6, 6, 2), (64, 128, 256, 512, 1024)),
    "large": ((2, 6, 12, 2), (64, 256, 512, 1024, 2048)),
}
KERNELS = (13, 11, 9, 7)  # by stage, as the text of the paper and the released weights have it; the paper's Table 4 prints 7


class AxisConv(nn.Module):
    """A 1D convolution along one axis of (B, d, h, w, C), strided along all three.

    Computed as a 2D convolution over a view that folds the other axes: no copy, and on CPUs several times faster than the Conv3d with the same
    weights, whose channels-last kernels besides are wrong or crash at some sizes in torch 2.14.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, axis: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        reference = nn.Conv1d(in_channels, out_channels, kernel_size, groups=groups)
        self.weight, self.bias = reference.weight, reference.bias  # (C_out, C_in / groups, k), (C_out)
        self.axis, self.stride, self.groups = axis, stride, groups

    def forward(self, x: Tensor) -> Tensor:
        step = [slice(None) if axis == self.axis else slice(None, None, self.stride) for axis in range(3)]
        x = x[:, step[0], step[1], step[2]]
        batch, depth, height, width, _ = x.shape
        kernel, padding = self.weight.shape[2], self.weight.shape[2] // 2
        if self.axis == 0:
            image = x.flatten(2, 3)  # (B, d, h*w, C): convolve the rows
        else:
            image = x.flatten(0, 1)  # (B*d, h, w, C)
        shape, stride, pad = (
            ((1, kernel), (1, self.stride), (0, padding)) if self.axis == 2 else ((kernel, 1), (self.stride, 1), (padding, 0))
        )
        weight = self.weight.view(*self.weight.shape[:2], *shape).contiguous(memory_format=torch.channels_last)
        y = nn.functional.conv2d(image.movedim(-1, 1), weight, self.bias, stride, pad, groups=self.groups)
        y = y.movedim(1, -1)  # (B, d', h*w, C') or (B*d, h', w', C')
        if self.axis == 0:
            return y.unflatten(2, (height, width))
        return y.unflatten(0, (batch, depth))


class ChannelsLastBatchNorm(nn.BatchNorm1d):
    """Batch norm over every axis but the last: (B, d, h, w, C) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class DecomposedConv(nn.Module):
    """The sum of three 1D convolutions along D, H and W, each with bias and its own batch norm: (B, d, h, w, C_in) -> (B, d', h', w', C_out)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.depth, self.height, self.width = (
            nn.Sequential(AxisConv(in_channels, out_channels, kernel_size, axis, stride, groups), ChannelsLastBatchNorm(out_channels))
            for axis in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.depth(x) + self.height(x) + self.width(x)


class DCFormerBlock(nn.Module):
    """Depthwise decomposed convolution, then a channel MLP, scaled per channel and added: (B, d, h, w, C) -> the same."""

    def __init__(self, channels: int, kernel_size: int, layer_scale: float) -> None:
        super().__init__()
        self.mixer = DecomposedConv(channels, channels, kernel_size, groups=channels)
        self.mlp = ChannelMLP(channels)
        self.scale = nn.Parameter(torch.full((channels,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.mlp(self.mixer(x))


class DCFormer(HierarchicalEncoder):
    """The encoder of both papers.

    Args:
        blocks: blocks in each of the four stages.
        widths: channels of the stem and the four stages.
        stem_stride: stride of the first convolution; 4 in the paper, 2 keeps detail in small volumes.
        stem_activation: GELU after each stem layer. The published weights have none (the released code passes it in the wrong place).
        layer_scale: initial value of the blocks' per-channel scale; 1e-6 in the paper, 0.1 learns sooner in short runs.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        kernels: Sequence[int] = KERNELS,
        stem_layers: int = 4,
        stem_stride: int = 4,
        stem_activation: bool = True,
        layer_scale: float = 1e-6,
    ) -> None:
        stem: list[nn.Module] = []
        for layer in range(stem_layers):
            first = layer == 0
            stem.append(DecomposedConv(1 if first else widths[0], widths[0], 7 if first else 3, stem_stride if first else 1))
            if stem_activation:
                stem.append(nn.GELU())
        stages = [
            nn.Sequential(Downsample(narrow, wide), *(DCFormerBlock(wide, kernel, layer_scale) for _ in range(number)))
            for narrow, wide, kernel, number in zip(widths[:-1], widths[1:], kernels, blocks, strict=True)
        ]
        super().__init__(nn.Sequential(*stem), stages, widths, stem_stride)

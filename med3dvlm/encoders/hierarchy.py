"""The skeleton that the convolutional encoders share: a stem, then stages that halve the grid, each a stack of blocks.

The families are MetaFormers (arXiv 2111.11418; DCFormer paper, section "Formulation of the DCFormer block"): their blocks mix the cells of a
grid, then the channels of each cell, and what tells the families apart is the mixer of the cells.

    block                                                     mixer                               family
    MetaNeXtBlock    x + s MLP(Norm(Mixer(x)))                three 1D convolutions, normed       DCFormer
                                                              depthwise 7x7x7 convolution         ConvNeXt3D
    MetaFormerBlock  y = x + s Mixer(Norm(x))                 average pooling                     PoolFormer3D
                     y + s MLP(Norm(y))                       self-attention                      ViT3D, last stage of TransUNet3D

Shapes: B batch; D, H, W voxels of the volume; d, h, w cells of a grid; C channels. Inside an encoder channels come last, (B, d, h, w, C):
then a linear layer over the channels, a batch norm and the tokens (B, d*h*w, C) need no copy.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from med3dvlm.encoders.base import Encoder, Size, check_size, written
from med3dvlm.encoders.layers import Conv3d, Linear

Window = Sequence[float]  # (low, high) of a volume's values


def windowed(volume: Tensor, windows: Sequence[Window]) -> Tensor:
    """A volume and what can be seen of it in each window, from 0 at its low end to 1 at its high one: (B, D, H, W, 1) -> (B, D, H, W, 1 + windows).

    As radiologists look at a CT: a liver lesion, 85 HU darker, differs by 0.05 where 1600 HU are scaled to 0..1, and by 0.4 in a window of 200 HU.
    """
    return torch.cat([volume, *(((volume - low) / (high - low)).clamp(0, 1) for low, high in windows)], dim=-1) if windows else volume


class ConvStem(nn.Module):
    """One strided convolution: (B, D, H, W, C_in) -> (B, d, h, w, C_out), each axis divided by `stride`, rounded up."""

    def __init__(self, channels: int, stride: int, kernel_size: int = 7, in_channels: int = 1) -> None:
        super().__init__()
        self.conv = Conv3d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Downsample(nn.Module):
    """Halve the grid by max pooling, then change the width: (B, d, h, w, C_in) -> (B, ceil(d/2), ceil(h/2), ceil(w/2), C_out)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        self.project = Linear(in_channels, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.movedim(-1, 1)).movedim(1, -1)
        return self.project(pooled)


class ChannelMLP(nn.Module):
    """Two linear layers over the channels of every cell, GELU between: (..., C) -> (..., C)."""

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.expand = Linear(channels, ratio * channels)
        self.reduce = Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(nn.functional.gelu(self.expand(x)))


class MetaNeXtBlock(nn.Module):
    """Mix cells, then channels, in one residual: (..., C) -> the same.

    Args:
        mixer: (..., C) -> the same.
        layer_scale: initial value of the per-channel factor of what is added.
        norm: after the mixer; none where the mixer ends with its own.
    """

    def __init__(self, channels: int, mixer: nn.Module, layer_scale: float, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = nn.Identity() if norm is None else norm
        self.mlp = ChannelMLP(channels)
        self.scale = nn.Parameter(torch.full((channels,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale.to(x.dtype) * self.mlp(self.norm(self.mixer(x)))


class MetaFormerBlock(nn.Module):
    """Mix cells, then channels, each in a residual of its own (DCFormer paper, equations 2 and 3): (..., C) -> the same.

    Args:
        mixer: (..., C) -> the same.
        norm: makes the norm before each of the two, given the channels.
        layer_scale: initial value of the per-channel factors of what is added; None leaves them out.
    """

    def __init__(self, channels: int, mixer: nn.Module, norm: Callable[[int], nn.Module], layer_scale: float | None = None) -> None:
        super().__init__()
        self.norm1, self.mixer = norm(channels), mixer
        self.norm2, self.mlp = norm(channels), ChannelMLP(channels)
        self.scale1, self.scale2 = (nn.Identity() if layer_scale is None else LayerScale(channels, layer_scale) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1(self.mixer(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))


class LayerScale(nn.Module):
    """A learned factor for every channel: (..., C) -> the same."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.to(x.dtype)


def build_stages(block: Callable[[int, int], nn.Module], blocks: Sequence[int], widths: Sequence[int]) -> list[nn.Module]:
    """Stages of a `Downsample` and blocks.

    Args:
        block: makes one block, given the number of its stage (from 0) and the channels.
        blocks: how many a stage.
        widths: channels of the stem and of every stage.

    Raises:
        ValueError: the numbers of stages differ.
    """
    if len(widths) != len(blocks) + 1:
        raise ValueError(f"{len(blocks)} stages have widths {tuple(widths)}; give one width more than stages, the stem's first")
    steps = zip(widths[:-1], widths[1:], blocks, strict=True)
    return [
        nn.Sequential(Downsample(narrow, wide), *(block(stage, wide) for _ in range(number)))
        for stage, (narrow, wide, number) in enumerate(steps)
    ]


class HierarchicalEncoder(Encoder):
    """A stem and its stages; the outputs are the tokens of the stem and of every stage.

    Args:
        stem: (B, D, H, W, 1 + windows) -> (B, d, h, w, widths[0]), each axis divided by `stem_stride`, rounded up.
        stages: each halves the grid (rounded up) and gives the next width.
        windows: (low, high) of the volume's values, in which the stem sees the volume besides, see `windowed`; the papers have none.

    Raises:
        ValueError: a window's high end is not above its low one.
    """

    def __init__(
        self, stem: nn.Module, stages: Sequence[nn.Module], widths: Sequence[int], stem_stride: int, windows: Sequence[Window] = ()
    ) -> None:
        super().__init__()
        if wrong := [list(window) for window in windows if len(window) != 2 or not window[0] < window[1]]:
            raise ValueError(f"windows has {wrong[0]} but each is (low, high) with low < high, in the values of the prepared volumes")
        self.windows = [tuple(window) for window in windows]
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.widths = tuple(widths)
        self.stem_stride = stem_stride

    @property
    def stride(self) -> int:
        """How many voxels one cell of the last grid spans along an axis."""
        return self.stem_stride * 2 ** len(self.stages)

    def grids(self, size: Size) -> list[Size]:
        """The grid (d, h, w) of stem and stages for a volume of `size` (D, H, W).

        Raises:
            ValueError: an axis is shorter than two cells of the stem.
        """
        depth, height, width = check_size(size)
        if min(size) < 2 * self.stem_stride:
            raise ValueError(
                f"a volume of {written(size)} voxels is too small for this encoder: "
                f"every axis needs at least {2 * self.stem_stride}; resize it with a VolumeProcessor"
            )
        return [(-(-depth // span), -(-height // span), -(-width // span)) for span in self._spans]

    def centres(self, size: Size) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        """The kernels of stem and pooling are odd and padded to both sides alike, so the first cell's middle is the first voxel."""
        return [((0.0,) * 3, (float(span),) * 3) for span in self._spans]

    @property
    def _spans(self) -> list[int]:
        """How many voxels one cell of the stem and of every stage spans along an axis."""
        return [self.stem_stride * 2**stage for stage in range(len(self.stages) + 1)]

    def encode(self, volume: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) -> [(B, d*h*w, C) for stem and stages], d outermost."""
        x = windowed(volume.movedim(1, -1), self.windows)  # (B, D, H, W, 1 + windows)
        outputs = []
        for stage in (self.stem, *self.stages):
            x = self.run_stage([stage], x)  # (B, d, h, w, C)
            outputs.append(x.flatten(1, 3))
        return outputs

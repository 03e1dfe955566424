"""The skeleton that the convolutional encoders share: a stem, then stages that halve the grid, each a stack of blocks.

What differs between the families is the block's token mixer (MetaFormer, arXiv 2111.11418; DCFormer paper, section 3).

Shapes: B batch; D, H, W voxels of the volume; d, h, w cells of a grid; C channels. Inside an encoder channels come last, (B, d, h, w, C):
then a linear layer over the channels, a batch norm and the tokens (B, d*h*w, C) need no copy.
"""

from collections.abc import Sequence

from torch import Tensor, nn

Size = tuple[int, int, int]


class Downsample(nn.Module):
    """Halve the grid by max pooling, then change the width: (B, d, h, w, C_in) -> (B, ceil(d/2), ceil(h/2), ceil(w/2), C_out)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        self.project = nn.Linear(in_channels, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.movedim(-1, 1)).movedim(1, -1)
        return self.project(pooled)


class ChannelMLP(nn.Module):
    """Two linear layers over the channels of every cell, GELU between: (..., C) -> (..., C)."""

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, ratio * channels)
        self.reduce = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(nn.functional.gelu(self.expand(x)))


class HierarchicalEncoder(nn.Module):
    """A stem and its stages. `forward` gives the tokens of the stem and of every stage, finest first.

    Args:
        stem: (B, D, H, W, 1) -> (B, d, h, w, widths[0]), each axis divided by `stem_stride`, rounded up.
        stages: each halves the grid (rounded up) and gives the next width.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], widths: Sequence[int], stem_stride: int) -> None:
        super().__init__()
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
        if len(size) != 3 or min(size) < 2 * self.stem_stride:
            raise ValueError(
                f"a volume of {'x'.join(map(str, size))} voxels is too small for this encoder: "
                f"every axis needs at least {2 * self.stem_stride}; resize it with a VolumeProcessor"
            )
        depth, height, width = size
        spans = [self.stem_stride * 2**stage for stage in range(len(self.stages) + 1)]
        return [(-(-depth // span), -(-height // span), -(-width // span)) for span in spans]

    def forward(self, volume: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) -> [(B, d*h*w, C) for stem and stages], d outermost."""
        if volume.ndim != 5 or volume.shape[1] != 1:
            raise ValueError(f"the encoder takes volumes of shape (B, 1, D, H, W), not {tuple(volume.shape)}")
        _, _, depth, height, width = volume.shape
        self.grids((depth, height, width))
        x = self.stem(volume.movedim(1, -1))  # (B, d, h, w, C)
        outputs = [x]
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return [output.flatten(1, 3) for output in outputs]


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Numbers of trainable and frozen parameters, a shared one counted once."""
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return {"trainable": trainable, "frozen": sum(parameter.numel() for parameter in module.parameters()) - trainable}

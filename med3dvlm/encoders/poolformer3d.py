"""PoolFormer3D: PoolFormer (arXiv 2111.11418) with its pooling in 3D, in the stage layout of DCFormer.

    y = x + scale * (pool(norm(x)) - norm(x));   block(x) = y + scale * MLP(norm(y)),   pool the mean of 3x3x3 cells

The DCFormer paper prints no widths or depths for it (Table 1: 2.79, 11.31 and 20.68 M parameters). Chosen here: the stem (7x7x7, stride 4) and the
downsampling of the other families, widths that double, and depths such that parameters and GFLOPs come near: 2.82 M (+1 %),
11.39 M (+1 %), 20.84 M (+1 %), GFLOPs within 1 %.

Shapes as in `hierarchy`.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from med3dvlm.encoders.hierarchy import ConvStem, HierarchicalEncoder, MetaFormerBlock, Window, build_stages
from med3dvlm.encoders.layers import GroupNorm

# blocks of the four stages, widths of stem and stages
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "nano": ((4, 4, 4, 2), (40, 40, 80, 160, 320)),
    "naive": ((4, 4, 12, 2), (64, 64, 128, 256, 512)),
    "tiny": ((4, 4, 8, 2), (96, 96, 192, 384, 768)),
}


class Pooling(nn.Module):
    """What a cell lacks to the mean of its neighbourhood, itself included and only cells of the grid: (B, d, h, w, C) -> the same.

    The mean over a cube is the mean along D of means over H and W, both 2D poolings over views; AvgPool3d besides refuses grids of two cells.
    """

    def __init__(self, pool_size: int) -> None:
        super().__init__()
        self.pool_size = pool_size

    def forward(self, x: Tensor) -> Tensor:
        batch, depth, height, width, _ = x.shape
        size, reach = self.pool_size, self.pool_size // 2
        slices = x.flatten(0, 1).movedim(-1, 1)  # (B*d, C, h, w)
        y = nn.functional.avg_pool2d(slices, size, 1, reach, count_include_pad=False).movedim(1, -1)
        columns = y.reshape(batch, depth, height * width, -1).movedim(-1, 1)  # (B, C, d, h*w)
        z = nn.functional.avg_pool2d(columns, (size, 1), 1, (reach, 0), count_include_pad=False)
        return z.movedim(1, -1).reshape(x.shape) - x


class PoolFormer3D(HierarchicalEncoder):
    """MetaFormer blocks whose mixer learns nothing.

    Args:
        blocks: blocks in each of the four stages.
        widths: channels of the stem and the four stages.
        pool_size: cells along an axis that are averaged.
        stem_stride: stride of the first convolution; 2 keeps detail in small volumes.
        layer_scale: initial value of the blocks' per-channel scales.
        windows: see HierarchicalEncoder.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        pool_size: int = 3,
        stem_stride: int = 4,
        layer_scale: float = 1e-5,
        windows: Sequence[Window] = (),
    ) -> None:
        def block(_: int, channels: int) -> nn.Module:
            return MetaFormerBlock(channels, Pooling(pool_size), partial(GroupNorm, 1), layer_scale)

        stem = ConvStem(widths[0], stem_stride, in_channels=1 + len(windows))
        super().__init__(stem, build_stages(block, blocks, widths), widths, stem_stride, windows)

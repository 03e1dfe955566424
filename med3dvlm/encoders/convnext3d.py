"""ConvNeXt3D: ConvNeXt (arXiv 2201.03545) with its depthwise convolution in 3D, in the stage layout of DCFormer.

    block(x) = x + scale * MLP(LayerNorm(conv(x))),   conv depthwise, 7x7x7

The DCFormer paper prints no widths or depths for it (Table 1: 3.19, 15.63 and 31.59 M parameters). Chosen here: the stem (7x7x7, stride 4) and the
downsampling of the other families, widths that double, and depths such that parameters and GFLOPs come near: 3.26 M (+2 %),
15.65 M (+0.2 %), 31.15 M (-1 %), GFLOPs within 5 %.

Shapes as in `hierarchy`.
"""

from collections.abc import Sequence

from torch import nn

from med3dvlm.encoders.hierarchy import ConvStem, HierarchicalEncoder, MetaNeXtBlock, Window, build_stages
from med3dvlm.encoders.layers import Conv3d, LayerNorm

# blocks of the four stages, widths of stem and stages
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "nano": ((4, 4, 6, 2), (36, 36, 72, 144, 288)),
    "naive": ((2, 3, 3, 2), (96, 96, 192, 384, 768)),
    "tiny": ((4, 6, 10, 3), (96, 96, 192, 384, 768)),
}
EPSILON = 1e-6  # of the layer norms, as in ConvNeXt


class DepthwiseConv(Conv3d):
    """Every channel by its own cube of weights: (B, d, h, w, C) -> the same."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)


class ConvNeXt3D(HierarchicalEncoder):
    """MetaNeXt blocks whose mixer is a depthwise convolution.

    Args:
        blocks: blocks in each of the four stages.
        widths: channels of the stem and the four stages.
        kernel_size: of the depthwise convolutions.
        stem_stride: stride of the first convolution; 2 keeps detail in small volumes.
        layer_scale: initial value of the blocks' per-channel scale.
        windows: see HierarchicalEncoder.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        kernel_size: int = 7,
        stem_stride: int = 4,
        layer_scale: float = 1e-6,
        windows: Sequence[Window] = (),
    ) -> None:
        def block(_: int, channels: int) -> nn.Module:
            return MetaNeXtBlock(channels, DepthwiseConv(channels, kernel_size), layer_scale, LayerNorm(channels, EPSILON))

        stem = nn.Sequential(ConvStem(widths[0], stem_stride, in_channels=1 + len(windows)), LayerNorm(widths[0], EPSILON))
        super().__init__(stem, build_stages(block, blocks, widths), widths, stem_stride, windows)

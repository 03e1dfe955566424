"""TransUNet3D: the hybrid encoder of TransUNet (arXiv 2102.04306) in 3D: convolutional stages, then a transformer on the last grid.

    conv block(x)        = relu(x + norm(conv(relu(norm(conv(x)))))),   conv 3x3x3, norm a batch norm   stages 1 to 3
    transformer block(x) = y + MLP(norm(y)), y = x + attention(norm(x))                                 stage 4

The DCFormer paper prints no architecture for it (Table 1: 12.48 M parameters and 118.9 GFLOPs, 23.93 M and 207.5). Chosen here: the stem
(7x7x7, stride 4) and the downsampling of the other families, two-convolution residual blocks, and no learned positions, so that any size fits: the
zero-padded convolutions tell the cells where they are. That makes 12.57 M (+1 %) and 23.77 M (-1 %), and GFLOPs within 5 %.

Shapes as in `hierarchy`.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from med3dvlm.encoders.hierarchy import ConvStem, HierarchicalEncoder, MetaFormerBlock, Window, build_stages
from med3dvlm.encoders.layers import BatchNorm, Conv3d, LayerNorm
from med3dvlm.encoders.vit3d import SelfAttention

# blocks of the four stages, widths of stem and stages
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "naive": ((2, 2, 2, 4), (32, 64, 128, 256, 256)),
    "tiny": ((4, 3, 3, 12), (64, 64, 128, 256, 256)),
}


class ConvBlock(nn.Module):
    """Two convolutions and a residual: (B, d, h, w, C) -> the same."""

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv1, self.conv2 = (Conv3d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (BatchNorm(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu(self.norm1(self.conv1(x)))
        return nn.functional.relu(x + self.norm2(self.conv2(y)))


class TransUNet3D(HierarchicalEncoder):
    """Convolutional stages and a last stage of transformer blocks, which ends with a layer norm.

    Args:
        blocks: blocks in each stage.
        widths: channels of the stem and of every stage.
        head_width: channels of an attention head.
        stem_stride: stride of the first convolution; 2 keeps detail in small volumes.
        windows: see HierarchicalEncoder.
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], head_width: int = 64, stem_stride: int = 4, windows: Sequence[Window] = ()
    ) -> None:
        def block(stage: int, channels: int) -> nn.Module:
            if stage < len(blocks) - 1:
                return ConvBlock(channels)
            return MetaFormerBlock(channels, SelfAttention(channels, max(1, channels // head_width)), LayerNorm)

        stem = nn.Sequential(ConvStem(widths[0], stem_stride, in_channels=1 + len(windows)), BatchNorm(widths[0]), nn.ReLU())
        stages = build_stages(block, blocks, widths)
        stages[-1] = nn.Sequential(stages[-1], LayerNorm(widths[-1]))
        super().__init__(stem, stages, widths, stem_stride, windows)

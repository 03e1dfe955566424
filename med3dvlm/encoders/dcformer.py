"""DCFormer: 3D convolutions decomposed into three 1D ones (DCFormer paper, section 3; sizes from the released code).

    block(x) = x + scale * MLP(conv_D(x) + conv_H(x) + conv_W(x)),   each conv depthwise along one axis, with its own batch norm

Shapes as in `hierarchy`.
"""

from collections.abc import Sequence

from torch import nn

from med3dvlm.encoders import fused
from med3dvlm.encoders.base import Encoder
from med3dvlm.encoders.decomposed import DecomposedConv
from med3dvlm.encoders.hierarchy import HierarchicalEncoder, MetaNeXtBlock, Window, build_stages

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


class DCFormerBlock(MetaNeXtBlock):
    """Depthwise decomposed convolution, then a channel MLP, scaled per channel and added: (B, d, h, w, C) -> the same."""

    def __init__(self, channels: int, kernel_size: int, layer_scale: float) -> None:
        super().__init__(channels, DecomposedConv(channels, channels, kernel_size, groups=channels), layer_scale)


class DCFormer(HierarchicalEncoder):
    """The encoder of both papers.

    Args:
        blocks: blocks in each of the four stages.
        widths: channels of the stem and the four stages.
        kernels: cells along an axis that a block's convolutions see, a stage.
        stem_layers: decomposed convolutions in the stem.
        stem_stride: stride of the first convolution; 4 in the paper, 2 keeps detail in small volumes.
        stem_activation: GELU after each stem layer. The published weights have none (the released code passes it in the wrong place).
        layer_scale: initial value of the blocks' per-channel scale; 1e-6 in the paper, 0.1 learns sooner in short runs.
        windows: see HierarchicalEncoder.
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
        windows: Sequence[Window] = (),
    ) -> None:
        if len(kernels) != len(blocks):
            raise ValueError(f"{len(blocks)} stages have kernels {tuple(kernels)}; give one for every stage")
        stem: list[nn.Module] = []
        for layer in range(stem_layers):
            first = layer == 0
            stem.append(DecomposedConv(1 + len(windows) if first else widths[0], widths[0], 7 if first else 3, stem_stride if first else 1))
            if stem_activation:
                stem.append(nn.GELU())
        stages = build_stages(lambda stage, channels: DCFormerBlock(channels, kernels[stage], layer_scale), blocks, widths)
        super().__init__(nn.Sequential(*stem), stages, widths, stem_stride, windows)

    @staticmethod
    def fused(encoder: Encoder) -> Encoder:
        return fused.fuse(encoder)

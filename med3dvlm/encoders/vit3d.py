"""ViT3D: the vision transformer (arXiv 2010.11929) over patches of a volume.

Its outputs are the tokens after each quarter of the blocks, all on one grid, the last with the final norm, without the class token.

The DCFormer paper prints no architecture for its ViT (Table 1: 11.10 M parameters and 39.05 GFLOPs, 26.34 M and 86.43). Chosen here: patches
of 32x32x32, widths 192 and 320 (heads of 64) and depths 10 and 12, which come nearest to both: 11.13 M (+0.3 %), 25.94 M (-1.5 %).
"m3d" is the image encoder of M3D-CLIP (arXiv 2404.00578): patches of 4x16x16 of a 32x256x256 volume, ViT-Base, a class token, no bias for q, k, v.

Shapes: B batch; n tokens; P voxels of a patch; C channels; A heads.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from med3dvlm.encoders.base import Encoder, Size, check_size, written
from med3dvlm.encoders.hierarchy import MetaFormerBlock
from med3dvlm.encoders.layers import LayerNorm, Linear

SIZES: dict[str, dict[str, Any]] = {
    "naive": {"size": (256, 512, 512), "patch": (32, 32, 32), "width": 192, "depth": 10, "heads": 3},
    "tiny": {"size": (256, 512, 512), "patch": (32, 32, 32), "width": 320, "depth": 12, "heads": 5},
    "m3d": {
        "size": (32, 256, 256), "patch": (4, 16, 16), "width": 768, "depth": 12, "heads": 12, "qkv_bias": False, "class_token": True,
    },
}  # fmt: skip
STAGES = 4


class SelfAttention(nn.Module):
    """Every cell looks at all cells: (B, ..., C) -> the same."""

    def __init__(self, channels: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be divided among {heads} heads; choose a divisor")
        self.heads = heads
        self.qkv = Linear(channels, 3 * channels, bias=qkv_bias)
        self.output = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)  # (B, n, C)
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, A, n, C / A) each
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).flatten(2)).view(x.shape)


class ViT3D(Encoder):
    """Patches -> tokens with learned positions -> transformer blocks.

    Args:
        size: (D, H, W) of the volumes; the positions are learned for it.
        patch: voxels of a patch along D, H, W.
        width: channels of a token.
        depth: transformer blocks.
        heads: of the attention.
        qkv_bias: whether queries, keys and values have a bias.
        class_token: whether a learned token without a patch takes part.

    Raises:
        ValueError: an axis of the size is not a multiple of the patch.
    """

    def __init__(
        self, size: Size, patch: Size, width: int, depth: int, heads: int, qkv_bias: bool = True, class_token: bool = False
    ) -> None:
        super().__init__()
        self.size, self.patch = check_size(size), check_size(patch)
        if any(voxels % step for voxels, step in zip(self.size, self.patch, strict=True)):
            raise ValueError(
                f"a volume of {written(size)} voxels does not divide into patches of {written(patch)}; "
                "resize it with a VolumeProcessor to whole multiples"
            )
        depth_cells, height_cells, width_cells = (voxels // step for voxels, step in zip(self.size, self.patch, strict=True))
        self.grid: Size = (depth_cells, height_cells, width_cells)
        self.widths = (width,) * STAGES
        self.patch_embedding = Linear(math.prod(patch), width)
        self.positions = nn.Parameter(torch.empty(1, math.prod(self.grid), width))
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.blocks = nn.ModuleList(MetaFormerBlock(width, SelfAttention(width, heads, qkv_bias), LayerNorm) for _ in range(depth))
        self.norm = LayerNorm(width)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def stride(self) -> int:
        """The least common multiple of the patch's axes."""
        return math.lcm(*self.patch)

    def grids(self, size: Size) -> list[Size]:
        """The grid of patches, once for every output.

        Raises:
            ValueError: `size` is not the one that the encoder was built for.
        """
        if check_size(size) != self.size:
            raise ValueError(
                f"this encoder has learned positions for volumes of {written(self.size)} voxels, not {written(size)}; "
                "resize them with a VolumeProcessor or build the encoder with their size"
            )
        return [self.grid] * STAGES

    def encode(self, volume: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) -> four times (B, n, C)."""
        steps = [extent for pair in zip(self.grid, self.patch, strict=True) for extent in pair]
        patches = volume.reshape(-1, *steps).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # (B, n, P)
        x = self.patch_embedding(patches) + self.positions.to(volume.dtype)
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(volume.dtype).expand(len(x), -1, -1), x], dim=1)
        blocks = list(self.blocks)
        ends = [math.ceil(len(blocks) * stage / STAGES) for stage in range(STAGES + 1)]
        outputs = []
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            x = self.run_stage(blocks[start:end], x)
            outputs.append(x[:, x.shape[1] - self.positions.shape[1] :])
        return [*outputs[:-1], self.norm(outputs[-1])]

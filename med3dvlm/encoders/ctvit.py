"""CT-ViT, the image encoder of CT-CLIP (arXiv 2403.17834, section "CT-CLIP"; GenerateCT, arXiv 2305.16037): attention within
each layer of patches, then along the layers, then a codebook.

    token = LayerNorm(Linear(LayerNorm(patch)))                       a patch has 10 x 20 x 20 voxels
    block(x) = x + PEG(x), then x + Attention(x), then x + MLP(x)     4 spatial blocks, 4 temporal ones
    code = the codebook's entry at the smallest angle to the token

What the released weights were trained with, and what is therefore kept: queries come from the normalised tokens, keys and values
from the tokens as they are; queries and keys have unit length, so that attention is a cosine times 8; and in the temporal blocks
the positional convolution reads the rows (h*w, t) as if they lay in the order (t, h, w).

Shapes: B batch; t, h, w cells of the grid; n tokens attending to each other, in G groups; C channels; A heads.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from med3dvlm.encoders.base import Encoder, Size, check_size, written
from med3dvlm.encoders.layers import Conv3d, LayerNorm, Linear, WideBuffers, wide_type, widened

SLOPE = 0.1  # of the leaky ReLUs in the position bias
SIMILARITY_SCALE = 8.0  # of the cosines, in place of 1 / sqrt(head width)
CODES_AT_ONCE = 4096  # tokens whose similarity to every code is held in memory


class PositionBias(nn.Module):
    """What attention adds for an offset between two cells of a layer, from a small MLP on its signed logarithm (arXiv 2111.09883)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        activation = partial(nn.LeakyReLU, SLOPE)
        self.layers = nn.Sequential(Linear(2, dim), activation(), Linear(dim, dim), activation(), Linear(dim, heads))

    def forward(self, height: int, width: int) -> Tensor:
        """-> (A, h*w, h*w), in float32 at least. The MLP sees every offset once, not every pair of cells."""
        like = next(self.parameters())
        rows, columns = (torch.arange(1 - cells, cells, device=like.device) for cells in (height, width))
        offsets = torch.cartesian_prod(rows, columns).to(wide_type(like.dtype))  # ((2h-1)*(2w-1), 2)
        table = self.layers(offsets.sign() * offsets.abs().log1p())
        places = (torch.arange(cells, device=like.device) for cells in (height, width))
        row, column = (place[:, None] - place + len(place) - 1 for place in places)  # (h, h), (w, w)
        index = row[:, None, :, None] * (2 * width - 1) + column[None, :, None, :]  # (h, w, h, w)
        return table[index.flatten(2).flatten(0, 1)].movedim(-1, 0)


class PositionConv(Conv3d):
    """Depthwise 3x3x3 convolution that looks at earlier layers alone (PEG, arXiv 2102.10882): (B, t, h, w, C) -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 0, 1, 1, 1, 1, 2, 0)))


class CosineAttention(nn.Module):
    """Attention by angle: (G, n, C) -> (G, n, C)."""

    def __init__(self, dim: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = LayerNorm(dim)
        self.query = Linear(dim, heads * head_width, bias=False)
        self.key_value = Linear(dim, 2 * heads * head_width, bias=False)
        self.query_scale, self.key_scale = nn.Parameter(torch.ones(head_width)), nn.Parameter(torch.ones(head_width))
        self.output = Linear(heads * head_width, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        projected = (self.query(self.norm(x)), *self.key_value(x).chunk(2, dim=-1))
        query, key, value = (part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in projected)  # (G, A, n, C / A)
        query, key = (
            (nn.functional.normalize(widened(part), dim=-1) * scale).to(x.dtype)
            for part, scale in ((query, self.query_scale), (key, self.key_scale))
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=SIMILARITY_SCALE)
        return self.output(mixed.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """LayerNorm, then half of the hidden channels gated by the GELU of the others: (..., C) -> (..., C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(4 * (2 / 3) * dim)
        self.norm = LayerNorm(dim)
        self.expand = Linear(dim, 2 * hidden, bias=False)
        self.reduce = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.expand(self.norm(x)).chunk(2, dim=-1)
        return self.reduce(x * nn.functional.gelu(gate))


class CTViTBlock(nn.Module):
    """Positions, attention, MLP, each added to what it saw: (G, n, C) -> the same; `grid` is (B, t, h, w) with B*t*h*w = G*n."""

    def __init__(self, dim: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.positions = PositionConv(dim)
        self.attention = CosineAttention(dim, heads, head_width)
        self.mlp = GatedMLP(dim)

    def forward(self, x: Tensor, grid: tuple[int, int, int, int], bias: Tensor | None = None) -> Tensor:
        x = x + self.positions(x.reshape(*grid, -1)).reshape(x.shape)
        x = x + self.attention(x, bias)
        return x + self.mlp(x)


class CTViT(Encoder, WideBuffers):
    """The encoder of CT-CLIP. Its outputs are the tokens before and after the codebook.

    The released model saw values in -1..1, those of the recipe "ct_clip".
    The codebook is not learned here: it is what the weights bring, or random; gradients pass it as if it were not there.

    Args:
        size: (D, H, W) of the volumes, only to check at once that they fit.
        dim: channels of a token.
        codebook_size: entries of the codebook.
        patch: voxels of a patch along D, H, W.
        spatial_depth, temporal_depth: blocks of either kind.
        heads, head_width: of the attention.
    """

    def __init__(
        self,
        size: Size | None = None,
        dim: int = 512,
        codebook_size: int = 8192,
        patch: Size = (10, 20, 20),
        spatial_depth: int = 4,
        temporal_depth: int = 4,
        heads: int = 8,
        head_width: int = 32,
    ) -> None:
        super().__init__()
        self.patch = check_size(patch)
        self.widths = (dim, dim)
        voxels = math.prod(patch)
        self.patch_embedding = nn.Sequential(LayerNorm(voxels), Linear(voxels, dim), LayerNorm(dim))
        self.position_bias = PositionBias(dim, heads)
        self.spatial = nn.ModuleList(CTViTBlock(dim, heads, head_width) for _ in range(spatial_depth))
        self.spatial_norm = LayerNorm(dim)
        self.temporal = nn.ModuleList(CTViTBlock(dim, heads, head_width) for _ in range(temporal_depth))
        self.temporal_norm = LayerNorm(dim)
        self.codebook: Tensor
        self.register_buffer("codebook", widened(nn.functional.normalize(torch.randn(codebook_size, dim), dim=-1)))
        if size is not None:
            self.grids(size)

    @property
    def stride(self) -> int:
        """The least common multiple of the patch's axes."""
        return math.lcm(*self.patch)

    def grids(self, size: Size) -> list[Size]:
        """The grid (t, h, w) of both outputs for a volume of `size` (D, H, W).

        Raises:
            ValueError: an axis is not a multiple of the patch.
        """
        if any(voxels % step for voxels, step in zip(check_size(size), self.patch, strict=True)):
            raise ValueError(
                f"a volume of {written(size)} voxels does not divide into patches of {written(self.patch)}; "
                "resize it with a VolumeProcessor to whole multiples"
            )
        depth, height, width = (voxels // step for voxels, step in zip(size, self.patch, strict=True))
        return [(depth, height, width)] * 2

    def encode(self, volume: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) -> [tokens, their codes], each (B, t*h*w, C), t outermost."""
        batch = volume.shape[0]
        time, height, width = (voxels // step for voxels, step in zip(volume.shape[2:], self.patch, strict=True))
        grid = (batch, time, height, width)
        cut = volume.reshape(batch, time, self.patch[0], height, self.patch[1], width, self.patch[2])
        x = self.patch_embedding(cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4))  # (B, t, h, w, C)

        bias = self.position_bias(height, width).to(volume.dtype)
        x = x.flatten(0, 1).flatten(1, 2)  # (B*t, h*w, C)
        for block in self.spatial:
            x = self._run(block, x, grid, bias)
        x = self.spatial_norm(x).unflatten(0, (batch, time)).transpose(1, 2).flatten(0, 1)  # (B*h*w, t, C)
        for block in self.temporal:
            x = self._run(block, x, grid)
        x = self.temporal_norm(x).unflatten(0, (batch, height * width)).transpose(1, 2).flatten(1, 2)  # (B, t*h*w, C)
        return [x, self.quantise(x)]

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            again: Tensor = checkpoint(block, *arguments, use_reentrant=False)
            return again
        return block(*arguments)

    def quantise(self, tokens: Tensor) -> Tensor:
        """(..., C) -> the entry of the codebook at the smallest angle to each."""
        with torch.no_grad():
            entries = nn.functional.normalize(self.codebook, dim=-1)
            parts = nn.functional.normalize(tokens.to(entries.dtype), dim=-1).reshape(-1, tokens.shape[-1]).split(CODES_AT_ONCE)
            nearest = torch.cat([(part @ entries.T).argmax(dim=-1) for part in parts])
            codes = self.codebook[nearest].view(tokens.shape).to(tokens.dtype)
        return tokens + (codes - tokens).detach() if self.training else codes

"""Dual Cross-Attention between the scales of an encoder, in three dimensions (Ates, Mohan and Celik 2023, arXiv 2303.17696).

A U-Net's skip connections hand each scale to the decoder by itself. Here every scale is first averaged to tokens on one common grid; then
each scale's channels attend to the channels of all scales, then its tokens to the tokens of all scales, and what comes of it is added to
the skip connection:

    T_i = project(average pool(E_i))                                  patch embedding, (B, N, C_i)
    T_i += project(softmax(Q_i^T K / sqrt(C)) V^T)^T                  channel cross-attention: Q of LayerNorm(T_i); K, V of all scales joined
    T_i += project(softmax(Q K^T / sqrt(C / heads)) V_i)              spatial cross-attention: Q, K of all scales joined; V of LayerNorm(T_i)
    E_i += upsample(convolve(GELU(LayerNorm(T_i))))                   1x1x1 convolution, linear interpolation

Projections are depthwise convolutions with kernel 1, as published: a factor and a shift for each channel. Published code ends with a batch norm
and ReLU instead of LayerNorm and GELU, and interpolates before it convolves, which gives the same at more cost.

Shapes: B volumes; E_i (B, d_i, h_i, w_i, C_i), channels last as inside the encoders; N tokens on the common grid; C the sum of all C_i.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.encoders.base import Size
from med3dvlm.encoders.layers import LayerNorm, Linear


class DualCrossAttention(nn.Module):
    """Skip connections that know of each other: [(B, d_i, h_i, w_i, C_i)] -> the same shapes.

    Args:
        widths: C_i of every scale, the finest first.
        level: the scale whose grid is the common one. Coarser ones repeat their cells there.
        heads: of the spatial attention; every C_i is a multiple of it.

    Raises:
        ValueError: there is no such scale, or a width is no multiple of `heads`.
    """

    def __init__(self, widths: Sequence[int], level: int, heads: int = 4) -> None:
        super().__init__()
        if not 0 <= level < len(widths):
            raise ValueError(f"dual cross-attention on the grid of scale {level}: there are {len(widths)}, from 0 to {len(widths) - 1}")
        if any(width % heads for width in widths):
            raise ValueError(f"dual cross-attention has {heads} heads, but the widths {tuple(widths)} are not all multiples of that")
        self.level = level
        joined = sum(widths)
        self.embed = nn.ModuleList(ChannelAffine(width) for width in widths)
        self.channel_norms = nn.ModuleList(LayerNorm(width) for width in widths)
        self.channel_attention = nn.ModuleList(ChannelCrossAttention(width, joined) for width in widths)
        self.spatial_norms = nn.ModuleList(LayerNorm(width) for width in widths)
        self.spatial_attention = nn.ModuleList(SpatialCrossAttention(width, joined, heads) for width in widths)
        self.norms = nn.ModuleList(LayerNorm(width) for width in widths)
        self.convolutions = nn.ModuleList(Linear(width, width) for width in widths)

    def forward(self, scales: Sequence[Tensor]) -> list[Tensor]:
        grids: list[Size] = [tuple(scale.shape[1:4]) for scale in scales]  # type: ignore[misc]
        grid = grids[self.level]
        tokens = [embed(pooled(scale, grid)) for embed, scale in zip(self.embed, scales, strict=True)]  # [(B, N, C_i)]
        normed = [norm(each) for norm, each in zip(self.channel_norms, tokens, strict=True)]
        joined = torch.cat(normed, dim=-1)  # (B, N, C)
        tokens = [each + attend(own, joined) for each, attend, own in zip(tokens, self.channel_attention, normed, strict=True)]
        normed = [norm(each) for norm, each in zip(self.spatial_norms, tokens, strict=True)]
        joined = torch.cat(normed, dim=-1)
        tokens = [each + attend(own, joined) for each, attend, own in zip(tokens, self.spatial_attention, normed, strict=True)]
        added = [convolve(F.gelu(norm(each))) for convolve, norm, each in zip(self.convolutions, self.norms, tokens, strict=True)]
        return [scale + resized(each.unflatten(1, grid), own_grid) for scale, each, own_grid in zip(scales, added, grids, strict=True)]


class ChannelAffine(nn.Module):
    """A depthwise convolution with kernel 1: a factor and a shift for each channel, (..., C) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x.dtype) + self.bias.to(x.dtype)


class ChannelCrossAttention(nn.Module):
    """The channels of a scale attend to those of all scales: own (B, N, C_i), joined (B, N, C) -> (B, N, C_i)."""

    def __init__(self, width: int, joined: int) -> None:
        super().__init__()
        self.query, self.key, self.value = ChannelAffine(width), ChannelAffine(joined), ChannelAffine(joined)
        self.project = ChannelAffine(width)

    def forward(self, own: Tensor, joined: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (self.query(own), self.key(joined), self.value(joined)))  # (B, C_i or C, N)
        attended = F.scaled_dot_product_attention(query, key, value, scale=joined.shape[-1] ** -0.5)  # (B, C_i, N)
        return self.project(attended.transpose(1, 2))


class SpatialCrossAttention(nn.Module):
    """The tokens of a scale are mixed by how alike the tokens of all scales are: own (B, N, C_i), joined (B, N, C) -> (B, N, C_i)."""

    def __init__(self, width: int, joined: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = ChannelAffine(joined), ChannelAffine(joined), ChannelAffine(width)
        self.project = ChannelAffine(width)

    def forward(self, own: Tensor, joined: Tensor) -> Tensor:
        parts = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(joined), self.key(joined), self.value(own))]
        attended = F.scaled_dot_product_attention(*parts)  # (B, heads, N, C_i / heads)
        return self.project(attended.transpose(1, 2).flatten(2))


def pooled(x: Tensor, grid: Size) -> Tensor:
    """Averages over the cells of a grid, as tokens: (B, d, h, w, C) -> (B, N, C)."""
    return F.adaptive_avg_pool3d(x.movedim(-1, 1), grid).flatten(2).transpose(1, 2)


def resized(x: Tensor, grid: Size) -> Tensor:
    """Linear interpolation to another grid: (B, d, h, w, C) -> (B, d', h', w', C)."""
    if x.shape[1:4] == torch.Size(grid):
        return x
    return F.interpolate(x.movedim(-1, 1), grid, mode="trilinear", align_corners=False).movedim(1, -1)

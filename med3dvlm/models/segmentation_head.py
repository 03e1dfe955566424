"""A decoder that gives every voxel an embedding, and what compares it with queries: masks for whatever can be asked for in words.

    stages -> skip connections (DualCrossAttention) -> decoder, from the coarsest grid to the stem's -> voxel embeddings
    voxel embeddings x queries -> logits of masks; their highest ones and the pooled stages -> logits of presence

Computation follows the encoders': products in the type that `compute_type` says, norms in float32, channels last.

Shapes: B volumes of D, H, W voxels; d, h, w cells of a grid; C channels; K queries a volume; P width of embeddings and queries.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.encoders import HierarchicalEncoder
from med3dvlm.encoders.base import Encoder, Size, compute_type
from med3dvlm.encoders.hierarchy import Window, windowed
from med3dvlm.encoders.layers import Conv3d, GroupNorm, Linear, widened
from med3dvlm.models.dual_cross_attention import DualCrossAttention, resized

HIGHEST = 8  # voxels whose logits say whether a finding is there


class ConvBlock(nn.Module):
    """Norm, GELU and a 3x3x3 convolution, added to the input: (B, d, h, w, C) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(math.gcd(channels, 8), channels)
        self.conv = Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.gelu(self.norm(x)))


class UNetDecoder(nn.Module):
    """Stages of an encoder and the volume itself -> features on the stem's grid.

    There the voxels of each cell join as channels. So detail is kept that the stem's stride has lost, and nothing is convolved on the grid of
    the voxels.

    Args:
        encoder_widths: channels of the encoder's stem and stages.
        stem_stride: voxels that one cell of the stem spans along an axis.
        widths: the decoder's own channels, for the stem and every stage but the last.
        skips: what the skip connections pass through, all at once; None leaves them as they are.
        windows: of the encoder, see HierarchicalEncoder.
    """

    def __init__(
        self,
        encoder_widths: Sequence[int],
        stem_stride: int,
        widths: Sequence[int],
        skips: DualCrossAttention | None,
        windows: Sequence[Window] = (),
    ) -> None:
        super().__init__()
        *skipped, deepest = encoder_widths
        self.stem_stride, self.skips, self.windows = stem_stride, skips, windows
        # Convolutions with kernel 1 in the place of linear layers: like those with kernel 3, they keep the channels first in memory.
        self.laterals = nn.ModuleList(Conv3d(wide, width, 1) for wide, width in zip(skipped, widths, strict=True))
        self.reductions = nn.ModuleList(Conv3d(wide, width, 1) for wide, width in zip([*widths[1:], deepest], widths, strict=True))
        self.voxels = Conv3d((1 + len(windows)) * stem_stride**3, widths[0], 1)
        self.blocks = nn.ModuleList(ConvBlock(width) for width in widths)
        self.norm = GroupNorm(math.gcd(widths[0], 8), widths[0])

    def forward(self, stages: Sequence[Tensor], grids: Sequence[Size], volume: Tensor) -> Tensor:
        """[(B, d*h*w, C)] of all stages, their grids and the volume (B, 1, D, H, W) -> (B, d, h, w, widths[0])."""
        *scales, x = (tokens.unflatten(1, grid) for tokens, grid in zip(stages, grids, strict=True))  # (B, d, h, w, C)
        if self.skips is not None:
            scales = self.skips(scales)
        for level in reversed(range(len(scales))):
            x = self.laterals[level](scales[level]) + resized(self.reductions[level](x), grids[level])
            if level == 0:
                x = x + self.voxels(self._cells(volume))
            x = self.blocks[level](x)
        return F.gelu(self.norm(x))

    def _cells(self, volume: Tensor) -> Tensor:
        """The voxels of every cell of the stem: (B, 1, D, H, W) -> (B, d, h, w, (1 + windows) * stride^3), voxels beyond the volume 0."""
        stride, volume = self.stem_stride, windowed(volume.movedim(1, -1), self.windows).movedim(-1, 1)
        beyond = [-voxels % stride for voxels in volume.shape[2:]]
        x = F.pad(volume, (0, beyond[2], 0, beyond[1], 0, beyond[0]))
        x = x.unflatten(4, (-1, stride)).unflatten(3, (-1, stride)).unflatten(2, (-1, stride))
        return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4).movedim(1, -1)


class SegmentationHead(nn.Module):
    """Decoder and comparison: `features` of volumes, then `compare` with as many queries as one likes.

    Each cell of the stem's grid has an embedding for each of the smaller cells in it, `parts` along an axis.

    Args:
        encoder: whose stages it reads; nothing of it is kept.
        widths: see `UNetDecoder`.
        embedding_dim: P.
        embedding_stride: voxels that one embedding spans along an axis; it divides the stem's stride.
        dual_cross_attention: whether skip connections pass through DualCrossAttention.
        attention_level: the output of the encoder, from 0 for the stem, whose grid that has.
        attention_heads: of its spatial attention.

    Raises:
        ValueError: the encoder has no stages of falling resolution, or numbers do not fit to it.
    """

    def __init__(
        self,
        encoder: Encoder,
        widths: Sequence[int],
        embedding_dim: int,
        embedding_stride: int,
        dual_cross_attention: bool,
        attention_level: int,
        attention_heads: int,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, HierarchicalEncoder):
            raise ValueError(
                f"segmentation needs an encoder with stages of falling resolution, which {type(encoder).__name__} is not; "
                "take a dcformer, convnext3d, poolformer3d or transunet3d"
            )
        *skipped, _ = encoder.widths
        if len(widths) != len(skipped):
            raise ValueError(
                f"decoder_widths are {list(widths)} but must be {len(skipped)}, one for each output of the encoder but the last"
            )
        if embedding_stride < 1 or encoder.stem_stride % embedding_stride:
            raise ValueError(f"embedding_stride is {embedding_stride} but must divide the stem's stride, {encoder.stem_stride}")
        skips = DualCrossAttention(skipped, attention_level, attention_heads) if dual_cross_attention else None
        self.decoder = UNetDecoder(encoder.widths, encoder.stem_stride, widths, skips, encoder.windows)
        self.parts, self.embedding_stride = encoder.stem_stride // embedding_stride, embedding_stride
        self.embed = Linear(widths[0], embedding_dim * self.parts**3)
        self.pooled = Linear(sum(encoder.widths[-2:]), embedding_dim)
        self.evidence = Linear(widths[0], embedding_dim)
        # One element each, not zero dimensions: DeepSpeed cannot broadcast a scalar parameter.
        self.scale = nn.Parameter(torch.full((1,), 0.5))
        self.bias = nn.Parameter(torch.full((1,), -4.0))  # few voxels belong to a finding
        self.presence_scale = nn.Parameter(torch.ones(1))
        self.presence_bias = nn.Parameter(torch.zeros(1))

    def features(self, stages: Sequence[Tensor], grids: Sequence[Size], volume: Tensor) -> tuple[Tensor, Tensor]:
        """Of the cells of the stem's grid (B, d, h, w, C), and an embedding of the whole volume (B, P), in the encoder's type of activations."""
        dtype = compute_type(self.embed.weight.dtype, volume.device.type)
        with no_autocast(volume):
            stages = [tokens.to(dtype) for tokens in stages]
            whole = self.pooled(torch.cat([tokens.mean(dim=1) for tokens in stages[-2:]], dim=-1))
            return self.decoder(stages, grids, volume.to(dtype)), whole

    def voxel_embeddings(self, cells: Tensor, size: Sequence[int]) -> Tensor:
        """(B, P, d, h, w), d = D / embedding_stride rounded up and so on, for volumes of `size`."""
        with no_autocast(cells):
            return self._spread(self.embed(cells).movedim(-1, 1), size)

    def compare(self, cells: Tensor, whole: Tensor, queries: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits of masks (B, K, D, H, W) and of presence (B, K), float32, for queries (B, K, P) and volumes of `size`.

        They are the scaled products of queries and voxel embeddings. The queries are multiplied with the weights first, so that the embeddings,
        which may take more memory than all the rest, are never there.
        """
        with no_autocast(cells):
            queries = queries.to(cells.dtype)
            weight = self.embed.weight.to(cells.dtype).unflatten(0, (-1, self.parts**3))  # (P, parts^3, C)
            bias = self.embed.bias.to(cells.dtype).unflatten(0, (-1, self.parts**3))
            products = torch.einsum("bkp,psc->bksc", queries, weight).flatten(1, 2) @ cells.movedim(-1, 1).flatten(2)
            products = products + torch.einsum("bkp,ps->bks", queries, bias).flatten(1, 2).unsqueeze(-1)  # (B, K * parts^3, N)
            pointed = self._pointed(products, cells)  # (B, K, P)
            products = self._spread(products.unflatten(2, cells.shape[1:4]), size)  # (B, K, d, h, w)
            logits = widened(products) * widened(self.scale) + widened(self.bias)
            highest = logits.detach().flatten(2)  # what presence learns must not move the masks: at first it would flatten all peaks
            highest = highest.topk(min(HIGHEST, highest.shape[-1]), dim=-1).values.mean(dim=-1)  # (B, K)
            fit = widened((queries * (pointed + whole.unsqueeze(1))).sum(dim=-1)) * widened(self.scale)
            presence = widened(self.presence_scale) * highest + fit + widened(self.presence_bias)
            if logits.shape[2:] != torch.Size(size):
                logits = F.interpolate(logits, tuple(size), mode="trilinear", align_corners=False)
        return logits, presence

    def _pointed(self, products: Tensor, cells: Tensor) -> Tensor:
        """What lies where each query points: features of cells, averaged by the softmax of their best parts' products, (B, K, P)."""
        best = widened(products.detach().unflatten(1, (-1, self.parts**3)).amax(dim=2)) * widened(self.scale.detach())  # (B, K, N)
        pointed: Tensor = self.evidence(best.softmax(dim=-1).to(cells.dtype) @ cells.flatten(1, 3))
        return pointed

    def _spread(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """What cells have for their parts, to the grid of the parts: (B, C * parts^3, d, h, w) -> (B, C, d', h', w')."""
        x = x.unflatten(1, (-1, self.parts, self.parts, self.parts)).permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, C, d, parts, h, parts, w, parts)
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        depth, height, width = (-(-voxels // self.embedding_stride) for voxels in size)
        return x[:, :, :depth, :height, :width]


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """In which products are computed in the type that is said, whatever autocast would choose."""
    return torch.autocast(x.device.type, enabled=False) if torch.amp.is_autocast_available(x.device.type) else nullcontext()

"""Projectors: from stage tokens of the encoder to tokens of the language model (Med3DVLM paper, section 3.2.2 and Tables 6-8).

    mlp              2xMLP          last stage alone
    low_high_mlp     2xMLP-H        last two stages, one linear layer each, then a shared one
    mixer            NxMLP-Mixer-H  last two stages, N mixer layers each (the paper's choice: N = 2)
    spatial_pooling  M3D-LaMed's    last stage alone, its grid halved by averaging (M3D paper, arXiv 2404.00578)

Shapes: B batch; (d, h, w) grid, n = d*h*w tokens and C width of a stream (low = penultimate stage, high = last); E width of the language model.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

Grid = tuple[int, int, int]


def _two_layers(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def _channel_statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of every channel: (B, n, C) -> (C), (C); a little is added to the deviation, for channels that never change."""
    deviation, mean = torch.std_mean(tokens, dim=(0, 1))
    return mean, deviation + 1e-3


def _standardise_input(layer: nn.Linear, tokens: Tensor) -> None:
    """Make the layer give for these tokens what it gave for tokens of mean 0 and deviation 1 in every channel."""
    mean, deviation = _channel_statistics(tokens)
    layer.weight.div_(deviation)
    layer.bias.sub_(layer.weight @ mean)


class Projector(nn.Module):
    """Base of all projectors: `num_tokens` image tokens a volume; `standardise`; `forward`."""

    num_tokens: int

    def standardise(self, low: Tensor, high: Tensor) -> None:
        """Change the first layers' initial values so that every channel of these features counts alike, as if of mean 0 and deviation 1.

        An encoder's channels differ in scale by orders of magnitude; what is weak in them is learned much sooner from there.
        """
        raise NotImplementedError

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Project (B, n_low, C_low) and (B, n_high, C_high) to (B, num_tokens, E)."""
        raise NotImplementedError


class PositionedProjector(Projector):
    """A projector whose tokens first get learned position embeddings, which start from sines and cosines of each axis.

    At the start positions deviate as much as the tokens that `standardise` was shown, or by 1.
    """

    def __init__(self, projector: Projector, grids: tuple[Grid, Grid], widths: tuple[int, int]) -> None:
        super().__init__()
        self.inner, self.num_tokens = projector, projector.num_tokens  # named `projector` PEFT would take it for a second module
        self.low, self.high = (nn.Parameter(position_codes(grid, width)) for grid, width in zip(grids, widths, strict=True))

    @torch.no_grad()
    def standardise(self, low: Tensor, high: Tensor) -> None:
        for positions, tokens in ((self.low, low), (self.high, high)):
            positions.mul_(_channel_statistics(tokens)[1])
        self.inner.standardise(low + self.low, high + self.high)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.inner(low + self.low.to(low.dtype), high + self.high.to(high.dtype))


def position_codes(grid: Grid, width: int) -> Tensor:
    """Return (d*h*w, width): for every cell sines and cosines of its place on each axis, in waves of 2, 1, 1/2, ... of the grid's length.

    Channels take turns by axis and function, so that even a narrow code tells all three axes; the mean square of a channel is about 1.
    """
    places = torch.meshgrid(*((torch.arange(cells) + 0.5) / cells for cells in grid), indexing="ij")
    flat = torch.stack(places, dim=-1).reshape(-1, 3)  # (d*h*w, 3), from 0 to 1
    channel = torch.arange(width)
    axis, function, octave = channel % 3, channel // 3 % 2, channel // 6 % max(1, max(grid).bit_length())
    return 2**0.5 * torch.sin(torch.pi * (flat[:, axis] * 2.0**octave + 0.5 * function))


class MLPProjector(Projector):
    """(B, n_high, C_high) -> (B, n_high, E)."""

    def __init__(self, grids: tuple[Grid, Grid], widths: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.num_tokens = prod(grids[1])
        self.layers = _two_layers(widths[1], dim)

    @torch.no_grad()
    def standardise(self, low: Tensor, high: Tensor) -> None:
        first: Any = self.layers[0]
        _standardise_input(first, high)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.layers(high)


class SpatialPoolingProjector(MLPProjector):
    """The perceiver of M3D-LaMed: (B, n_high, C_high) -> (B, ceil(d/2) * ceil(h/2) * ceil(w/2), E).

    Cells are averaged two by two by two. At the end of an odd axis a cell is averaged without a neighbour, so that nothing of the volume is
    lost and an axis of one cell stays; the released code would drop it. On M3D's own grid, 8x16x16, both give 4x8x8.
    """

    def __init__(self, grids: tuple[Grid, Grid], widths: tuple[int, int], dim: int) -> None:
        super().__init__(grids, widths, dim)
        self.grid = grids[1]
        depth, height, width = (min(2, cells) for cells in self.grid)  # torch refuses to pair a single cell
        self.pool = nn.AvgPool3d((depth, height, width), ceil_mode=True)
        self.num_tokens = prod(-(-cells // 2) for cells in self.grid)

    @torch.no_grad()
    def standardise(self, low: Tensor, high: Tensor) -> None:
        super().standardise(low, self._pooled(high))

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.layers(self._pooled(high))

    def _pooled(self, high: Tensor) -> Tensor:
        cells = high.transpose(1, 2).unflatten(2, self.grid)  # (B, C, d, h, w)
        return self.pool(cells).flatten(2).transpose(1, 2)


class LowHighMLPProjector(Projector):
    """Low tokens, then high tokens: (B, n_low, C_low), (B, n_high, C_high) -> (B, n_low + n_high, E)."""

    def __init__(self, grids: tuple[Grid, Grid], widths: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.num_tokens = sum(map(prod, grids))
        self.low, self.high = nn.Linear(widths[0], dim), nn.Linear(widths[1], dim)
        self.shared = nn.Sequential(nn.GELU(), nn.Linear(dim, dim))

    @torch.no_grad()
    def standardise(self, low: Tensor, high: Tensor) -> None:
        _standardise_input(self.low, low)
        _standardise_input(self.high, high)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.shared(torch.cat([self.low(low), self.high(high)], dim=1))


class MixerLayer(nn.Module):
    """LayerNorm, MLP over the tokens, LayerNorm, MLP over the channels; no residual: (B, n, C) -> (B, n', C') (equations 6 and 7)."""

    def __init__(self, tokens: tuple[int, int], widths: tuple[int, int]) -> None:
        super().__init__()
        self.token_norm, self.token_mlp = nn.LayerNorm(widths[0]), _two_layers(*tokens)
        self.channel_norm, self.channel_mlp = nn.LayerNorm(widths[0]), _two_layers(*widths)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mlp(self.token_norm(x).transpose(1, 2)).transpose(1, 2)  # (B, n', C)
        return self.channel_mlp(self.channel_norm(x))  # (B, n', C')


class MixerStack(nn.Sequential):
    """Mixer layers one after another: `tokens=(256, 192, 128), widths=(384, 1792, 3584)` makes two."""

    def __init__(self, tokens: Sequence[int], widths: Sequence[int]) -> None:
        steps = zip(tokens[:-1], tokens[1:], widths[:-1], widths[1:], strict=True)
        super().__init__(*(MixerLayer((n_in, n_out), (c_in, c_out)) for n_in, n_out, c_in, c_out in steps))


class MixerProjector(Projector):
    """Two stacks of mixer layers, each ending with half of the low stream's tokens; joined: -> (B, n_low, E) for an even n_low.

    At the paper's size the low stream goes 256 -> 192 -> 128 and the high stream 32 -> 64 -> 128; other grids follow the same steps,
    the low stream evenly, the high stream by a constant factor. Widths double up to E.
    """

    def __init__(self, grids: tuple[Grid, Grid], widths: tuple[int, int], dim: int, depth: int = 2) -> None:
        if depth < 1 or dim < 2 ** (depth - 1):
            raise ValueError(f"a mixer for a language model {dim} wide cannot have {depth} layers; it takes 1 to {dim.bit_length()}")
        super().__init__()
        low, high = map(prod, grids)
        target = max(1, low // 2)
        layers = range(1, depth + 1)
        doubling = [dim // 2 ** (depth - layer) for layer in layers]
        self.low = MixerStack([low, *(round(low + (target - low) * layer / depth) for layer in layers)], [widths[0], *doubling])
        self.high = MixerStack([high, *(round(high * (target / high) ** (layer / depth)) for layer in layers)], [widths[1], *doubling])
        self.num_tokens = 2 * target

    @torch.no_grad()
    def standardise(self, low: Tensor, high: Tensor) -> None:
        """Set the first norms' weight and bias so that every channel of these features leaves them with mean 0 and deviation 1."""
        for stack, tokens in ((self.low, low), (self.high, high)):
            norm = next(module for module in stack.modules() if isinstance(module, nn.LayerNorm))
            mean, deviation = _channel_statistics(nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps))
            norm.weight.copy_(1 / deviation)
            norm.bias.copy_(-mean / deviation)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.cat([self.low(low), self.high(high)], dim=1)


PROJECTORS: dict[str, type[Projector]] = {
    "mlp": MLPProjector,
    "low_high_mlp": LowHighMLPProjector,
    "mixer": MixerProjector,
    "spatial_pooling": SpatialPoolingProjector,
}


def build_projector(
    name: str, grids: tuple[Grid, Grid], widths: tuple[int, int], dim: int, depth: int = 2, position_embedding: bool = False
) -> Projector:
    """Build the projector of that name; its `num_tokens` is the number of image tokens.

    Args:
        grids: (d, h, w) of the two outputs of the encoder, low and high; in the paper its last two stages.
        widths: their channels.
        dim: width of the language model.
        depth: mixer layers a stream, "mixer" alone.
        position_embedding: whether every token is given its position before.

    Raises:
        ValueError: the name is unknown, or the depth does not fit the width.
    """
    if name not in PROJECTORS:
        raise ValueError(f"projector {name!r} is unknown; known: {', '.join(PROJECTORS)}")
    settings = {"depth": depth} if name == "mixer" else {}
    projector = PROJECTORS[name](grids, widths, dim, **settings)
    return PositionedProjector(projector, grids, widths) if position_embedding else projector

"""Projectors: stage tokens of the encoder -> tokens of the language model (Med3DVLM paper, section 3.2.2 and Tables 6-8).

    mlp             2xMLP          last stage alone
    low_high_mlp    2xMLP-H        last two stages, one linear layer each, then a shared one
    mixer           NxMLP-Mixer-H  last two stages, N mixer layers each (the paper's choice: N = 2)

Shapes: B batch; n tokens and C width of a stream (low = penultimate stage, high = last); E width of the language model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PROJECTORS = ("mlp", "low_high_mlp", "mixer")


def _two_layers(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


class MLPProjector(nn.Module):
    """(B, n_high, C_high) -> (B, n_high, E)."""

    def __init__(self, tokens: tuple[int, int], widths: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.num_tokens = tokens[1]
        self.layers = _two_layers(widths[1], dim)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.layers(high)


class LowHighMLPProjector(nn.Module):
    """Low tokens, then high tokens: (B, n_low, C_low), (B, n_high, C_high) -> (B, n_low + n_high, E)."""

    def __init__(self, tokens: tuple[int, int], widths: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.num_tokens = sum(tokens)
        self.low, self.high = nn.Linear(widths[0], dim), nn.Linear(widths[1], dim)
        self.shared = nn.Sequential(nn.GELU(), nn.Linear(dim, dim))

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


class MixerProjector(nn.Module):
    """Two stacks of mixer layers, each ending with half of the low stream's tokens; joined: -> (B, n_low, E) for an even n_low.

    At the paper's size the low stream goes 256 -> 192 -> 128 and the high stream 32 -> 64 -> 128; other grids follow the same steps,
    the low stream evenly, the high stream by a constant factor. Widths double up to E.
    """

    def __init__(self, tokens: tuple[int, int], widths: tuple[int, int], dim: int, depth: int = 2) -> None:
        super().__init__()
        low, high = tokens
        target = max(1, low // 2)
        layers = range(1, depth + 1)
        doubling = [dim // 2 ** (depth - layer) for layer in layers]
        self.low = MixerStack([low, *(round(low + (target - low) * layer / depth) for layer in layers)], [widths[0], *doubling])
        self.high = MixerStack([high, *(round(high * (target / high) ** (layer / depth)) for layer in layers)], [widths[1], *doubling])
        self.num_tokens = 2 * target

    @torch.no_grad()
    def standardise(self, low: Tensor, high: Tensor) -> None:
        """Set the first norms' weight and bias so that every channel of these features leaves them with mean 0 and deviation 1.

        An encoder's channels differ in scale by orders of magnitude; what is weak in them is learned much sooner from there.
        """
        for stack, tokens in ((self.low, low), (self.high, high)):
            norm = next(module for module in stack.modules() if isinstance(module, nn.LayerNorm))
            deviation, mean = torch.std_mean(nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps), dim=(0, 1))
            norm.weight.copy_(1 / (deviation + 1e-3))
            norm.bias.copy_(-mean / (deviation + 1e-3))

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.cat([self.low(low), self.high(high)], dim=1)


Projector = MLPProjector | LowHighMLPProjector | MixerProjector


def build_projector(name: str, tokens: tuple[int, int], widths: tuple[int, int], dim: int, depth: int = 2) -> Projector:
    """The projector of that name; `num_tokens` of it says how many image tokens it makes.

    Args:
        tokens, widths: token counts and channels of the encoder's last two stages (low, high).
        dim: width of the language model.
        depth: mixer layers a stream, "mixer" alone.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "mlp":
        return MLPProjector(tokens, widths, dim)
    if name == "low_high_mlp":
        return LowHighMLPProjector(tokens, widths, dim)
    if name == "mixer":
        return MixerProjector(tokens, widths, dim, depth)
    raise ValueError(f"projector {name!r} is unknown; known: {', '.join(PROJECTORS)}")

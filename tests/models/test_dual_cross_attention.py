"""DualCrossAttention against the paper's formulas in plain loops, in float64; parameters and operations against a count by hand."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from med3dvlm.models.dual_cross_attention import DualCrossAttention

WIDTHS, HEADS, LEVEL = (4, 6, 8), 2, 1
GRIDS = ((4, 6, 8), (2, 3, 4), (1, 2, 2))  # the second is the common one: 24 tokens
TOKENS = 24


def attention() -> DualCrossAttention:
    module = DualCrossAttention(WIDTHS, LEVEL, HEADS).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def scales() -> list[Tensor]:
    return [torch.randn(2, *grid, width, dtype=torch.float64) for grid, width in zip(GRIDS, WIDTHS, strict=True)]


def averages(scale: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(d, h, w, C) -> (N, C): the mean of the cells that overlap each cell of the grid."""
    tokens = []
    for place in torch.cartesian_prod(*map(torch.arange, grid)).tolist():
        window = [
            slice(math.floor(at * length / cells), math.ceil((at + 1) * length / cells))
            for at, cells, length in zip(place, grid, scale.shape[:3], strict=True)
        ]
        tokens.append(scale[tuple(window)].reshape(-1, scale.shape[3]).mean(dim=0))
    return torch.stack(tokens)


def affine(module: nn.Module, x: Tensor) -> Tensor:
    return x * module.weight + module.bias


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    return affine(norm, centred / (centred.square().mean(dim=1, keepdim=True) + norm.eps).sqrt())


def softmax(values: list[Tensor]) -> Tensor:
    exponents = torch.stack([value.exp() for value in values])
    return exponents / exponents.sum()


def interpolated(values: Tensor, size: int, axis: int) -> Tensor:
    """Linear along one axis, cells as wide as they are, the outermost values beyond their middles."""
    length, rows = values.shape[axis], []
    for place in range(size):
        at = min(max((place + 0.5) * length / size - 0.5, 0), length - 1)
        below = min(int(at), max(length - 2, 0))
        above = min(below + 1, length - 1)
        rows.append(values.select(axis, below) * (1 - (at - below)) + values.select(axis, above) * (at - below))
    return torch.stack(rows, dim=axis)


def by_loops(module: DualCrossAttention, inputs: list[Tensor]) -> list[Tensor]:
    """Of one volume, scales (d, h, w, C_i)."""
    tokens = [affine(embed, averages(scale, GRIDS[LEVEL])) for embed, scale in zip(module.embed, inputs, strict=True)]
    joined_width = sum(WIDTHS)

    own = [normed(norm, each) for norm, each in zip(module.channel_norms, tokens, strict=True)]
    joined = torch.cat(own, dim=1)
    for scale, attend in enumerate(module.channel_attention):
        query, key, value = affine(attend.query, own[scale]), affine(attend.key, joined), affine(attend.value, joined)
        mixed = torch.zeros_like(query)
        for channel in range(WIDTHS[scale]):
            weights = softmax([query[:, channel] @ key[:, other] / math.sqrt(joined_width) for other in range(joined_width)])
            for other in range(joined_width):
                mixed[:, channel] += weights[other] * value[:, other]
        tokens[scale] = tokens[scale] + affine(attend.project, mixed)

    own = [normed(norm, each) for norm, each in zip(module.spatial_norms, tokens, strict=True)]
    joined = torch.cat(own, dim=1)
    for scale, attend in enumerate(module.spatial_attention):
        query, key, value = affine(attend.query, joined), affine(attend.key, joined), affine(attend.value, own[scale])
        mixed = torch.zeros_like(value)
        wide, narrow = joined_width // HEADS, WIDTHS[scale] // HEADS
        for head in range(HEADS):
            part, of_value = slice(head * wide, (head + 1) * wide), slice(head * narrow, (head + 1) * narrow)
            for token in range(TOKENS):
                weights = softmax([query[token, part] @ key[other, part] / math.sqrt(wide) for other in range(TOKENS)])
                for other in range(TOKENS):
                    mixed[token, of_value] += weights[other] * value[other, of_value]
        tokens[scale] = tokens[scale] + affine(attend.project, mixed)

    results = []
    for scale, (norm, convolve) in enumerate(zip(module.norms, module.convolutions, strict=True)):
        x = normed(norm, tokens[scale])
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        x = x.unflatten(0, GRIDS[LEVEL])
        for axis, size in enumerate(GRIDS[scale]):
            x = interpolated(x, size, axis)
        results.append(inputs[scale] + x @ convolve.weight.T + convolve.bias)  # the convolution last, as published
    return results


def test_values_and_gradients_are_the_papers_formulas() -> None:
    """Measured: 1e-13."""
    module, inputs = attention(), scales()
    weights = [torch.randn_like(scale) for scale in inputs]
    found, gradients = [], []
    for way in ("module", "loops"):
        volumes = (by_loops(module, list(one)) for one in zip(*inputs, strict=True))
        results = module(inputs) if way == "module" else [torch.stack(scale) for scale in zip(*volumes, strict=True)]
        module.zero_grad()
        sum((result * weight).sum() for result, weight in zip(results, weights, strict=True)).backward()
        found.append(results)
        gradients.append({name: parameter.grad.clone() for name, parameter in module.named_parameters()})
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-7, atol=1e-7, msg=name)


def test_parameters_are_as_counted_by_hand() -> None:
    """Of scale i: embedding and two projections 6 C_i; Q 2 C_i, K and V 4 C; Q and K 4 C, V 2 C_i; three norms 6 C_i; a convolution C_i^2 + C_i."""
    joined = sum(WIDTHS)
    expected = sum(6 * width + 2 * width + 4 * joined + 4 * joined + 2 * width + 6 * width + width * width + width for width in WIDTHS)
    assert sum(parameter.numel() for parameter in attention().parameters()) == expected


def test_operations_are_as_counted_by_hand() -> None:
    """Of scale i: channels 2 C_i C N, tokens N^2 (C + C_i), the convolution N C_i^2 multiply-accumulates a volume."""
    joined = sum(WIDTHS)
    expected = sum(2 * width * joined * TOKENS + TOKENS**2 * (joined + width) + TOKENS * width * width for width in WIDTHS)
    with torch.device("meta"):
        module = DualCrossAttention(WIDTHS, LEVEL, HEADS)
        inputs = [torch.empty(1, *grid, width) for grid, width in zip(GRIDS, WIDTHS, strict=True)]
    with FlopCounterMode(display=False) as counter:
        module(inputs)
    assert counter.get_total_flops() // 2 == expected


def test_every_scale_hears_of_every_other() -> None:
    module, inputs = attention(), scales()
    before = module(inputs)
    for changed in range(len(inputs)):
        given = [scale + torch.randn_like(scale) * (number == changed) for number, scale in enumerate(inputs)]
        for number, (one, other) in enumerate(zip(module(given), before, strict=True)):
            added = (one - given[number]) - (other - inputs[number])
            assert added.abs().max() > 1e-3, (changed, number)


@pytest.mark.parametrize(("level", "heads", "sentence"), [(3, 2, "there are 3, from 0 to 2"), (1, 4, "not all multiples")])
def test_wrong_numbers_get_a_sentence(level: int, heads: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DualCrossAttention(WIDTHS, level, heads)

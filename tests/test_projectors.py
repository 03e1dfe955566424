"""Projectors against the paper's equations and token counts. The released numbers are in test_published_layout."""

import copy
import itertools
import math
from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

from med3dvlm.encoders import build_encoder
from med3dvlm.projectors import PROJECTORS, MixerLayer, MixerStack, build_projector

GRIDS = ((4, 2, 2), (1, 2, 2))  # of 16 and 4 tokens


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def test_mixer_layer_follows_the_equations_without_a_residual() -> None:
    layer = MixerLayer((5, 3), (4, 6)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    weights = layer.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def mlp(x: Tensor, name: str) -> Tensor:
        hidden = gelu(torch.einsum("...i,oi->...o", x, weights[f"{name}.0.weight"]) + weights[f"{name}.0.bias"])
        return torch.einsum("...i,oi->...o", hidden, weights[f"{name}.2.weight"]) + weights[f"{name}.2.bias"]

    rows = norm(x, "token_norm")
    mixed = torch.stack([mlp(rows[:, :, channel], "token_mlp") for channel in range(4)], dim=2)  # (B, 3, 4)
    expected = mlp(norm(mixed, "channel_norm"), "channel_mlp")
    assert torch.allclose(layer(x), expected, atol=1e-12)


def test_mixer_at_the_papers_size() -> None:
    with torch.device("meta"):
        projector = build_projector("mixer", ((4, 8, 8), (2, 4, 4)), (384, 768), 3584)
    steps = [
        [(layer.token_mlp[0].in_features, layer.token_mlp[2].out_features) for layer in stack] for stack in (projector.low, projector.high)
    ]
    assert steps == [[(256, 192), (192, 128)], [(32, 64), (64, 128)]]
    widths = [[layer.channel_mlp[2].out_features for layer in stack] for stack in (projector.low, projector.high)]
    assert widths == [[1792, 3584], [1792, 3584]]
    assert projector.num_tokens == 256


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(128, 256, 256), (32, 80, 80), (40, 56, 72), (10, 20, 30), (8, 8, 8)])
@pytest.mark.parametrize("name", PROJECTORS)
def test_token_counts_are_computed_from_the_grids(name: str, size: tuple[int, int, int], depth: int) -> None:
    encoder = build_encoder("dcformer_nano")
    grids = encoder.grids(size)[-2:]
    low, high = map(prod, grids)
    projector = build_projector(name, grids, encoder.widths[-2:], 48, depth)
    tokens = projector(torch.randn(2, low, 128), torch.randn(2, high, 256))
    assert tokens.shape == (2, projector.num_tokens, 48)
    halved = prod(-(-axis // 128) for axis in size)  # the last stage's cells are 64 voxels long
    expected = {"mlp": high, "low_high_mlp": low + high, "mixer": max(2, low // 2 * 2), "spatial_pooling": halved}
    assert projector.num_tokens == expected[name]


@pytest.mark.parametrize("grid", [(4, 8, 6), (3, 1, 5), (1, 1, 1), (2, 7, 1)])
def test_the_perceiver_averages_neighbours_then_projects(grid: tuple[int, int, int]) -> None:
    projector = build_projector("spatial_pooling", ((9, 9, 9), grid), (3, 4), 5).double()
    tokens = torch.randn(2, prod(grid), 4, dtype=torch.float64)
    cells = {place: tokens[:, number] for number, place in enumerate(product(*map(range, grid)))}  # d outermost
    expected = []
    for corner in product(*(range(0, axis, 2) for axis in grid)):
        places = product(*((first, first + 1) for first in corner))
        expected.append(torch.stack([cells[place] for place in places if place in cells]).mean(dim=0))
    weights = projector.state_dict()
    hidden = gelu(torch.stack(expected, dim=1) @ weights["layers.0.weight"].T + weights["layers.0.bias"])
    answer = projector(torch.randn(2, 729, 3, dtype=torch.float64), tokens)
    assert answer.shape == (2, projector.num_tokens, 5)
    assert torch.allclose(answer, hidden @ weights["layers.2.weight"].T + weights["layers.2.bias"], atol=1e-12)


def test_the_perceiver_at_its_papers_size() -> None:
    """32x256x256 voxels in patches of 4x16x16 are 2048 tokens, which become 256 for the language model."""
    assert build_projector("spatial_pooling", ((8, 16, 16), (8, 16, 16)), (768, 768), 64).num_tokens == 256


def test_streams_do_not_mix_and_low_comes_first() -> None:
    low, high = torch.randn(1, 16, 6, requires_grad=True), torch.randn(1, 4, 8, requires_grad=True)
    for name, low_tokens in (("mixer", 8), ("low_high_mlp", 16)):
        tokens = build_projector(name, GRIDS, (6, 8), 10)(low, high)
        from_low, from_high = torch.autograd.grad(
            tokens[:, :low_tokens].sum(), (low, high), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        assert from_low.abs().sum() > 0 and from_high.abs().sum() == 0
        from_low, from_high = torch.autograd.grad(tokens[:, low_tokens:].sum(), (low, high), allow_unused=True, materialize_grads=True)
        assert from_low.abs().sum() == 0 and from_high.abs().sum() > 0


def test_a_mixer_stack_has_one_layer_for_each_step() -> None:
    stack = MixerStack(tokens=(8, 6, 4), widths=(3, 5, 7))
    assert stack(torch.randn(2, 8, 3)).shape == (2, 4, 7)
    with pytest.raises(ValueError):
        MixerStack(tokens=(8, 6, 4), widths=(3, 5))


def test_an_unknown_projector_is_refused() -> None:
    with pytest.raises(ValueError, match="'qformer' is unknown; known: mlp, low_high_mlp, mixer, spatial_pooling"):
        build_projector("qformer", GRIDS, (6, 8), 10)


@pytest.mark.parametrize("depth", [0, -1, 5])
def test_the_depth_of_a_mixer_is_limited_by_its_widths(depth: int) -> None:
    assert build_projector("mixer", GRIDS, (6, 8), 10, depth=4).num_tokens == 16
    with pytest.raises(ValueError, match=f"10 wide cannot have {depth} layers; it takes 1 to 4"):
        build_projector("mixer", GRIDS, (6, 8), 10, depth)


def uneven_features() -> tuple[Tensor, Tensor]:
    low = torch.randn(5, 16, 6) * torch.tensor([50.0, 1, 1, 1, 1, 2]) + torch.tensor([0.0, 30, 0, -9, 0, 0])
    return low, torch.randn(5, 4, 8) * torch.arange(1, 9) + torch.arange(8)


@pytest.mark.parametrize("name", ["mlp", "low_high_mlp", "spatial_pooling"])
def test_standardise_equals_standardised_features(name: str) -> None:
    low, high = uneven_features()
    before = build_projector(name, GRIDS, (6, 8), 10)
    after = copy.deepcopy(before)
    after.standardise(low, high)
    pooled = high.mean(dim=1, keepdim=True) if name == "spatial_pooling" else high  # its statistics are those of what it pools
    even = [(x - seen.mean(dim=(0, 1))) / (seen.std(dim=(0, 1)) + 1e-3) for x, seen in ((low, low), (high, pooled))]
    with torch.no_grad():
        assert not torch.allclose(after(low, high), before(low, high), atol=0.1)
        assert torch.allclose(after(low, high), before(*even), atol=1e-4)


def test_standardise_evens_out_the_channels_of_both_streams() -> None:
    low, high = uneven_features()
    projector = build_projector("mixer", GRIDS, (6, 8), 10)
    projector.standardise(low, high)
    for stack, tokens in ((projector.low, low), (projector.high, high)):
        normed = stack[0].token_norm(tokens).flatten(0, 1)
        assert torch.allclose(normed.mean(dim=0), torch.zeros(()), atol=1e-4)
        assert torch.allclose(normed.std(dim=0), torch.ones(()), atol=0.02)  # 1e-3 is added to deviations, the smallest here 0.06


def test_positions_are_added_with_the_scale_of_the_tokens() -> None:
    torch.manual_seed(0)
    grids, widths = ((2, 3, 5), (1, 2, 2)), (7, 12)
    projector = build_projector("low_high_mlp", grids, widths, 8, position_embedding=True)
    assert projector.num_tokens == 34
    for positions, (depth, height, width), channels in zip((projector.low, projector.high), grids, widths, strict=True):
        octaves = max(depth, height, width).bit_length()
        for cell, (d, h, w) in enumerate(itertools.product(range(depth), range(height), range(width))):
            place = ((d + 0.5) / depth, (h + 0.5) / height, (w + 0.5) / width)
            for channel in range(channels):
                angle = math.pi * (place[channel % 3] * 2 ** (channel // 6 % octaves) + (channel // 3 % 2) / 2)
                assert float(positions[cell, channel]) == pytest.approx(math.sqrt(2) * math.sin(angle), abs=1e-5)
    low, high = 5 * torch.randn(4, 30, 7), torch.randn(4, 4, 12)
    plain, start = projector.inner, [positions.detach().clone() for positions in (projector.low, projector.high)]
    torch.testing.assert_close(projector(low, high), plain(low + start[0], high + start[1]))
    projector.standardise(low, high)
    torch.testing.assert_close(projector.low / start[0], (low.std(dim=(0, 1)) + 1e-3).expand(30, 7), rtol=1e-4, atol=1e-4)

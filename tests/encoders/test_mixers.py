"""Blocks of the convolutional families against plain loops over cells and formulas; odd grids, so that swapped axes fail."""

import copy
import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from med3dvlm.encoders.convnext3d import ConvNeXt3D, DepthwiseConv
from med3dvlm.encoders.hierarchy import ConvStem, MetaFormerBlock, MetaNeXtBlock, build_stages
from med3dvlm.encoders.layers import GroupNorm
from med3dvlm.encoders.poolformer3d import PoolFormer3D, Pooling
from med3dvlm.encoders.transunet3d import ConvBlock, TransUNet3D
from med3dvlm.encoders.vit3d import SelfAttention
from tests.encoders.small import randomised

GRID = (3, 4, 5)


def neighbours(grid: tuple[int, ...], cell: tuple[int, ...], reach: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield pairs of an offset in the kernel, counted from 0, and the cell of the grid at that offset."""
    found = []
    for offset in product(range(2 * reach + 1), repeat=3):
        there = tuple(at + step - reach for at, step in zip(cell, offset, strict=True))
        if all(0 <= at < extent for at, extent in zip(there, grid, strict=True)):
            found.append((offset, there))
    return found


def convolved(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """(d, h, w, C_in) and (C_out, C_in, k, k, k) -> (d', h', w', C_out), cell by cell, zeros beyond the grid."""
    grid, reach = x.shape[:3], weight.shape[2] // 2
    result = torch.zeros(*(math.ceil(extent / stride) for extent in grid), len(weight), dtype=x.dtype)
    for cell in product(*(range(extent) for extent in result.shape[:3])):
        for (a, b, c), there in neighbours(grid, tuple(stride * at for at in cell), reach):
            result[cell] += weight[:, :, a, b, c] @ x[there]
    return result


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def layer_normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def mlp_of(block: MetaNeXtBlock | MetaFormerBlock, x: Tensor) -> Tensor:
    mlp = block.mlp
    return gelu(x @ mlp.expand.weight.T + mlp.expand.bias) @ mlp.reduce.weight.T + mlp.reduce.bias


def first_block(encoder: nn.Module) -> nn.Module:
    return encoder.stages[0][1]


def test_convnext_block_is_its_formula() -> None:
    block = randomised(first_block(ConvNeXt3D((1,), (3, 4)))).double()
    x = torch.randn(2, *GRID, 4, dtype=torch.float64)
    dense = torch.zeros(4, 4, 7, 7, 7, dtype=torch.float64)
    dense[range(4), range(4)] = block.mixer.weight[:, 0]
    with torch.no_grad():
        mixed = torch.stack([convolved(volume, dense) for volume in x]) + block.mixer.bias
        expected = x + block.scale * mlp_of(block, layer_normed(mixed, block.norm))
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("grid", [GRID, (2, 1, 4)])
def test_pooling_is_the_mean_of_the_cells_around(grid: tuple[int, int, int]) -> None:
    x = torch.randn(2, *grid, 4, dtype=torch.float64)
    expected = torch.empty_like(x)
    for number, *cell in product(range(2), *(range(extent) for extent in grid)):
        around = [x[number][there] for _, there in neighbours(grid, tuple(cell), 1)]
        expected[number][tuple(cell)] = sum(around) / len(around) - x[number][tuple(cell)]
    torch.testing.assert_close(Pooling(3)(x), expected)
    assert not list(Pooling(3).parameters())


def test_volume_norm_takes_mean_and_deviation_of_each_whole_volume() -> None:
    norm = randomised(GroupNorm(1, 4)).double()
    x = 3 + torch.randn(2, *GRID, 4, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4])
    centred = x - x.mean(dim=(1, 2, 3, 4), keepdim=True)
    expected = centred / (centred.square().mean(dim=(1, 2, 3, 4), keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)


def test_poolformer_block_is_its_formula() -> None:
    block = randomised(first_block(PoolFormer3D((1,), (3, 4)))).double()
    assert isinstance(block.mixer, Pooling) and isinstance(block.norm1, GroupNorm) and block.norm1.num_groups == block.norm2.num_groups == 1
    x = torch.randn(2, *GRID, 4, dtype=torch.float64)
    y = x + block.scale1.factor * block.mixer(block.norm1(x))
    expected = y + block.scale2.factor * mlp_of(block, block.norm2(y))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_transunet_block_is_its_formula(training: bool) -> None:
    block = randomised(ConvBlock(4)).double().train(training)
    x = torch.randn(2, *GRID, 4, dtype=torch.float64)

    def normed(y: Tensor, norm: nn.BatchNorm3d) -> Tensor:
        mean, variance = (y.mean((0, 1, 2, 3)), y.var((0, 1, 2, 3), correction=0)) if training else (norm.running_mean, norm.running_var)
        return (y - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias

    with torch.no_grad():
        y = normed(torch.stack([convolved(volume, block.conv1.weight) for volume in x]), block.norm1).clamp(min=0)
        y = normed(torch.stack([convolved(volume, block.conv2.weight) for volume in y]), block.norm2)
        torch.testing.assert_close(block(x), (x + y).clamp(min=0))


def test_transunet_ends_with_a_transformer_over_the_last_grid() -> None:
    encoder = TransUNet3D((1, 1, 1, 2), (6, 8, 8, 8, 16), head_width=8)
    last, norm = encoder.stages[-1]
    assert [type(block) for stage in encoder.stages[:-1] for block in stage[1:]] == [ConvBlock] * 3
    assert [type(block.mixer) for block in last[1:]] == [SelfAttention] * 2 and last[1].mixer.heads == 2
    x = torch.randn(1, 4, 4, 6, 8)
    tokens = norm(last(x)).flatten(1, 3)
    assert tokens.mean(-1).abs().max() < 1e-5  # the final norm
    changed = x.clone()
    changed[0, 0, 0, 0] += 10
    assert ((norm(last(changed)).flatten(1, 3) - tokens).abs().amax(-1) > 0).all()  # every token sees every cell


@pytest.mark.parametrize("stride", [4, 2])
def test_stem_is_a_strided_convolution(stride: int) -> None:
    stem = ConvStem(3, stride).double()
    x = torch.randn(3, 5, 9, 6, 1, dtype=torch.float64)  # three volumes: a batch crashed a fast path of torch 2.14
    with torch.no_grad():
        expected = torch.stack([convolved(volume, stem.conv.weight, stride) for volume in x]) + stem.conv.bias
        torch.testing.assert_close(stem(x), expected)
        torch.testing.assert_close(stem.float()(x.float()), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(8, 16, 16), (4, 8, 8), (2, 4, 4)])
def test_depthwise_gradients_in_bfloat16_where_the_kernel_is_longer_than_an_axis(grid: tuple[int, int, int]) -> None:
    """torch 2.14 gives wrong results on CPUs in a channels-last Conv3d of such sizes, those of the last stages."""
    conv = DepthwiseConv(16, 7)
    x = torch.randn(2, *grid, 16)
    exact = copy.deepcopy(conv).double()
    exact(x.double()).square().sum().backward()
    conv.bfloat16()(x.bfloat16()).float().square().sum().backward()
    assert (conv.weight.grad - exact.weight.grad).norm() < 0.02 * exact.weight.grad.norm()


def test_layer_scale_is_optional() -> None:
    block = MetaFormerBlock(4, nn.Identity(), nn.LayerNorm)
    assert not [name for name, _ in block.named_parameters() if "scale" in name]
    x = torch.randn(2, 3, 4)
    y = x + layer_normed(x, block.norm1)
    torch.testing.assert_close(block(x), y + mlp_of(block, layer_normed(y, block.norm2)))


def test_stages_know_their_number_and_width() -> None:
    asked = []
    build_stages(lambda stage, channels: asked.append((stage, channels)) or nn.Identity(), (1, 2), (4, 6, 8))
    assert asked == [(0, 6), (1, 8), (1, 8)]

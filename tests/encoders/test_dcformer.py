"""DCFormer against the same network written literally with Conv3d, BatchNorm3d and 1x1x1 convolutions, in double precision: values and gradients."""

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from benchmarks.literal_encoder import LiteralDownsample, literal
from med3dvlm.encoders import build_encoder, count_parameters, list_encoders
from med3dvlm.encoders.dcformer import SIZES, DCFormer
from med3dvlm.encoders.decomposed import AxisConv
from med3dvlm.encoders.hierarchy import Downsample
from med3dvlm.encoders.layers import BatchNorm
from tests.encoders.small import randomised

ODD = (10, 20, 30)
TOLERANCE = 1e-5  # of the reference's spread


def relative(ours: Tensor, reference: Tensor) -> float:
    """The largest difference relative to the reference's spread."""
    assert ours.shape == reference.shape
    return float((ours - reference).detach().abs().max() / reference.detach().std())


def copy_literal(ours: nn.Module, literal: nn.Module) -> None:
    """Give `literal` the weights of `ours`: the same names, kernels spread over three axes."""
    weights = ours.state_dict()
    literal.load_state_dict({name: weights[name].reshape(tensor.shape) for name, tensor in literal.state_dict().items()})
    assert len(weights) == len(literal.state_dict())


@pytest.mark.parametrize(
    ("axis", "stride", "batch", "size", "depthwise"),
    [
        *product(range(3), (1, 2, 4), (1, 3), (ODD, (3, 4, 2), (7, 5, 9)), (True, False)),
        *product(range(3), (1,), (2,), ((1, 1, 1),), (True,)),
    ],
)
def test_axis_conv_equals_conv3d_in_value_and_gradient(
    axis: int, stride: int, batch: int, size: tuple[int, int, int], depthwise: bool
) -> None:
    kernel, inputs, outputs = (9, 6, 6) if depthwise else (7, 2, 5)
    ours = AxisConv(inputs, outputs, kernel, axis, stride, groups=inputs if depthwise else 1)
    shape, padding = [1, 1, 1], [0, 0, 0]
    shape[axis], padding[axis] = kernel, kernel // 2
    # In double precision: torch 2.14's float32 Conv3d corrupts memory at some of these sizes on some processors.
    literal = nn.Conv3d(inputs, outputs, shape, stride, padding, groups=inputs if depthwise else 1).double()
    copy_literal(ours, literal)
    x = torch.randn(batch, *size, inputs, requires_grad=True)
    x_literal = x.detach().double().movedim(-1, 1).clone().requires_grad_()
    y, y_literal = ours(x), literal(x_literal)
    assert torch.allclose(y.movedim(-1, 1).double(), y_literal, atol=2e-6)
    direction = torch.randn(y_literal.shape)
    y.movedim(-1, 1).backward(direction)
    y_literal.backward(direction.double())
    assert torch.allclose(x.grad.movedim(-1, 1).double(), x_literal.grad, atol=2e-6)
    for ours_gradient, gradient in ((ours.weight.grad, literal.weight.grad), (ours.bias.grad, literal.bias.grad)):
        difference = (ours_gradient - gradient.reshape(ours_gradient.shape)).abs().max()
        assert difference < TOLERANCE * gradient.abs().max() + 1e-6  # sums of up to 18,000 products; 3e-6 of the largest measured


def test_the_stems_third_branch_with_a_batch() -> None:
    """torch 2.14 corrupts memory on CPUs in a channels-last Conv3d of this shape."""
    conv = AxisConv(1, 8, 7, axis=2, stride=4)
    literal = nn.Conv3d(1, 8, (1, 1, 7), 4, (0, 0, 3)).double()
    copy_literal(conv, literal)
    x = torch.randn(4, 16, 24, 40, 1)
    assert torch.allclose(conv(x).movedim(-1, 1).double(), literal(x.movedim(-1, 1).double().contiguous()), atol=2e-6)


@pytest.mark.parametrize("axis", range(3))
def test_gradients_in_bfloat16_where_the_kernel_is_longer_than_the_axis(axis: int) -> None:
    """torch 2.14 gives wrong results on CPUs in a depthwise channels-last Conv3d of these sizes, those of stages 3 and 4."""
    conv = AxisConv(32, 32, 9, axis, groups=32)
    x = torch.randn(2, 8, 8, 4, 32)
    exact = copy.deepcopy(conv).double()
    exact(x.double()).square().sum().backward()
    conv.bfloat16()
    conv(x.bfloat16()).float().square().sum().backward()
    assert relative(conv.weight.grad.double(), exact.weight.grad) < 0.05  # 0.015 measured; garbage is 0.7 to infinite


def test_batch_norm_equals_batchnorm3d() -> None:
    ours, literal = BatchNorm(6).double(), nn.BatchNorm3d(6).double()
    x = 3 + 2 * torch.randn(2, 3, 5, 7, 6, dtype=torch.float64)
    for training in (True, False):
        ours.train(training), literal.train(training)
        assert torch.allclose(ours(x).movedim(-1, 1), literal(x.movedim(-1, 1)))
    assert torch.allclose(ours.running_mean, literal.running_mean)
    assert torch.allclose(ours.running_var, literal.running_var)


def test_downsample_equals_maxpool_and_pointwise_convolution() -> None:
    ours, expected = Downsample(5, 7).double(), LiteralDownsample(5, 7).double()
    copy_literal(ours, expected)
    x = torch.randn(2, 5, 9, 4, 5, dtype=torch.float64)
    assert torch.allclose(ours(x).movedim(-1, 1), expected(x.movedim(-1, 1)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("size", "stem_stride", "activation"), [((24, 40, 56), 4, False), (ODD, 2, True), ((17, 33, 9), 2, False)])
def test_dcformer_equals_its_literal_form_in_value_and_gradient(
    size: tuple[int, int, int], stem_stride: int, activation: bool, training: bool
) -> None:
    blocks, widths = (1, 2, 1, 1), (6, 8, 10, 12, 14)
    # In double precision, where the last grid's few cells do not matter, whose variance, which divides, is small. Others: test_precision.
    ours = randomised(DCFormer(blocks, widths, stem_stride=stem_stride, stem_activation=activation)).train(training).double()
    reference_model = literal(ours)
    x = torch.randn(3, 1, *size, dtype=torch.float64)
    outputs, expected = ours(x), reference_model(x)
    for output, reference in zip(outputs, expected, strict=True):
        assert relative(output, reference) < TOLERANCE
    directions = [torch.randn_like(output) for output in outputs]
    sum((output * direction).sum() for output, direction in zip(outputs, directions, strict=True)).backward()
    sum((output * direction).sum() for output, direction in zip(expected, directions, strict=True)).backward()
    parameters = dict(ours.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in parameters.values())
    for name, reference in reference_model.named_parameters():
        difference = (parameters[name].grad - reference.grad.reshape(parameters[name].shape)).abs().max()
        assert difference < TOLERANCE * max(reference.grad.abs().max(), 1e-3 * largest), name


def test_tokens_have_depth_outermost_and_width_innermost() -> None:
    encoder = build_encoder("dcformer_nano").eval()
    size = (24, 40, 56)
    with torch.no_grad():
        stem = encoder.stem(torch.randn(1, *size, 1))
        tokens = encoder(torch.zeros(1, 1, *size))[0]
    assert stem.shape[1:4] == (6, 10, 14) == encoder.grids(size)[0]
    assert tokens.shape == (1, 6 * 10 * 14, 32)
    at = torch.zeros(1, 1, *size)
    at[0, 0, 4, 20, 48] = 10.0  # the centre of stem cell (1, 5, 12)
    with torch.no_grad():
        change = (encoder(at)[0] - tokens)[0].abs().sum(dim=1)
    assert int(change.argmax()) == (1 * 10 + 5) * 14 + 12


@pytest.mark.parametrize("axes", [(0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_swapped_axes_give_other_tokens(axes: tuple[int, int, int]) -> None:
    encoder = randomised(build_encoder("dcformer_nano")).eval()
    x = torch.rand(1, 1, 24, 24, 24)
    with torch.no_grad():
        straight = encoder(x)[-1]
        swapped = encoder(x.permute(0, 1, *(axis + 2 for axis in axes)))[-1]
    grid = encoder.grids((24, 24, 24))[-1]
    back = swapped.unflatten(1, grid).permute(0, *(axes.index(axis) + 1 for axis in range(3)), 4).flatten(1, 3)
    assert relative(back, straight) > 0.01


@pytest.mark.parametrize("size", [ODD, (33, 47, 65), (9, 8, 200), (32, 80, 80)])
@pytest.mark.parametrize("stem_stride", [4, 2])
def test_grids_equal_the_shapes_of_the_outputs(size: tuple[int, int, int], stem_stride: int) -> None:
    encoder = build_encoder("dcformer_nano", stem_stride=stem_stride).eval()
    x = torch.rand(1, *size, 1)
    sizes = []
    with torch.no_grad():
        x = encoder.stem(x)
        sizes.append(tuple(x.shape[1:4]))
        for stage in encoder.stages:
            x = stage(x)
            sizes.append(tuple(x.shape[1:4]))
    assert encoder.grids(size) == sizes
    assert encoder.stride == stem_stride * 16


def test_grids_of_the_paper() -> None:
    encoder = build_encoder("dcformer_small")
    assert [depth * height * width for depth, height, width in encoder.grids((128, 256, 256))] == [131072, 16384, 2048, 256, 32]
    assert encoder.widths == (64, 96, 192, 384, 768)


@pytest.mark.parametrize("size", [(7, 20, 30), (10, 7, 30), (10, 20, 7)])
def test_a_volume_too_small_is_refused_in_one_sentence(size: tuple[int, int, int]) -> None:
    encoder = build_encoder("dcformer_nano")
    with pytest.raises(ValueError, match="too small for this encoder: every axis needs at least 8") as caught:
        encoder(torch.zeros(1, 1, *size))
    assert "\n" not in str(caught.value) and "x".join(map(str, size)) in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 10, 20, 30), (1, 3, 10, 20, 30), (10, 20, 30)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 1, D, H, W\), not"):
        build_encoder("dcformer_nano")(torch.zeros(shape))


def test_unknown_names_and_options_list_the_known() -> None:
    with pytest.raises(ValueError, match="'dcformer_huge' is unknown; known: .*dcformer_nano.*dcformer_large"):
        build_encoder("dcformer_huge")
    with pytest.raises(ValueError, match="stem_strid"):
        build_encoder("dcformer_nano", stem_strid=2)
    assert {f"dcformer_{size}" for size in SIZES} <= set(list_encoders())


@pytest.mark.parametrize(
    ("name", "millions"), [("dcformer_nano", 0.789), ("dcformer_naive", 5.852), ("dcformer_tiny", 14.657), ("dcformer_small", 18.245)]
)
def test_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name)
    assert count_parameters(encoder)["trainable"] / 1e6 == pytest.approx(millions, abs=0.0005)


def test_parameters_are_counted_once_in_total_and_trainable() -> None:
    encoder = build_encoder("dcformer_nano")
    total = count_parameters(encoder)["trainable"]
    encoder.stem.requires_grad_(False)
    frozen = sum(parameter.numel() for parameter in encoder.stem.parameters())
    assert count_parameters(encoder) == {"trainable": total - frozen, "frozen": frozen}
    assert count_parameters(nn.ModuleList([encoder, encoder])) == count_parameters(encoder)

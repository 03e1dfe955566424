"""The common interface of all encoders."""

import pytest
import torch
from torch import Tensor, nn

from med3dvlm import Med3DVLMConfig
from med3dvlm.encoders import Encoder, Size, build_encoder, list_encoders
from tests.encoders.small import ODD, SMALL, small_encoder

FAMILIES = list(SMALL)
# by the start of the name: two sizes that the encoder takes
SIZES: dict[str, tuple[Size, Size]] = {
    "vit3d_m3d": ((8, 48, 32), (12, 16, 80)),
    "vit3d": ((32, 64, 96), (96, 32, 64)),
    "ctvit": ((30, 40, 20), (10, 60, 40)),
    "": (ODD, (33, 47, 65)),
}


def two_sizes(name: str) -> tuple[Size, Size]:
    return next(sizes for start, sizes in SIZES.items() if name.startswith(start))


def test_list_encoders() -> None:
    assert set(list_encoders()) == {
        *(f"dcformer_{size}" for size in ("nano", "naive", "tiny", "small", "base", "large")),
        *(f"convnext3d_{size}" for size in ("nano", "naive", "tiny")),
        *(f"poolformer3d_{size}" for size in ("nano", "naive", "tiny")),
        *(f"transunet3d_{size}" for size in ("naive", "tiny")),
        *(f"vit3d_{size}" for size in ("naive", "tiny", "m3d")),
        "ctvit",
    }


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", list_encoders())
def test_outputs_have_the_declared_grids_and_widths(name: str, number: int) -> None:
    size = two_sizes(name)[number]
    with torch.device("meta"):
        encoder = build_encoder(name, size=size).eval()
        outputs = encoder(torch.empty(2, 1, *size))
    tokens = [depth * height * width for depth, height, width in encoder.grids(size)]
    assert [output.shape for output in outputs] == [(2, cells, channels) for cells, channels in zip(tokens, encoder.widths, strict=True)]
    assert len(outputs) >= 2  # the projectors take the last two


@pytest.mark.parametrize("name", list_encoders())
def test_multiples_of_the_stride_are_accepted(name: str) -> None:
    with torch.device("meta"):
        stride = build_encoder(name).stride
        size = (stride, 3 * stride, 2 * stride)
        assert build_encoder(name, size=size).grids(size)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_volume_does_not_depend_on_its_neighbours_in_the_batch(family: str) -> None:
    encoder, size = small_encoder(family)
    encoder.eval()
    volumes = torch.rand(3, 1, *size)
    with torch.no_grad():
        together, alone = encoder(volumes), encoder(volumes[1:2])
    for output, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(output[1:2], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 10, 20, 30), (1, 3, 10, 20, 30), (10, 20, 30)])
def test_another_shape_is_refused(family: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 1, D, H, W\), not"):
        small_encoder(family)[0](torch.zeros(shape))


@pytest.mark.parametrize("family", ["dcformer", "convnext3d", "poolformer3d", "transunet3d"])
@pytest.mark.parametrize("size", [(7, 20, 30), (10, 7, 30), (10, 20, 7)])
def test_a_volume_too_small_is_refused_in_one_sentence(family: str, size: Size) -> None:
    with pytest.raises(ValueError, match="too small for this encoder: every axis needs at least 8") as caught:
        small_encoder(family)[0](torch.zeros(1, 1, *size))
    assert "\n" not in str(caught.value) and "x".join(map(str, size)) in str(caught.value)


def test_a_size_that_does_not_divide_into_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="256x250x256 voxels does not divide into patches of 32x32x32; resize"):
        build_encoder("vit3d_naive", size=(256, 250, 256))
    with pytest.raises(ValueError, match="30x256x256 voxels does not divide into patches of 4x16x16"):
        build_encoder("vit3d_m3d", size=(30, 256, 256))


def test_a_size_other_than_the_one_built_for_is_refused() -> None:
    encoder, _ = small_encoder("vit3d")
    with pytest.raises(ValueError, match="positions for volumes of 12x16x40 voxels, not 12x16x48; resize them"):
        encoder(torch.zeros(1, 1, 12, 16, 48))
    with pytest.raises(ValueError, match="not 16x12x40"):
        encoder.grids((16, 12, 40))


@pytest.mark.parametrize("size", [(10, 20), (10, 20, 30, 40), (0, 20, 30), (-4, 20, 30)])
@pytest.mark.parametrize("family", FAMILIES)
def test_invalid_sizes_are_refused(family: str, size: Size) -> None:
    with pytest.raises(ValueError, match="three positive numbers"):
        small_encoder(family)[0].grids(size)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="'resnet' is unknown; known: dcformer_nano, .*ctvit"):
        build_encoder("resnet")
    for name, overrides, message in (
        ("convnext3d_nano", {"kernel": 5}, "kernel"),
        ("dcformer_nano", {"widths": (8, 8, 8)}, "one width more than stages"),
        ("dcformer_nano", {"kernels": (7, 7)}, "one for every stage"),
        ("vit3d_naive", {"heads": 5}, "192 channels cannot be divided among 5 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            build_encoder(name, **overrides)


def test_a_vlm_takes_an_encoder_with_learned_positions() -> None:
    config = Med3DVLMConfig(
        encoder="vit3d_naive", size=(64, 128, 96), projector="mlp", text_config={"model_type": "qwen2", "hidden_size": 32}
    )
    assert config.num_image_tokens == 2 * 4 * 3


def saved_bytes(encoder: Encoder, volume: Tensor) -> tuple[list[Tensor], int]:
    """Return the outputs, and the bytes that autograd keeps for the backward pass."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return encoder(volume), kept


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_memory_alone(family: str) -> None:
    """Outputs, gradients and running statistics are equal after two backward passes; without care, batch norm would count a batch twice."""
    plain, size = small_encoder(family)
    again, _ = small_encoder(family)
    again.load_state_dict(plain.state_dict())
    again.gradient_checkpointing = True
    volume, kept = torch.rand(3, 1, *size), {}
    for encoder in (plain, again):
        encoder.train()
        for _ in range(2):
            outputs, kept[encoder] = saved_bytes(encoder, volume)
            sum(output.square().mean() for output in outputs).backward()
    assert kept[again] < 0.9 * kept[plain]  # half of a small CT-ViT is its patches, which come before its blocks
    for name, parameter in plain.named_parameters():
        repeated = dict(again.named_parameters())[name]
        assert (parameter.grad is None) == (repeated.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(repeated.grad, parameter.grad, msg=name)
    for name, statistic in plain.named_buffers():
        torch.testing.assert_close(dict(again.named_buffers())[name], statistic, msg=name)
    norms = [module for module in again.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert all(norm.momentum == 0.1 and norm.num_batches_tracked == 2 for norm in norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_for_inference_is_a_copy_with_the_same_outputs(family: str, dtype: torch.dtype) -> None:
    encoder, size = small_encoder(family)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    fast = encoder.train().for_inference(dtype)
    volume = torch.rand(2, 1, *size)
    outputs = fast(volume)
    assert encoder.training and not fast.training
    assert not any(output.requires_grad for output in outputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    with torch.no_grad():
        expected = encoder.eval()(volume)
    assert len(outputs) == len(expected)
    compared = 1 if family == "ctvit" else len(outputs)  # its codes jump
    for output, reference in zip(outputs[:compared], expected[:compared], strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-4)
        else:
            assert output.dtype == torch.bfloat16
            assert nn.functional.cosine_similarity(output.float().flatten(), reference.flatten(), dim=0) > 0.995


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_without_graph_breaks(family: str) -> None:
    """Forward and backward pass are traced, without generating code, which takes minutes; `fullgraph` raises at a break."""
    encoder, size = small_encoder(family)
    encoder.eval()
    volume = torch.rand(2, 1, *size)
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    expected = encoder(volume)
    outputs = compiled(volume)
    sum(output.square().mean() for output in outputs).backward()
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, reference, rtol=1e-3, atol=1e-4)
    gradients = [parameter.grad for parameter in encoder.parameters()]
    encoder.zero_grad()
    sum(output.square().mean() for output in expected).backward()
    for gradient, parameter in zip(gradients, encoder.parameters(), strict=True):
        assert (gradient is None) == (parameter.grad is None)
        if gradient is not None:
            assert (gradient - parameter.grad).norm() <= 1e-3 * parameter.grad.norm() + 1e-6

"""Every encoder in every combination of types, mode and checkpointing, against itself in float64 with the same weights."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from med3dvlm import Med3DVLM, Med3DVLMConfig
from med3dvlm.encoders import Encoder, Size, base, build_encoder
from med3dvlm.encoders.layers import BatchNorm
from tests.encoders.small import SMALL, randomised
from tests.tiny_parts import language_model

# The hierarchies with two stages, so that batch norm has 36 cells at least: over a few, it makes much of rounding.
SIZE: Size = (20, 28, 40)
SHALLOW: dict[str, dict[str, Any]] = {
    "dcformer": {"blocks": (1, 2), "widths": (6, 8, 10), "kernels": (13, 5)},
    **dict.fromkeys(("convnext3d", "poolformer3d", "transunet3d"), {"blocks": (1, 2), "widths": (6, 8, 10)}),
}
LAYOUTS = ["float32", "autocast", "deepspeed", "bfloat16"]
MODES = {"training": (True, True), "evaluation": (False, True), "without gradients": (False, False)}  # training, gradients
# What is computed in and what tokens and gradients are stored in -> the largest norm of their difference from float64, relative to the norm.
# Measured: 8e-7 and 1e-5; 2e-3 and 8e-3, that of rounding once; 0.02 and 0.13, where max pooling picks the other of two nearly equal cells.
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
TOLERANCES = {
    (FLOAT32, FLOAT32): (1e-5, 1e-4),
    (FLOAT32, BFLOAT16): (0.004, 0.02),
    (BFLOAT16, FLOAT32): (0.03, 0.2),
    (BFLOAT16, BFLOAT16): (0.03, 0.2),
}
SMALLEST = 1e-3  # of the largest gradient: below that, a gradient is measured against this


def build(family: str, rounded: bool) -> tuple[Encoder, Tensor]:
    """Return an encoder in float32, its weights rounded to bfloat16 where `rounded`, and volumes that bfloat16 holds exactly."""
    torch.manual_seed(0)
    name, size, overrides = SMALL[family]
    if family in SHALLOW:
        size, overrides = SIZE, overrides | SHALLOW[family]
    encoder = randomised(build_encoder(name, size=size, **overrides))
    if rounded:
        for parameter in encoder.parameters():
            parameter.data = parameter.data.bfloat16().float()
    return encoder, torch.rand(3, 1, *size).bfloat16().float()


def laid_out(encoder: Encoder, layout: str) -> Encoder:
    if layout == "bfloat16":
        return encoder.to(torch.bfloat16)
    if layout == "deepspeed":  # its engine casts parameters alone
        for parameter in encoder.parameters():
            parameter.data = parameter.data.bfloat16()
    return encoder


def directions(tokens: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(each.shape, generator=generator).to(each.device, torch.float64) for each in tokens]


def computed(
    encoder: Encoder, volumes: Tensor, mode: str, autocast: bool = False
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Tokens, gradients by parameter and buffers."""
    training, with_gradients = MODES[mode]
    encoder.train(training)
    with torch.set_grad_enabled(with_gradients), torch.autocast(volumes.device.type, torch.bfloat16, enabled=autocast):
        tokens = encoder(volumes)
    if with_gradients:
        sum((each.double() * direction).sum() for each, direction in zip(tokens, directions(tokens), strict=True)).backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    return [each.detach() for each in tokens], gradients, dict(encoder.named_buffers())


@cache
def exact(family: str, rounded: bool, mode: str) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    encoder, volumes = build(family, rounded)
    return computed(encoder.double(), volumes.double(), mode)


def difference(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=floor))


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("layout", "fast"), [*((layout, True) for layout in LAYOUTS), ("autocast", False), ("deepspeed", False)])
@pytest.mark.parametrize("family", SMALL)
def test_values_and_gradients_are_those_of_float64(
    family: str, layout: str, fast: bool, mode: str, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fast` sets whether the processor counts as fast in bfloat16, so that both code paths are tested on any machine."""
    monkeypatch.setattr(base, "bfloat16_is_fast", lambda: fast)
    stored = layout in ("deepspeed", "bfloat16")
    encoder, volumes = build(family, stored)
    encoder = laid_out(encoder, layout)
    encoder.gradient_checkpointing = recomputed
    tokens, gradients, buffers = computed(encoder, volumes, mode, autocast=layout == "autocast")
    expected_tokens, expected_gradients, expected_buffers = exact(family, stored, mode)

    storage = BFLOAT16 if stored else FLOAT32
    assert {each.dtype for each in tokens} == {storage}
    of_tokens, of_gradients = TOLERANCES[BFLOAT16 if fast and layout != "float32" else FLOAT32, storage]
    compared = 1 if family == "ctvit" else len(tokens)  # its codes jump
    for each, reference in zip(tokens[:compared], expected_tokens[:compared], strict=True):
        assert difference(each, reference) < of_tokens
    assert gradients.keys() == expected_gradients.keys()
    largest = max((float(gradient.norm()) for gradient in expected_gradients.values()), default=0.0)
    for name, reference in expected_gradients.items():
        nothing = float(reference.norm()) < 1e-9 * largest  # of a bias before a batch norm, but for rounding
        assert difference(gradients[name], reference, largest if nothing else SMALLEST * largest) < of_gradients, name
    for name, reference in expected_buffers.items():
        assert buffers[name].dtype == (FLOAT32 if reference.is_floating_point() else reference.dtype), name
        assert difference(buffers[name], reference.double(), 1e-30) < of_tokens, name  # the count of batches may be 0


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("layout", ["autocast", "deepspeed", "bfloat16"])
@pytest.mark.parametrize("family", SMALL)
def test_frozen_inside_a_model_that_trains_it_gives_the_tokens_of_evaluation(
    family: str, layout: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in stages 2 and 3: the projector learns from the tokens, and running statistics stay."""
    monkeypatch.setattr(base, "bfloat16_is_fast", lambda: fast)
    stored = layout != "autocast"
    encoder, volumes = build(family, stored)
    size = tuple(volumes.shape[2:])
    words = language_model()
    config = Med3DVLMConfig(size=size, projector="mlp", text_config=words.config)
    model = Med3DVLM(config, laid_out(encoder.requires_grad_(False), layout), laid_out(words, layout)).train()
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    with torch.autocast("cpu", BFLOAT16, enabled=layout == "autocast"):
        low, high = model.encode_image(volumes)
        model.projector(low.float(), high.float()).float().square().mean().backward()
    of_tokens, _ = TOLERANCES[BFLOAT16 if fast else FLOAT32, BFLOAT16 if stored else FLOAT32]
    reference = exact(family, stored, "without gradients")[0][-2:]
    assert difference(low, reference[0]) < of_tokens
    if family != "ctvit":  # its codes jump
        assert difference(high, reference[1]) < of_tokens
    assert all(parameter.grad is not None for parameter in model.projector.parameters())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())


def test_every_batch_norm_refuses_a_single_cell() -> None:
    with pytest.raises(ValueError, match="batch norm needs more than one cell"):
        BatchNorm(4).train()(torch.rand(1, 1, 1, 1, 4))


@pytest.mark.parametrize("cast", [lambda module: module.bfloat16(), lambda module: module.half(), lambda module: module.to(BFLOAT16)])
def test_running_statistics_and_codes_are_never_rounded(cast: Any) -> None:
    for family in ("dcformer", "transunet3d", "ctvit"):
        encoder, _ = build(family, rounded=False)
        before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        module = cast(nn.ModuleList([encoder]))  # as part of a larger model
        assert {parameter.dtype for parameter in module.parameters()} < {BFLOAT16, torch.float16}
        assert before and all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
        assert {buffer.dtype for buffer in module.double().buffers()} <= {torch.float64, torch.int64}


def test_statistics_are_float32_in_a_model_built_in_bfloat16() -> None:
    """transformers builds a model that was saved in bfloat16 in this type."""
    torch.set_default_dtype(BFLOAT16)
    try:
        built = {family: build_encoder(SMALL[family][0], size=SMALL[family][1], **SMALL[family][2]) for family in ("dcformer", "ctvit")}
    finally:
        torch.set_default_dtype(FLOAT32)
    for encoder in built.values():
        assert {parameter.dtype for parameter in encoder.parameters()} == {BFLOAT16}
        assert {buffer.dtype for buffer in encoder.buffers() if buffer.is_floating_point()} == {FLOAT32}


def test_batch_norm_in_training_keeps_what_bfloat16_would_lose() -> None:
    """Sums of 4,000 numbers in bfloat16 cannot resolve a mean of 100 with a deviation of 1."""
    norm = BatchNorm(2).bfloat16()
    x = (100 + torch.randn(4000, 2)).bfloat16()
    norm(x)
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * x.double().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * x.double().var(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", SMALL)
def test_float16_is_refused(family: str) -> None:
    encoder, volumes = build(family, rounded=False)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="do not compute in float16.*use float32 or bfloat16"):
        encoder(volumes)
    with pytest.raises(ValueError, match="do not compute in float16"):
        encoder.for_inference(torch.float16)
    with pytest.raises(ValueError, match="do not compute in float16") as caught:
        encoder.half()(volumes)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="do not compute in float16"):
        encoder.for_inference()


def test_the_processor_is_measured_once_without_changing_threads() -> None:
    threads = torch.get_num_threads()
    base._bfloat16_speedup.cache_clear()
    speedup = base._bfloat16_speedup()
    assert 0.001 < speedup < 1000 and torch.get_num_threads() == threads
    assert base._bfloat16_speedup() == speedup and base.bfloat16_is_fast() == (speedup > base.BFLOAT16_SPEEDUP)


@pytest.mark.parametrize("fast", [True, False])
def test_for_inference_computes_in_what_is_fastest(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "bfloat16_is_fast", lambda: fast)
    for family in SMALL:
        encoder, volumes = build(family, rounded=True)
        expected = exact(family, True, "without gradients")[0]
        for stored in (encoder, encoder.to(BFLOAT16)):
            for dtype in (FLOAT32, BFLOAT16):
                fast_form = stored.for_inference(dtype)
                computing = BFLOAT16 if fast and dtype == BFLOAT16 else FLOAT32
                assert next(fast_form.parameters()).dtype == computing
                tokens = fast_form(volumes)
                assert {each.dtype for each in tokens} == {dtype}
                assert difference(tokens[0], expected[0]) < TOLERANCES[computing, dtype][0]

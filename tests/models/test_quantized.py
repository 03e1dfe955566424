"""Language models in NF4 and 8 bits on the CPU, against the published table of NF4 and plain rounding."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from med3dvlm.models.quantized import TRAINED, Int8Linear, quantize, require_quantization, round_to_quantized
from tests.tiny_parts import FAMILIES

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

# QLoRA (arXiv 2305.14314), appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def language_model(width: int = 64) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "qwen2", vocab_size=400, hidden_size=width, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.1,
        **FAMILIES["qwen2"],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_each_weight_is_rounded_to_the_nearest_nf4_value_of_its_block() -> None:
    """Double quantisation also rounds the scales of the blocks, by 0.003 of the largest, measured."""
    model = language_model()
    exact = copy.deepcopy(model)
    error = round_to_quantized(model)
    table, moved, total = torch.tensor(NF4, dtype=torch.float64), 0.0, 0.0
    for name, weight in exact.state_dict().items():
        rounded = model.state_dict()[name]
        if ".layers." not in name or weight.ndim < 2:
            assert torch.equal(rounded, weight)
            continue
        blocks = weight.detach().double().flatten().split(64)
        scales = torch.stack([block.abs().max() for block in blocks])
        nearest = [table[(block / block.abs().max() - table[:, None]).abs().argmin(dim=0)] for block in blocks]
        found = rounded.detach().double().flatten().split(64)
        for scale, block, expected in zip(scales, found, nearest, strict=True):
            assert (block - scale * expected).abs().max() < 0.008 * scales.max()
        moved += float((rounded - weight).square().sum())
        total += float(weight.square().sum())
    assert error == pytest.approx((moved / total) ** 0.5, rel=1e-5) and 0.08 < error < 0.1


@pytest.mark.parametrize("training", [True, False])
def test_a_quantized_model_equals_one_with_rounded_weights(training: bool) -> None:
    """Logits and the gradient at its input, from which the projector learns, are equal."""
    rounded = language_model()
    quantized = copy.deepcopy(rounded)
    round_to_quantized(rounded)
    quantize(quantized, "cpu")
    embeds = torch.randn(2, 9, 64)
    gradients = []
    for model in (rounded, quantized):
        model.requires_grad_(False).train(training)
        inputs = embeds.clone().requires_grad_()
        logits = model(inputs_embeds=inputs).logits
        logits.square().mean().backward()
        gradients += [logits.detach(), inputs.grad]
    assert torch.allclose(gradients[0], gradients[2], atol=1e-5) and torch.allclose(gradients[1], gradients[3], atol=1e-7)
    held, before = (sum(p.numel() * p.element_size() for p in model.model.layers.parameters()) for model in (quantized, rounded))
    assert held < before / 6  # biases and norms stay


def test_layers_of_unsuitable_widths_are_not_quantized(caplog: pytest.LogCaptureFixture) -> None:
    model = language_model(96)
    before = copy.deepcopy(model)
    quantize(model, "cpu")
    assert "12 of 14 linear layers have no multiple of 64 inputs" in caplog.text  # all but those from 128 to 96
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.uint8
    model = language_model(96)
    for layer in model.model.layers:
        layer.mlp.down_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="no linear layer of the language model has a multiple of 64 inputs"):
        round_to_quantized(model)


def test_unknown_and_missing_methods_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_quantization(None)
    with pytest.raises(ValueError, match="quantize is 'int3' but must be int8 or nf4"):
        require_quantization("int3")
    with pytest.raises(ValueError, match="quantize is 'int8' but must be nf4"):
        require_quantization("int8", TRAINED)
    monkeypatch.setattr("med3dvlm.models.quantized.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'med3dvlm\[quantize\]'"):
        require_quantization("nf4")
    require_quantization("int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_of_any_width(dtype: torch.dtype) -> None:
    """Each weight becomes the nearest of 255 steps of its row, and no row of a batch depends on the others."""
    linear = torch.nn.Linear(100, 30).to(dtype)
    with torch.no_grad():
        linear.weight[3] = 0
        linear.weight[4] *= 100
    layer = Int8Linear(linear)
    steps = linear.weight.detach().double().abs().amax(dim=1) / 127
    steps[3] = 1
    nearest = torch.stack([(row / step).round() * step for row, step in zip(linear.weight.detach().double(), steps, strict=True)])
    inputs = torch.randn(5, 7, 100).to(dtype)
    inputs[2, 3, 4] = 60  # an outlier, as large models have them
    expected = inputs.double() @ nearest.T + linear.bias.double()
    error = (layer(inputs).double() - expected).abs().amax(dim=(0, 1)) / expected.abs().amax(dim=(0, 1))
    assert layer(inputs).dtype == dtype and error.max() < {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(layer(inputs[2]), layer(inputs)[2])


def test_a_model_in_eight_bits() -> None:
    model, exact = language_model(96), language_model(96)
    exact.load_state_dict(model.state_dict())
    quantize(model, "cpu", "int8")
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 14 and type(model.lm_head) is torch.nn.Linear
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before, after = (each(ids).logits for each in (exact, model))
    assert 0 < (after - before).norm() / before.norm() < 0.03  # 0.011 measured

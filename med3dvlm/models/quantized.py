"""Quantise the linear layers of a language model to 4 or 8 bits.

nf4    4 bits with double quantisation, as in QLoRA (arXiv 2305.14314): blocks of 64 weights share a scale, and 256 scales another.
       bitsandbytes computes it, on CUDA devices and on CPUs.
int8   8 bits, one scale for each row of a weight. The layer computes in the type of its input. bitsandbytes' own layer (LLM.int8()) also
       quantises its input, and looks for outliers in the whole batch: an answer would depend on the others in its batch.
"""

import logging
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

METHODS = ("int8", "nf4")
TRAINED = ("nf4",)  # those on which LoRA trains
BLOCK = 64  # weights that share a scale
QUANTIZATION_FILE = "quantization.json"  # beside an adapter: in what its base was held when it was trained


def require_quantization(method: str | None, known: Sequence[str] = METHODS) -> None:
    """Raise ValueError where a method is not among the known ones, or bitsandbytes, which computes nf4, is not installed."""
    if method is None:
        return
    if method not in known:
        raise ValueError(f"quantize is {method!r} but must be {' or '.join(known)}, or be left out")
    if method == "nf4" and find_spec("bitsandbytes") is None:
        raise ValueError("quantize needs bitsandbytes, which is not installed; install it by: pip install 'med3dvlm[quantize]'")


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits: `codes` (out, in) int8, and `scale` (out), the value of code 1 in each row."""

    codes: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data.float()
        scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.data, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        dtype = torch.float32 if inputs.dtype == torch.float16 else inputs.dtype  # in float16 sums of codes could overflow
        output = nn.functional.linear(inputs.to(dtype), self.codes.to(dtype)) * self.scale
        return (output if self.bias is None else output + self.bias).to(inputs.dtype)


def quantize(language_model: Any, device: torch.device | str, method: str = "nf4") -> None:
    """Quantise the linear layers of a language model's decoder, on the device; they no longer train. The output head stays as it is.

    Layers go to the device one after the other: there is never more than one of them there that is not quantised yet.
    """
    for parent, name, linear in _linear_layers(language_model, BLOCK if method == "nf4" else 1):
        layer = _nf4_layer(linear) if method == "nf4" else Int8Linear(linear)
        setattr(parent, name, layer.to(device).train(linear.training))


def _nf4_layer(linear: nn.Linear) -> nn.Module:
    """Return a layer that is quantised when it goes to a device."""
    import bitsandbytes as bnb

    size = (linear.in_features, linear.out_features, linear.bias is not None)
    layer: Any = bnb.nn.Linear4bit(*size, linear.weight.dtype, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(linear.weight.data.contiguous(), requires_grad=False, quant_type="nf4", module=layer)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    layer.support_avx512bf16_for_cpu = False  # its kernel repacks the weights, and takes multiples of 64 alone
    return layer


@torch.no_grad()
def round_to_quantized(language_model: Any) -> float:
    """Round each weight that `quantize` would quantise to its NF4 value, in the weight's own type.

    Returns:
        The Euclidean norm of all differences, relative to that of the weights.
    """
    from bitsandbytes import functional

    moved = total = 0.0
    for _, _, linear in _linear_layers(language_model, BLOCK):
        weight: Tensor = linear.weight.data
        codes, state = functional.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
        rounded = functional.dequantize_4bit(codes, state).to(weight.dtype)
        moved += float((rounded.float() - weight.float()).square().sum(dtype=torch.float64))
        total += float(weight.float().square().sum(dtype=torch.float64))
        weight.copy_(rounded)
    return float((moved / total) ** 0.5) if total else 0.0


def _linear_layers(language_model: Any, block: int) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield the parent module of each linear layer of the decoder, its name there, and the layer.

    Those are left out whose rows are no whole blocks: of them bitsandbytes (0.50) reads other numbers on a CPU than it has written in NF4.

    Raises:
        ValueError: no layer is left.
    """
    found = [
        (parent, name, module)
        for parent in language_model.get_decoder().modules()
        for name, module in parent.named_children()
        if type(module) is nn.Linear
    ]
    whole = [one for one in found if one[2].in_features % block == 0]
    if not whole:
        raise ValueError(f"no linear layer of the language model has a multiple of {block} inputs, so none can be quantised")
    if len(whole) < len(found):
        logger.warning(
            "%d of %d linear layers have no multiple of %d inputs; they are not quantised", len(found) - len(whole), len(found), block
        )
    yield from whole

"""Quantise the linear layers of a language model to 4 bits: NF4 with double quantisation, as in QLoRA (arXiv 2305.14314).

Blocks of 64 weights share a scale, and 256 scales another. bitsandbytes computes it, on CUDA devices and on CPUs.
"""

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

METHODS = ("nf4",)
BLOCK = 64  # weights that share a scale
QUANTIZATION_FILE = "quantization.json"  # beside an adapter: in what its base was held when it was trained


def require_quantization(method: str | None) -> None:
    """Raise ValueError where a method is unknown or bitsandbytes, which computes it, is not installed."""
    if method is None:
        return
    if method not in METHODS:
        raise ValueError(f"quantize is {method!r} but must be {' or '.join(METHODS)}, or be left out")
    if find_spec("bitsandbytes") is None:
        raise ValueError("quantize needs bitsandbytes, which is not installed; install it by: pip install 'med3dvlm[quantize]'")


def quantize(language_model: Any, device: torch.device | str) -> None:
    """Quantise the linear layers of a language model's decoder to NF4, on the device; they no longer train. The output head stays as it is.

    Layers go to the device one after the other: there is never more than one of them there that is not quantised yet.
    """
    import bitsandbytes as bnb

    for parent, name, linear in _linear_layers(language_model):
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.data.contiguous(), requires_grad=False, quant_type="nf4", module=layer)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        layer.support_avx512bf16_for_cpu = False  # its kernel repacks the weights, and takes multiples of 64 alone
        setattr(parent, name, layer.to(device).train(linear.training))


@torch.no_grad()
def round_to_quantized(language_model: Any) -> float:
    """Round each weight that `quantize` would quantise to its NF4 value, in the weight's own type.

    Returns:
        The Euclidean norm of all differences, relative to that of the weights.
    """
    from bitsandbytes import functional

    moved = total = 0.0
    for _, _, linear in _linear_layers(language_model):
        weight: Tensor = linear.weight.data
        codes, state = functional.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
        rounded = functional.dequantize_4bit(codes, state).to(weight.dtype)
        moved += float((rounded.float() - weight.float()).square().sum(dtype=torch.float64))
        total += float(weight.float().square().sum(dtype=torch.float64))
        weight.copy_(rounded)
    return float((moved / total) ** 0.5) if total else 0.0


def _linear_layers(language_model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield the parent module of each linear layer of the decoder, its name there, and the layer.

    Those are left out whose rows are no whole blocks: of them bitsandbytes (0.50) reads other numbers on a CPU than it has written.

    Raises:
        ValueError: no layer is left.
    """
    found = [
        (parent, name, module)
        for parent in language_model.get_decoder().modules()
        for name, module in parent.named_children()
        if type(module) is nn.Linear
    ]
    whole = [one for one in found if one[2].in_features % BLOCK == 0]
    if not whole:
        raise ValueError(f"no linear layer of the language model has a multiple of {BLOCK} inputs, so none can be quantised")
    if len(whole) < len(found):
        logger.warning(
            "%d of %d linear layers have no multiple of %d inputs; they are not quantised", len(found) - len(whole), len(found), BLOCK
        )
    yield from whole

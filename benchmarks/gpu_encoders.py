"""The parts of benchmarks/gpu.py about vision encoders: their precision, and time and memory beside the literal form.

A part gives its cases one after the other: a name, and what measures it and returns its figures. A case whose figures have an "error" did not pass.
What a part alone needs is imported in it, so that a missing package leaves out that part alone.
"""

import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.literal_encoder import literal
from med3dvlm.encoders import build_encoder
from med3dvlm.encoders.base import bfloat16_is_fast

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
NUMBERS = ("float32", "tf32", "bfloat16")  # what the encoder's products are computed in
CLOSE = {"float32": 1e-3, "tf32": 0.2, "bfloat16": 0.2}  # to float64, the norm of all differences relative to the norm
LITERAL, OURS = "literal", "ours"


@dataclass(frozen=True)
class Settings:
    """Settings of all parts: device, size, the folder that stages read and write, and layers of the language model."""

    device: str
    tiny: bool
    work: Path
    layers: int
    batch: int

    @property
    def size(self) -> tuple[int, int, int]:
        return (32, 64, 64) if self.tiny else (128, 256, 256)

    @property
    def chest_size(self) -> tuple[int, int, int]:
        return (32, 64, 64) if self.tiny else (256, 512, 512)


Figures = dict[str, Any]
Cases = Iterator[tuple[str, Callable[[], Figures]]]


def allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.init()  # without it there is no peak to reset
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: str) -> float:
    """The most that tensors on the GPU held since `free_memory`, or this process in the host's memory since it began."""
    held = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return held / 1e9


def seconds_of(call: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def largest(values: Iterable[float]) -> float:
    """The largest, NaN where one is NaN, 0 where there is none."""
    return float(torch.tensor([0.0, *values], dtype=torch.float64).max())


# Precision


def precision(settings: Settings, compiled: bool = False) -> Cases:
    """Every family of encoders in every layout of types, against itself in float64 on the CPU: tokens, gradients, statistics."""
    from tests.encoders.test_precision import LAYOUTS, SMALL

    for family in SMALL:
        for mode in ("training", "evaluation"):
            for layout in ("compiled",) if compiled else LAYOUTS:
                yield f"{family}, {mode}, {layout}", partial(against_float64, settings.device, family, mode, layout)


def against_float64(device: str, family: str, mode: str, layout: str) -> Figures:
    """The largest differences, relative to the norm, and what tests/encoders/test_precision.py allows."""
    from tests.encoders import test_precision as reference

    allow_tf32(False)
    stored = layout in ("deepspeed", "bfloat16")
    encoder, volumes = reference.build(family, stored)
    encoder = reference.laid_out(encoder, layout).to(device)
    graphs: Any = torch._dynamo.utils.counters["stats"]
    if layout == "compiled":
        torch.compiler.reset()
        graphs.clear()
        encoder.compile()
    tokens, gradients, buffers = reference.computed(encoder, volumes.to(device), mode, autocast=layout == "autocast")
    expected_tokens, expected_gradients, expected_buffers = reference.exact(family, stored, mode)

    narrow = layout not in ("float32", "compiled") and (device == "cuda" or bfloat16_is_fast())
    of_tokens, of_gradients = reference.TOLERANCES[BFLOAT16 if narrow else FLOAT32, BFLOAT16 if stored else FLOAT32]
    compared = 1 if family == "ctvit" else len(tokens)  # its codes jump
    scale = largest(float(gradient.norm()) for gradient in expected_gradients.values())

    def of_gradient(name: str, expected: Tensor) -> float:
        nothing = float(expected.norm()) < 1e-9 * scale  # of a bias before a batch norm, but for rounding
        return reference.difference(gradients[name].cpu(), expected, scale if nothing else reference.SMALLEST * scale)

    pairs = list(zip(tokens, expected_tokens, strict=True))[:compared]
    figures: Figures = {
        "tokens": largest(reference.difference(found.cpu(), expected) for found, expected in pairs),
        "gradients": largest(of_gradient(*named) for named in expected_gradients.items()),
        "statistics": largest(reference.difference(buffers[name].cpu(), each.double(), 1e-30) for name, each in expected_buffers.items()),
        "tokens_allowed": of_tokens,
        "gradients_allowed": of_gradients,
    }
    allowed = {"tokens": of_tokens, "gradients": of_gradients, "statistics": of_tokens}
    if wrong := [name for name, limit in allowed.items() if not figures[name] < limit]:
        figures["error"] = f"{' and '.join(wrong)} differ from float64 by more than is allowed"
    if gradients.keys() != expected_gradients.keys():
        figures["error"] = f"gradients are missing: {sorted(gradients.keys() ^ expected_gradients.keys())}"
    if layout == "compiled":
        figures["graphs"] = graphs["unique_graphs"]
        if not figures["graphs"]:
            figures["error"] = "nothing was compiled"
    return figures


# The encoder beside its literal form


def encoder_speed(settings: Settings, training: bool = False, compiled: bool = False) -> Cases:
    """Seconds and memory of a forward and backward pass, or of prediction, in both forms and every kind of numbers."""
    reference = cache(partial(reference_result, settings, training))
    for form in (LITERAL, OURS):
        for numbers in NUMBERS:
            if not (compiled and numbers == "tf32"):
                name = f"{form}, {numbers}" + (", compiled" if compiled and form == OURS else "")
                yield name, partial(form_cost, settings, training, form, numbers, compiled and form == OURS, reference)


def trained_encoder(settings: Settings) -> nn.Module:
    """DCFormer-small whose running statistics and scales are not the neutral initial ones."""
    torch.manual_seed(0)
    encoder = build_encoder("dcformer_nano" if settings.tiny else "dcformer_small")
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith((".scale", "running_mean")):
                tensor.normal_(0.3, 0.1)
    return encoder


def volumes_of(settings: Settings) -> Tensor:
    return torch.rand(settings.batch, 1, *settings.size, generator=torch.Generator().manual_seed(1)).to(settings.device)


def outcome(module: nn.Module, volumes: Tensor, training: bool) -> list[Tensor]:
    """Gradients of the mean square of all tokens, by name, or the tokens."""
    if not training:
        with torch.inference_mode():
            return list(module(volumes))
    module.zero_grad(set_to_none=True)
    torch.stack([tokens.to(torch.promote_types(tokens.dtype, FLOAT32)).square().mean() for tokens in module(volumes)]).sum().backward()
    return [parameter.grad for _, parameter in sorted(module.named_parameters()) if parameter.grad is not None]


def reference_result(settings: Settings, training: bool) -> list[Tensor]:
    """Return the literal form's result in float64, on the CPU."""
    module = literal(trained_encoder(settings)).double().to(settings.device).train(training)
    return [each.cpu() for each in outcome(module, volumes_of(settings).double(), training)]


def form_cost(
    settings: Settings, training: bool, form: str, numbers: str, compiled: bool, reference: Callable[[], list[Tensor]]
) -> Figures:
    """The median of the runs after two that warm up, and what one adds to the memory that weights and volumes hold."""
    expected = reference()
    free_memory()
    allow_tf32(numbers == "tf32")
    torch.compiler.reset()
    encoder: Any = trained_encoder(settings).to(settings.device).train(training)
    module = literal(encoder).to(settings.device) if form == LITERAL else encoder
    narrow = numbers == "bfloat16"
    if form == OURS and not training:
        module = encoder.for_inference(BFLOAT16 if narrow else FLOAT32)
    if compiled:
        module.compile()
    volumes = volumes_of(settings)

    def call() -> list[Tensor]:
        with torch.autocast(settings.device, BFLOAT16, enabled=narrow and (training or form == LITERAL)):
            return outcome(module, volumes, training)

    found = [each.cpu().double().flatten() for each in call()]
    difference = float(torch.cat([one - other.flatten() for one, other in zip(found, expected, strict=True)]).norm())
    difference /= float(torch.cat([each.flatten() for each in expected]).norm())
    call()
    seconds = statistics.median(seconds_of(call, settings.device) for _ in range(2 if settings.tiny else 10))
    figures: Figures = {"seconds": seconds, "difference": difference}
    if settings.device == "cuda":
        module.zero_grad(set_to_none=True)
        free_memory()
        before = torch.cuda.memory_allocated()
        call()
        figures["gb"] = peak_gb(settings.device) - before / 1e9
    if form == OURS and not difference < CLOSE[numbers]:
        figures["error"] = f"differs from the literal form in float64 by {difference:.2g} of its norm, allowed is {CLOSE[numbers]:g}"
    return figures

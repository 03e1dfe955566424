"""What an encoder costs: parameters and operations counted from the code, time and memory measured here, the paper's figures beside.

An operation is a multiply-accumulate of a convolution, a linear layer or attention; norms count two for every value, as in the paper's figures.
Activations, pooling and sums are not counted. Counting runs on PyTorch's meta device, which computes shapes alone.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from med3dvlm.encoders import ENCODERS, Encoder, Size, build_encoder, count_parameters
from med3dvlm.encoders.base import written

logger = logging.getLogger(__name__)

PAPER_SIZE: Size = (256, 512, 512)
# DCFormer paper (arXiv 2502.05091), Table 1: millions of parameters, 10^9 operations for a volume of PAPER_SIZE.
# DCFormer's nano and tiny come to the printed parameters with CLIP's projection to 512 added (0.789 + 0.131, 14.657 + 0.393), naive without it.
# Of CT-ViT the encoder's released weights are 23.4 M; what the printed figures count besides, the paper does not say.
PAPER: dict[str, tuple[float, float]] = {
    "dcformer_nano": (0.92, 34.21),
    "dcformer_naive": (5.85, 49.48),
    "dcformer_tiny": (15.1, 168.2),
    "convnext3d_nano": (3.19, 31.92),
    "convnext3d_naive": (15.63, 96.84),
    "convnext3d_tiny": (31.59, 156.31),
    "poolformer3d_nano": (2.79, 27.14),
    "poolformer3d_naive": (11.31, 63.75),
    "poolformer3d_tiny": (20.68, 117.46),
    "transunet3d_naive": (12.48, 118.9),
    "transunet3d_tiny": (23.93, 207.5),
    "vit3d_naive": (11.10, 39.05),
    "vit3d_tiny": (26.34, 86.43),
    "ctvit": (101.1, 160.5),
}
NORMS = (
    torch.ops.aten._native_batch_norm_legit_no_training,
    torch.ops.aten.native_batch_norm,
    torch.ops.aten.native_group_norm,
    torch.ops.aten.native_layer_norm,
)


@dataclass(frozen=True)
class Cost:
    """Numbers of parameters and of operations for one volume of `size`."""

    size: Size
    parameters: int
    operations: int


@dataclass(frozen=True)
class Measurement:
    """Seconds for one volume (median) and bytes of memory that weights and activations took at most."""

    seconds: float
    memory: int


def count(name: str, size: Size | None = None) -> Cost:
    """Parameters and operations of the encoder of that name for a volume of `size` (D, H, W).

    None takes the paper's size, or the encoder's own where it was made for one.

    Raises:
        ValueError: the name is unknown, or the encoder does not take that size.
    """
    with torch.device("meta"):
        encoder = build_encoder(name, size=size).eval()
        size = size or ENCODERS[name][1].get("size", PAPER_SIZE)
    return Cost(size, sum(count_parameters(encoder).values()), operations(encoder, size))


def operations(encoder: Encoder, size: Size) -> int:
    """Of an encoder on the meta device, for a volume of `size`."""
    # The counter takes two for a multiply-accumulate.
    per_value: dict[Any, Callable[..., int]] = {norm: lambda shape, *_, **__: 4 * torch.Size(shape).numel() for norm in NORMS}
    counter = FlopCounterMode(display=False, custom_mapping=per_value)
    with torch.no_grad(), counter:
        encoder(torch.empty(1, 1, *size, device="meta"))
    return counter.get_total_flops() // 2


def measure(name: str, size: Size, runs: int = 3) -> Measurement:
    """Time and memory of `for_inference()` in float32, after one volume to warm up, in a process of its own with PyTorch's number of threads.

    Raises:
        ValueError: the encoder does not take that size, or the process was killed.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_measure_here, name, size, runs).result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"measuring {name} with {written(size)} voxels was killed, perhaps for lack of memory; choose a smaller size"
            ) from error


def table(names: Sequence[str], size: Size | None = None, measured: bool = False) -> Iterator[str]:
    """The lines of a table of encoders, for volumes of `size`; None as in `count`. An encoder that does not take the size is left out with a warning.

    Raises:
        ValueError: a name is unknown, or none of the encoders takes the size.
    """
    costs: dict[str, Cost] = {}
    refusals: dict[str, ValueError] = {}
    for name in names:
        try:
            costs[name] = count(name, size)
        except ValueError as error:
            if name not in ENCODERS:
                raise
            refusals[name] = error
    if refusals and not costs:
        raise next(iter(refusals.values()))
    yield _row(
        "encoder", "volume", "params M", "paper", "diff", "GFLOPs", "paper", "diff", *(("s", "volumes/s", "GiB") if measured else ())
    )
    for name, cost in costs.items():
        paper, operations = PAPER.get(name, (None, None))
        cells = [
            *_beside(cost.parameters / 1e6, paper, 3),
            *_beside(cost.operations / 1e9, operations if cost.size == PAPER_SIZE else None, 2),
        ]
        if measured:
            result = measure(name, cost.size)
            cells += [f"{result.seconds:.3f}", f"{1 / result.seconds:.3f}", f"{result.memory / 2**30:.2f}"]
        yield _row(name, written(cost.size), *cells)
    yield "paper: DCFormer paper, Table 1, at 256x512x512. GFLOPs: 10^9 multiply-accumulates of convolutions, linear layers and attention, and"
    yield "two for every value of a norm."
    if measured:
        yield f"Measured: for_inference() in float32, {torch.get_num_threads()} threads, median seconds a volume, memory of weights and activations."
    for name, refusal in refusals.items():
        logger.warning("%s is left out: %s", name, refusal)


def _row(name: str, volume: str, *cells: str) -> str:
    return f"{name:<18} {volume:>12} " + " ".join(f"{cell:>9}" for cell in cells)


def _beside(counted: float, paper: float | None, digits: int) -> tuple[str, str, str]:
    """A figure counted, the paper's and the difference."""
    if paper is None:
        return f"{counted:.{digits}f}", "", ""
    return f"{counted:.{digits}f}", f"{paper:g}", f"{100 * (counted / paper - 1):+.1f} %"


def _measure_here(name: str, size: Size, runs: int) -> Measurement:
    volume = torch.rand(1, 1, *size)
    before = resident()[0]
    encoder = build_encoder(name, size=size).for_inference()
    times = []
    with torch.inference_mode():
        encoder(volume)
        for _ in range(runs):
            start = time.perf_counter()
            encoder(volume)
            times.append(time.perf_counter() - start)
    return Measurement(statistics.median(times), resident()[1] - before)


def resident() -> tuple[int, int]:
    """Bytes of memory that this process holds, and held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux `getrusage` would start from the parent's peak
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8-sig").splitlines())
        return tuple(1024 * int(lines[key].split()[0]) for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    import resource

    import psutil

    return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

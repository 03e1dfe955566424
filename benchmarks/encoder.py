"""Compare the encoder's speed with the paper's literal definition (literal_encoder.py) and with this machine's limits.

    python -m benchmarks.encoder
    python -m benchmarks.encoder --allocation system
    python -m benchmarks.encoder --encoder dcformer_tiny --size 64,128,128 --runs 9

Every form has the same weights and the same volume. The forms take turns in one process, after one warm-up each, and the medians count, of seconds
and of the processor's seconds (of all threads), in which other programs show less. The memory of a training step is that of a process of its own.
The programs of this project keep freed memory for the next tensor (med3dvlm/allocator.py); `--allocation system` leaves that as the system has it.
Writes <output>/encoder_<allocation>.json and .md.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.literal_encoder import literal
from med3dvlm.allocator import keep_freed_memory
from med3dvlm.encoders import build_encoder
from med3dvlm.encoders.base import bfloat16_is_fast
from med3dvlm.encoders.cost import count, resident
from med3dvlm.files import write_json
from med3dvlm.programs import Parser, positive, run

LITERAL = "literal, float32"
LITERAL_BF16 = "literal, bfloat16 autocast"


@dataclass(frozen=True)
class Form:
    """One way to compute the encoder: (B, 1, D, H, W) -> the tokens of stem and stages."""

    module: nn.Module
    autocast: bool = False

    def __call__(self, volume: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return [tokens.float() for tokens in self.module(volume)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="dcformer_small", help="a DCFormer (default: %(default)s)")
    parser.add_argument("--size", default="128,256,256", help="D,H,W of the volume (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=2, help="volumes in a training step (default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=5, help="timed runs of each form (default: %(default)s)")
    parser.add_argument("--allocation", choices=["kept", "system"], default="kept", help="of freed memory (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"))
    parser.add_argument(
        "--memory-of", help=argparse.SUPPRESS
    )  # in a process of its own: a training step of this form, its memory to stdout
    arguments = parser.parse_args(argv)
    if arguments.allocation == "kept":
        keep_freed_memory()
    size = tuple(int(number) for number in arguments.size.split(","))
    encoder = trained_like(arguments.encoder)
    volumes = torch.rand(arguments.batch, 1, *size, generator=torch.Generator().manual_seed(0))
    if arguments.memory_of:
        print(step_memory(training_forms(encoder)[arguments.memory_of], volumes))
        return

    results: dict[str, Any] = {"encoder": arguments.encoder, "size": size, "allocation": arguments.allocation, **machine()}
    results["gflops"] = count(arguments.encoder, size).operations / 1e9  # multiply-accumulates
    results["inference"] = inference(inference_forms(encoder), volumes[:1], arguments.runs)
    results["training"] = training(training_forms(encoder), volumes, arguments.runs)
    for name, row in results["training"].items():
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.encoder", *sys.argv[1:], "--memory-of", name], check=True, capture_output=True, text=True
        )
        row["step_gb"] = float(child.stdout)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"encoder_{arguments.allocation}.json"
    write_json(path, results)
    path.with_suffix(".md").write_text(table(results), encoding="utf-8")
    print(table(results))


def trained_like(name: str) -> nn.Module:
    """An encoder whose running statistics and scales are not the neutral initial ones."""
    encoder = build_encoder(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in encoder.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif key.endswith((".scale", "running_mean")):
                tensor.normal_(0.3, 0.1, generator=generator)
    return encoder


def inference_forms(encoder: nn.Module) -> dict[str, Form]:
    encoder.eval()
    reference = literal(encoder)
    return {
        LITERAL: Form(reference),
        **literal_bfloat16(reference),
        "as trained, float32": Form(encoder),
        "for_inference(float32)": Form(encoder.for_inference(torch.float32)),
        "for_inference(bfloat16)": Form(encoder.for_inference(torch.bfloat16)),
    }


def training_forms(encoder: nn.Module) -> dict[str, Form]:
    encoder.train()
    reference = literal(encoder)
    return {
        LITERAL: Form(reference),
        **literal_bfloat16(reference),
        "ours, float32": Form(encoder),
        "ours, bfloat16 autocast": Form(encoder, autocast=True),
    }


def literal_bfloat16(reference: nn.Module) -> dict[str, Form]:
    """Left out where the CPU is slow at it: where it emulates bfloat16, convolutions take about a hundred times as long."""
    return {LITERAL_BF16: Form(reference, autocast=True)} if bfloat16_is_fast() else {}


def inference(forms: dict[str, Form], volume: Tensor, runs: int) -> dict[str, dict[str, float]]:
    """Seconds, and the largest difference of a stage's tokens from the literal float32 ones, relative to their spread."""
    with torch.inference_mode():
        expected = forms[LITERAL](volume)
        differences = {name: max(map(relative, form(volume), expected)) for name, form in forms.items()}
        seconds = timed({name: lambda form=form: form(volume) for name, form in forms.items()}, runs)
    return {name: {**seconds[name], "difference": differences[name]} for name in forms}


def training(forms: dict[str, Form], volumes: Tensor, runs: int) -> dict[str, dict[str, float]]:
    """Seconds of forward and backward, and the largest difference of a parameter's gradient (norm of it, relative) from literal float32."""
    expected = gradients(forms[LITERAL], volumes)
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())  # those that are zero but for rounding are no measure
    differences = {}
    for name, form in forms.items():
        found = gradients(form, volumes)
        differences[name] = max(
            float((found[key].view(-1) - gradient.view(-1)).norm()) / max(float(gradient.norm()), floor)
            for key, gradient in expected.items()
        )
    seconds = timed({name: lambda form=form: gradients(form, volumes) for name, form in forms.items()}, runs)
    return {name: {**seconds[name], "difference": differences[name]} for name in forms}


def gradients(form: Form, volumes: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the mean square of the last two stages' tokens, which projectors take, by the parameter's name."""
    form.module.zero_grad(set_to_none=True)
    sum(tokens.square().mean() for tokens in form(volumes)[-2:]).backward()  # type: ignore[union-attr]
    return {name: parameter.grad for name, parameter in form.module.named_parameters() if parameter.grad is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


def timed(calls: dict[str, Any], runs: int) -> dict[str, dict[str, float]]:
    """The median seconds of each call, and the processor's; they take turns, so that a slow moment of the machine does not meet one alone."""
    clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
    taken: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            started = [clock() for clock in clocks.values()]
            call()
            taken[name].append([clock() - start for clock, start in zip(clocks.values(), started, strict=True)])
    return {name: dict(zip(clocks, map(statistics.median, zip(*rows, strict=True)), strict=True)) for name, rows in taken.items()}


def step_memory(form: Form, volumes: Tensor) -> float:
    """Return by how many GB the first training step raises the process's memory."""
    before, _ = resident()
    gradients(form, volumes)
    return (resident()[1] - before) / 1e9


def machine() -> dict[str, Any]:
    """Measure the machine's limits: the arithmetic of a large matrix product in GFLOP/s and the bandwidth of a large copy in GB/s."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    facts["capability"] = torch.backends.cpu.get_cpu_capability()
    for dtype in (torch.float32, torch.bfloat16):
        side = 2048 if dtype == torch.float32 or bfloat16_is_fast() else 256
        matrix = torch.rand(side, side).to(dtype)
        seconds = timed({"product": lambda matrix=matrix: matrix @ matrix}, 5)["product"]["seconds"]
        facts[f"gflops_{str(dtype).removeprefix('torch.')}"] = 2 * side**3 / seconds / 1e9
    source = torch.rand(1 << 26)
    target = torch.empty_like(source)
    facts["copy_gb_per_second"] = 2 * source.nbytes / timed({"copy": lambda: target.copy_(source)}, 5)["copy"]["seconds"] / 1e9
    return facts


def table(results: dict[str, Any]) -> str:
    """Markdown: the machine, inference, training."""
    size = "x".join(map(str, results["size"]))
    arithmetic = 2 * results["gflops"]
    lines = [
        f"{results['encoder']}, {size}: {results['gflops']:.1f} G multiply-accumulates a volume. This machine ({results['capability']}, "
        f"{results['threads']} threads, torch {results['torch']}) reaches {results['gflops_float32']:.0f} GFLOP/s in float32 and "
        f"{results['gflops_bfloat16']:.0f} in bfloat16, and copies {results['copy_gb_per_second']:.0f} GB/s: "
        f"the arithmetic alone takes {arithmetic / results['gflops_float32']:.2f} s in float32. Freed memory: {results['allocation']}.",
    ]
    for what, volumes in (("inference", "1 volume"), ("training", "forward and backward")):
        rows = results[what]
        lines += [
            "",
            f"| {what}, {volumes} | seconds | CPU seconds | x {LITERAL} | x {LITERAL_BF16} | difference | GB |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            ratios = (f"{rows[other]['seconds'] / row['seconds']:.2f}" if other in rows else "" for other in (LITERAL, LITERAL_BF16))
            memory = f"{row['step_gb']:.2f}" if "step_gb" in row else ""
            lines.append(
                f"| {name} | {row['seconds']:.3f} | {row['cpu_seconds']:.3f} | {' | '.join(ratios)} | {row['difference']:.1e} | {memory} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run(main))

"""The figures of a rehearsal in report.md and report.json, from what its steps left under a folder; exit code 1 where one did not pass.

    python benchmarks/rehearsal_report.py --root outputs/rehearsal

Of each stage: first and last loss, seconds a step (the median), tokens and volumes a second, the peak memory of its processes; of every step
its seconds and the most that its processes held together.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from med3dvlm.files import read_lines, write_json, write_text
from med3dvlm.programs import Parser, run
from med3dvlm.tables import markdown_table
from med3dvlm.training.environment import environment

STAGES = ("stage1", "stage2", "stage3")
STEPS = (
    "phantoms", "prepare", "text_encoder", "language_model", *STAGES, "merge", "merge_same", "publish_stage1", "convert_stage1", "same_stage1",
    "publish_merged", "convert_merged", "same_merged", "ask_merged", "ask_converted_merged", "retrieval", "report",
)  # fmt: skip


def lines_of(path: Path) -> list[dict[str, Any]]:
    return read_lines(path) if path.is_file() else []


def json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else None


def stage_figures(folder: Path) -> dict[str, Any]:
    """Figures of a training from its losses.jsonl and run.json; none where it has logged no step."""
    lines, record = lines_of(folder / "losses.jsonl"), json_of(folder / "run.json")
    if not lines:
        return {}
    figures = {"steps": lines[-1]["step"], "first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"]}
    figures["finite"] = all(math.isfinite(line["loss"]) for line in lines)
    keys = ("train_runtime", "step", "num_input_tokens_seen")
    changes = [[after[key] - before[key] for key in keys] for before, after in pairwise(lines)]
    changes = [change for change in changes if change[0] > 0]  # a training that went on began its clock anew
    if changes and record:
        seconds, settings = statistics.median(time / steps for time, steps, _ in changes), record["settings"]
        rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * record["processes"]
        figures |= {"seconds_a_step": seconds, "volumes_a_second": rows / seconds, "parameters": record["parameters"]}
        if "max_length" in settings:  # stages 2 and 3; in stage 1 the Trainer counts voxels
            figures["tokens_a_second"] = sum(tokens for *_, tokens in changes) / sum(time for time, *_ in changes)
    return figures


def step_figures(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each step that was begun its last exit code, the seconds of all its runs, and the memory of the one that held the most."""
    steps: dict[str, dict[str, Any]] = {}
    for line in lines:
        before = steps.get(line["step"], {"seconds": 0.0, "peak_rss_gb": 0.0})
        memory = max(line, before, key=lambda one: one["peak_rss_gb"])
        steps[line["step"]] = {
            "code": line["code"],
            "seconds": round(before["seconds"] + line["seconds"], 1),
            **{key: memory[key] for key in ("peak_rss_gb", "processes")},
        }
    return steps


def machine() -> dict[str, Any]:
    """The processor, what it computes bfloat16 with, and its memory."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8-sig") if cpuinfo.is_file() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{flag}\b", text)]
    level, total = torch.backends.cpu.get_cpu_capability(), psutil.virtual_memory().total
    return {
        "processor": name[1] if name else "unknown processor",
        "instructions": flags,
        "torch_level": level,
        "cores": os.cpu_count(),
        "memory_gb": round(total / 1e9, 1),
    }


def collect(root: Path) -> dict[str, Any]:
    """Collect everything that goes into report.json."""
    steps = step_figures(lines_of(root / "seconds.jsonl"))
    stages = {name: stage_figures(root / name) for name in STAGES}
    failed = [name for name, step in steps.items() if step["code"] != 0]
    failed += [f"{name} (a loss is not finite)" for name, figures in stages.items() if not figures.get("finite", True)]
    missing = [name for name in STEPS if name not in steps]
    return {
        "passed": not failed and not missing,
        "failed": failed,
        "not_run": missing,
        "plan": json_of(root / "plan.json"),
        "stages": stages,
        "steps": steps,
        "seconds": round(sum(step["seconds"] for step in steps.values()), 1),
        "peak_rss_gb": max((step["peak_rss_gb"] for step in steps.values()), default=None),
        **machine(),
        **environment(),
    }


def markdown(report: dict[str, Any]) -> str:
    told = {"Failed": report["failed"], "Not run": report["not_run"]}
    verdict = "Every step passed." if report["passed"] else "NOT PASSED. "
    verdict += " ".join(f"{word}: {', '.join(names)}." for word, names in told.items() if names)
    planned = (
        "{layers} layers, {steps} steps a stage, {processes} processes; bfloat16 products at {bfloat16_gflops} GFLOP/s and {free_gb} GB "
    )
    planned = (planned + "free when it began. {reduced}").format(**report["plan"]) if report["plan"] else ""
    keys = ("first_loss", "last_loss", "steps", "seconds_a_step", "tokens_a_second", "volumes_a_second")
    stages = []
    for name, figures in report["stages"].items():
        peaks = [f"{process} {peak:.2f}" for process, peak in report["steps"].get(name, {}).get("processes", ())]
        stages.append([name, *map(figures.get, keys), ", ".join(peaks)])
    columns = ("stage", "first loss", "last loss", "steps", "s a step", "tokens/s", "volumes/s", "peak GB of each process")
    steps = [[name, step["code"] or "passed", step["seconds"], step["peak_rss_gb"]] for name, step in report["steps"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"""# Rehearsal at real shapes

{verdict}

{planned}

{report["processor"]}, {report["cores"]} cores, {report["memory_gb"]} GB, {", ".join(report["instructions"])} (torch uses {report["torch_level"]}); \
{versions}; commit {report["commit"]}.

{markdown_table(columns, stages)}

{markdown_table(("step", "result", "seconds", "peak GB of all its processes"), steps)}

{report["seconds"]:.0f} seconds in all, at most {report["peak_rss_gb"]} GB at a time. Memory is resident memory, seen twice a second; pages that \
processes share count once for each.
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder of the rehearsal")
    root = parser.parse_args(argv).root
    report = collect(root)
    write_json(root / "report.json", report)
    text = markdown(report)
    write_text(root / "report.md", text)
    print(f"\n{text}\nWritten to {root / 'report.md'} and report.json.")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(run(main))

"""The figures of a rehearsal in report.md and report.json, from what its steps left under a folder; exit code 1 where one did not pass.

    python benchmarks/rehearsal_report.py --root outputs/rehearsal

Of each stage: first and last loss, seconds a step (the median), tokens and volumes a second, and the peak memory of its processes; of every
step its seconds and the most that its processes held together.
"""

import argparse
import json
import math
import os
import platform
import re
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from med3dvlm.files import read_lines, write_json, write_text
from med3dvlm.tables import markdown_table
from med3dvlm.training import environment

STAGES = ("stage1", "stage2", "stage3")
STEPS = (
    "phantoms", "prepare", "text_encoder", "language_model", *STAGES, "merge", "merge_same", "publish_stage1", "convert_stage1", "same_stage1",
    "publish_merged", "convert_merged", "same_merged", "ask_merged", "ask_converted_merged", "retrieval", "report",
)  # fmt: skip


def stage_figures(folder: Path) -> dict[str, Any] | None:
    """Figures of a training from its losses.jsonl and run.json; None where it has logged no step."""
    lines = read_lines(folder / "losses.jsonl") if (folder / "losses.jsonl").is_file() else []
    if not lines:
        return None
    # A training that went on began its clock anew, and what it did before counts for nothing.
    pairs = [(before, after) for before, after in pairwise(lines) if after["train_runtime"] > before["train_runtime"]]
    seconds = [(after["train_runtime"] - before["train_runtime"]) / (after["step"] - before["step"]) for before, after in pairs]
    figures: dict[str, Any] = {
        "steps": lines[-1]["step"],
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "finite": all(math.isfinite(line["loss"]) for line in lines),
        "seconds_a_step": statistics.median(seconds) if seconds else None,
    }
    run = folder / "run.json"
    if seconds and run.is_file():
        record = json.loads(run.read_text(encoding="utf-8"))
        settings = record["settings"]
        rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * record["processes"]
        figures |= {
            "processes": record["processes"],
            "parameters": record["parameters"],
            "volumes_a_second": rows / figures["seconds_a_step"],
        }
        if "max_length" in settings:  # stages 2 and 3; in stage 1 the Trainer counts voxels
            seen = sum(after["num_input_tokens_seen"] - before["num_input_tokens_seen"] for before, after in pairs)
            figures["tokens_a_second"] = seen / sum(after["train_runtime"] - before["train_runtime"] for before, after in pairs)
    return figures


def step_figures(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each step that was begun: its last exit code, the seconds of all its runs, and the peaks of memory among them."""
    steps: dict[str, dict[str, Any]] = {}
    for line in lines:
        before = steps.get(line["step"], {"seconds": 0.0, "peak_rss_gb": 0.0, "processes": []})
        most = max(before, line, key=lambda one: one["peak_rss_gb"])
        steps[line["step"]] = {
            "code": line["code"],
            "seconds": round(before["seconds"] + line["seconds"], 1),
            "peak_rss_gb": most["peak_rss_gb"],
            "processes": most["processes"],
        }
    return steps


def machine() -> dict[str, Any]:
    """The processor, what it computes bfloat16 with, and its memory."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{flag}\b", text)]
    return {
        "processor": name[1] if name else platform.processor(),
        "instructions": flags,
        "torch_level": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }


def collect(root: Path) -> dict[str, Any]:
    """Everything that goes into report.json."""
    steps = step_figures(read_lines(root / "seconds.jsonl") if (root / "seconds.jsonl").is_file() else [])
    stages = {name: stage_figures(root / name) for name in STAGES}
    failed = [name for name in STEPS if name in steps and steps[name]["code"] != 0]
    failed += [f"{name} (a loss is not finite)" for name, figures in stages.items() if figures and not figures["finite"]]
    missing = [name for name in STEPS if name not in steps]
    plan = root / "plan.json"
    return {
        "passed": not failed and not missing,
        "failed": failed,
        "not_run": missing,
        "plan": json.loads(plan.read_text(encoding="utf-8")) if plan.is_file() else None,
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
        stages.append([name, *((figures or {}).get(key) for key in keys), ", ".join(peaks)])
    steps = [
        [name, "passed" if step["code"] == 0 else f"code {step['code']}", step["seconds"], step["peak_rss_gb"]]
        for name, step in report["steps"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"# Rehearsal at real shapes\n\n{verdict}\n\n{planned}\n\n"
        f"{report['processor']}, {report['cores']} cores, {report['memory_gb']} GB, {', '.join(report['instructions'])} "
        f"(torch uses {report['torch_level']}); {versions}; commit {report['commit']}.\n\n## Stages\n\n"
        + markdown_table(
            ("stage", "first loss", "last loss", "steps", "s a step", "tokens/s", "volumes/s", "peak GB of each process"), stages
        )
        + "\n\n## Steps\n\n"
        + markdown_table(("step", "result", "seconds", "peak GB of all its processes"), steps)
        + f"\n\n{report['seconds']:.0f} seconds in all, at most {report['peak_rss_gb']} GB at a time. Memory is resident memory, seen twice a "
        "second; pages that processes share count once for each.\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder of the rehearsal")
    root = parser.parse_args().root
    report = collect(root)
    write_json(root / "report.json", report)
    text = markdown(report)
    write_text(root / "report.md", text)
    print(f"\n{text}\nWritten to {root / 'report.md'} and report.json.")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())

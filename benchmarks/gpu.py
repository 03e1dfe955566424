"""Measure everything that needs a GPU, in one command without a network, at most 9 minutes on an H100 or H200.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --parts precision training inference --minutes 4
    python -m benchmarks.gpu --parts data models stage1 stage2 stage3 --layers 8
    python -m benchmarks.gpu --device cpu --tiny          the same parts at tiny sizes without a GPU: to see that the script itself runs

Its parts are the table PARTS below, in their order: encoders against float64 in every layout of types; the encoder beside its literal form, time and
memory; which attention runs; data and models of the papers' sizes with random weights; steps of every stage through DeepSpeed; generation; and
what torch.compile makes of the encoders. Each is a process of its own, which fails, or finds a package missing, alone. None is begun when the
minutes are nearly used up, and the one that still runs is ended then. Writes results.json and results.md, after every part anew, and the words of
the parts to logs/, all into --output. Exit code 0, 1 where a part failed, 2 where there is no GPU.

All of it needs torch, torchvision, transformers and pytest, whose tolerances it takes; data, models and stages need deepspeed, accelerate, peft,
open_clip_torch, monai, nibabel, pydicom and matplotlib, too. The package itself need not be installed.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks import gpu_encoders, gpu_models
from benchmarks.gpu_encoders import LITERAL, NUMBERS, OURS, Cases, Settings
from benchmarks.gpu_models import REPOSITORY
from med3dvlm.files import read_lines, write_json, write_text
from med3dvlm.programs import Parser, run
from med3dvlm.tables import markdown_table

OWN = ("benchmarks", "med3dvlm", "stages", "tests")
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "accelerate", "open_clip_torch", "triton", "numpy")
MIN_SECONDS = 20  # left, for a part to begin
REPORT_SECONDS = 5  # kept for ending a part and writing
FULL_DEPTH = 28  # layers of Qwen2.5-7B


class Part(NamedTuple):
    title: str
    cases: Callable[[Settings], Cases]
    needs: tuple[str, ...] = ()  # files that earlier parts write


def stage(name: str) -> Callable[[Settings], Cases]:
    return partial(gpu_models.stage, name=name)


PARTS = {
    "precision": Part("Encoders against float64, relative differences", gpu_encoders.precision),
    "training": Part("Encoder, forward and backward", partial(gpu_encoders.encoder_speed, training=True)),
    "inference": Part("Encoder, prediction", gpu_encoders.encoder_speed),
    "attention": Part("Attention that runs", gpu_models.attention),
    "data": Part("Data prepared", gpu_models.data),
    "models": Part("Models written", gpu_models.models, ("prepared/summary.json",)),
    "stage1": Part("Stage 1, ZeRO-2, bfloat16", stage("stage1"), ("prepared/summary.json", "text_encoder/config.json")),
    "stage2": Part("Stage 2, ZeRO-2, bfloat16", stage("stage2"), ("stage1/config.json", "language_model/config.json")),
    "stage3": Part("Stage 3, ZeRO-2, bfloat16", stage("stage3"), ("stage2/config.json",)),
    "ct_clip": Part("CT-CLIP path, ZeRO-2, bfloat16", stage("ct_clip"), ("chests/summary.json",)),
    "stage0": Part("Stage 0, ZeRO-2, bfloat16", stage("stage0"), ("prepared/summary.json",)),
    "generation": Part("Generation", gpu_models.generation),
    "inference_compiled": Part("Encoder, prediction, ours compiled", partial(gpu_encoders.encoder_speed, compiled=True)),
    "precision_compiled": Part("Compiled encoders against float64", partial(gpu_encoders.precision, compiled=True)),
}


def fitting_layers(output: Path) -> int:
    """Return how many of the layers the memories of GPU and host and the disk hold."""
    from benchmarks.rehearsal_models import LAYER, VOCABULARY

    card = torch.cuda.get_device_properties(0).total_memory / 1e9 - 20  # for activations, logits, and the encoder
    host = psutil.virtual_memory().available / 1e9 / 2  # while a model is loaded or saved
    disk = shutil.disk_usage(output).free / 1e9 / 2.5  # the language model, and stage 2's model with it
    return max(1, min(FULL_DEPTH, int((min(card, host, disk) / 2 - 2 * VOCABULARY) / LAYER)))  # 2 bytes a number


def machine(device: str) -> dict[str, Any]:
    """Card, driver and versions."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    facts: dict[str, Any] = {"device": device, "card": None, "driver": None, "versions": versions}
    if device == "cuda":
        facts["card"] = torch.cuda.get_device_name()
        facts["card_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return facts


def run_part(name: str, arguments: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Run a part in a process of its own; gives its status (passed, failed, left out), the reason, its seconds, and its cases."""
    result: dict[str, Any] = {"status": "left out", "reason": None, "seconds": 0.0, "cases": []}
    started = time.monotonic()
    if deadline - started < MIN_SECONDS:
        return result | {"reason": "the minutes were used up"}
    if missing := [file for file in PARTS[name].needs if not (arguments.output / "work" / file).exists()]:
        return result | {"reason": f"{missing[0]} is not there; an earlier part would have written it"}
    log, lines = (arguments.output / "logs" / f"{name}.{kind}" for kind in ("log", "jsonl"))
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    variables["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # for the environment's own ninja
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    if arguments.device == "cpu":
        variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--output", arguments.output, "--device", arguments.device, "--layers", arguments.layers, "--batch", arguments.batch]
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, *map(str, flags), *(["--tiny"] if arguments.tiny else [])]
    with log.open("wb") as words:
        process = subprocess.Popen(command, stdout=words, stderr=words, cwd=REPOSITORY, env=os.environ | variables, start_new_session=True)
        try:
            code: int | None = process.wait(timeout=deadline - time.monotonic() - REPORT_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # out of time, or Ctrl+C
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result |= {"seconds": round(time.monotonic() - started, 1), "cases": read_lines(lines)}
    absent = next((case["left_out"] for case in result["cases"] if "left_out" in case), None)
    errors = [f"{case['case']}: {case['error']}" for case in result["cases"] if "error" in case]
    if errors:
        return result | {"status": "failed", "reason": errors[0] + (f" ({len(errors)} cases failed)" if len(errors) > 1 else "")}
    if code is None or absent:
        return result | {"reason": absent or f"the minutes were used up after {len(result['cases'])} cases"}
    if code:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return result | {"status": "failed", "reason": f"ended with {code}: {said[-1] if said else 'it said nothing'}"}
    return result | {"status": "passed"}


def run_cases(name: str, settings: Settings, path: Path) -> None:
    """Run the part's cases here, and append the figures of each to the file. One that fails does not stop the others."""
    try:
        for title, case in PARTS[name].cases(settings):
            started = time.monotonic()
            figures: dict[str, Any] = {"case": title}
            try:
                figures |= case()
            except Exception as error:
                if absent_package(error):
                    raise
                traceback.print_exc()
                figures["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
            append(path, figures | {"wall": round(time.monotonic() - started, 1)})
    except ImportError as error:
        if not (reason := absent_package(error)):
            raise
        traceback.print_exc()
        append(path, {"case": name, "left_out": reason})


def absent_package(error: Exception) -> str | None:
    """Return what the error says of a package that is not installed; None for other errors."""
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] not in OWN:
        return f"the package {error.name} is not installed"
    if type(error) is ImportError and error.name is None:  # transformers' own word; that of Python names the module
        return str(error).strip().splitlines()[0]
    return None


def append(path: Path, figures: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")


def compare(result: dict[str, Any]) -> list[str]:
    """Add to ours how it compares with the literal form in the same numbers, and in float32; returns sentences that say so."""
    forms = {case["case"]: case for case in result["cases"] if "seconds" in case and "error" not in case}
    said = []
    for name, case in forms.items():
        form, numbers, *more = name.split(", ")
        if form != OURS or numbers not in NUMBERS:
            continue
        for other, key in ((f"{LITERAL}, {numbers}", "literal"), (f"{LITERAL}, float32", "literal_float32")):
            if reference := forms.get(other):
                case[f"times_as_fast_as_{key}"] = reference["seconds"] / case["seconds"]
                if "gb" in case:
                    case[f"memory_of_{key}"] = case["gb"] / reference["gb"]
        if "times_as_fast_as_literal" in case:
            memory = f" at {case['memory_of_literal']:.2f} times its memory" if "memory_of_literal" in case else ""
            said.append(f"{' '.join([numbers, *more])}: {case['times_as_fast_as_literal']:.2f} times as fast as the literal form{memory}")
    return said


def cell(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value


def markdown(report: dict[str, Any]) -> str:
    """The report as text: machine, status of the parts, comparison with the literal form, and the cases of each."""
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in report["versions"].items())
    card = (
        f"{report['card']}, {report['card_gb']} GB, driver {report['driver']}"
        if report["card"]
        else "No GPU: a run of the script on the CPU"
    )
    sizes = (
        "Tiny sizes" if report["tiny"] else f"{report['layers']} layers of the language model, batches of {report['batch']} for the encoder"
    )
    lines = ["# On a GPU", "", f"{card}; {versions}.", f"{sizes}; {report['seconds']:.0f} seconds in all.", ""]
    status = [[name, part["status"], part["seconds"], len(part["cases"]), part["reason"]] for name, part in report["parts"].items()]
    lines += [markdown_table(("part", "result", "seconds", "cases", "reason"), [[cell(one) for one in row] for row in status])]
    if report["comparison"]:
        lines += ["", "## Against the literal form", "", *(f"- {sentence}" for sentence in report["comparison"])]
    for name, part in report["parts"].items():
        if part["cases"]:
            columns = list(dict.fromkeys(key for case in part["cases"] for key in case if key != "wall"))
            table = markdown_table(columns, [[cell(case.get(key)) for key in columns] for case in part["cases"]])
            lines += ["", f"## {PARTS[name].title}", "", table]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part is begun when they are nearly used up (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--layers", type=int, help=f"of the language model (default: what memory and disk hold, {FULL_DEPTH} at most)")
    parser.add_argument("--batch", type=int, help="volumes for the encoder's time and memory (default: 8, tiny 2)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu with --tiny alone")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, of which figures say nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu takes tiny sizes alone; add --tiny, or run on a GPU without --device")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: torch sees no GPU here; run it where there is one, or try the script itself with --device cpu --tiny",
            file=sys.stderr,
        )
        return 2
    output = arguments.output = arguments.output.resolve()
    if arguments.part:
        settings = Settings(arguments.device, arguments.tiny, output / "work", arguments.layers, arguments.batch)
        run_cases(arguments.part, settings, output / "logs" / f"{arguments.part}.jsonl")
        return 0

    started = time.monotonic()
    for folder in ("work", "logs"):
        shutil.rmtree(output / folder, ignore_errors=True)
        (output / folder).mkdir(parents=True)
    arguments.batch = arguments.batch or (2 if arguments.tiny else 8)
    arguments.layers = arguments.layers or (1 if arguments.tiny else fitting_layers(output))
    report = {
        **machine(arguments.device),
        "tiny": arguments.tiny,
        "layers": arguments.layers,
        "batch": arguments.batch,
        "comparison": [],
        "parts": {},
    }
    for name in (name for name in PARTS if name in arguments.parts):
        part = report["parts"][name] = run_part(name, arguments, started + 60 * arguments.minutes)
        if name in ("training", "inference", "inference_compiled"):
            report["comparison"] += [f"{PARTS[name].title}, {sentence}" for sentence in compare(part)]
        report["seconds"] = time.monotonic() - started
        write_json(output / "results.json", report)
        write_text(output / "results.md", markdown(report))
        print(
            f"{name}: {part['status']}, {len(part['cases'])} cases, {part['seconds']} s"
            + (f"; {part['reason']}" if part["reason"] else ""),
            flush=True,
        )
    shutil.rmtree(output / "work")
    print(f"written to {output / 'results.md'} and results.json")
    return int(any(part["status"] == "failed" for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(run(main))

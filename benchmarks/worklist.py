"""How fast `med3dvlm run` reports on a folder of scans, beside `med3dvlm report` for one scan after the other, in the same run.

    python -m benchmarks.worklist --model outputs/demo/model
    python -m benchmarks.worklist --size smollm2 --scans 40

Without --model, a model of random weights as in `benchmarks.serving`. The scans are phantoms. Measured are, in seconds a scan: the command
`med3dvlm report` started for each scan (--loop of them), `Med3DChat.report` in one process that has loaded the model (the same scans four times
over, each as a new file), and the command `med3dvlm run` with everything that it starts and writes. The reports must be the same. Writes
<output>/worklist.json and .md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving import SIZES, random_chat
from med3dvlm import Med3DChat
from med3dvlm.datasets.phantom import write_phantoms
from med3dvlm.files import write_json, write_text
from med3dvlm.programs import Parser, positive, run
from med3dvlm.tables import markdown_table

CUT = 3  # exit code of `run` where reports are cut by their length


def command(*words: object) -> tuple[float, str]:
    """Run `med3dvlm` with these words; return seconds and stdout."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "med3dvlm.cli", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode not in (0, CUT):
        raise ValueError(f"med3dvlm {words[0]} ended with {done.returncode}: {done.stderr}")
    return time.perf_counter() - started, done.stdout


def measure(model: Path, scans: Path, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return seconds a scan of each way."""
    tokens = ("--max-new-tokens", arguments.report_tokens)
    files = sorted(scans.rglob("*.nii.gz"))
    looped = [command("report", model, file, *tokens) for file in files[: arguments.loop]]
    chat, times = Med3DChat.from_pretrained(model), []
    for file in [*files[: arguments.loop]] * 4:
        os.utime(file)  # not remembered
        started = time.perf_counter()
        chat.report(file, max_new_tokens=arguments.report_tokens)
        times.append(time.perf_counter() - started)
    options = ("--workers", arguments.workers, "--batch-size", arguments.batch_size)
    seconds, _ = command("run", model, scans, "--out", out, *options, *tokens)
    records = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8-sig").splitlines()]
    alike = sum(said.strip() == record["report"]["text"].strip() for (_, said), record in zip(looped, records, strict=False))
    return {
        "report_command": sum(seconds for seconds, _ in looped) / len(looped),
        "one_process": sum(times) / len(times),
        "run": seconds / len(records),
        "scans_run": len(records),
        "same_reports": f"{alike} of {len(looped)}",
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the folder of a trained model (default: random weights)")
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the random language model (default: %(default)s)")
    parser.add_argument("--scans", type=positive, default=200, help="phantoms to report on, at least 10 (default: %(default)s)")
    parser.add_argument("--loop", type=positive, default=5, help="of them one after the other (default: %(default)s)")
    parser.add_argument("--workers", type=positive, default=2, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=16, help="(default: %(default)s)")
    parser.add_argument("--report-tokens", type=positive, default=128, help="of a report, at most (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"))
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="med3dvlm-worklist-") as temporary:
        root = Path(temporary)
        model = arguments.model
        if model is None:
            model, chat = root / "model", random_chat(arguments.size)
            chat.model.save_pretrained(model)
            chat.processor.save_pretrained(model)
        write_phantoms(root / "phantoms", arguments.scans, 0, 1.0, arguments.workers)
        results: dict[str, Any] = {key: str(value) for key, value in vars(arguments).items() if key != "output"}
        results |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "processor": platform.processor() or platform.machine()}
        results |= measure(model, root / "phantoms" / "M3D_Cap", root / "out", arguments)
    write_json(arguments.output / "worklist.json", results)
    write_text(arguments.output / "worklist.md", table(results))
    print(table(results))


def table(results: dict[str, Any]) -> str:
    names = {
        "report_command": "`med3dvlm report`, one after the other",
        "one_process": "`Med3DChat.report`, one after the other",
        "run": f"`med3dvlm run`, {results['workers']} workers",
    }
    rows = [[words, f"{results[name]:.3g}", f"{results[name] / results['run']:.1f}"] for name, words in names.items()]
    about = (
        f"{results['scans_run']} scans, {results['threads']} threads, torch {results['torch']}; same reports: {results['same_reports']}."
    )
    return f"{about}\n\n{markdown_table(('way', 's a scan', 'against run'), rows)}\n"


if __name__ == "__main__":
    sys.exit(run(main))

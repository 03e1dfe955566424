"""Measure the chat with many users: each with a scan of its own, all asking at the same time, compared with one after the other.

    python -m benchmarks.chat --model outputs/demo/model
    python -m benchmarks.chat --address http://127.0.0.1:7860 --sessions 20

Without --address the chat is started for the measurement, and ended. Every session is a gradio_client of its own with its own phantom. First the
sessions ask one after the other; what they are told then is what they must be told together, word for word, since answers are greedy and a
scan and a conversation decide them. Counted are answers that differ (mixed up), that fail or do not come (lost), and the seconds from a
question to its first words. Writes <output>/app.json and .md.
"""

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from gradio_client import Client, handle_file

from med3dvlm.datasets.phantom import Acquisition, draw, plan_phantoms
from med3dvlm.files import write_json, write_text
from med3dvlm.programs import Parser, positive, run
from med3dvlm.tables import markdown_table

QUESTIONS = ("Describe the findings.", "Which organ is abnormal?", "What abnormality is seen?")
CHAT = Path(__file__).parents[1] / "app" / "chat.py"


@dataclass(frozen=True)
class Visit:
    """One session's record: the size of its scan in words, its answers, and the seconds to the first words of each."""

    size: str
    answers: list[str]
    seconds: list[float]
    total: float


def write_scans(folder: Path, count: int, detail: float = 1.0) -> list[Path]:
    """Phantoms that differ, one a session."""
    paths = []
    for number, plan in enumerate(plan_phantoms(max(10, count), seed=11)[:count]):
        canvas = draw(plan.body, Acquisition("axial", plan.acquisition.phase, plan.acquisition.seed, detail))
        affine = np.eye(4)
        affine[:3, :3] = canvas.directions[:, ::-1]
        paths.append(folder / f"{number}.nii.gz")
        array = canvas.array.astype(np.int16)[: len(canvas.array) - number]  # so that its size tells whose scan it is
        nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), paths[-1])
    return paths


def visit(address: str, scan: Path) -> Visit:
    """One session: open the scan, ask everything in one conversation."""
    client, started = Client(address, verbose=False, analytics_enabled=False, download_files=False), time.perf_counter()
    facts = client.predict([handle_file(scan)], api_name="/open")["facts"]
    answers, seconds = [], []
    for question in QUESTIONS:
        asked, first = time.perf_counter(), None
        for state in client.submit(question, api_name="/ask"):
            if first is None and state["answer"]:
                first = time.perf_counter() - asked
        answers.append(f"{state['state']}: {state['answer'].strip()}")
        seconds.append(first if first is not None else float("nan"))
    total = time.perf_counter() - started
    client.close()
    return Visit(facts["Size"], answers, seconds, total)


def attempt(address: str, scan: Path) -> Visit | None:
    """The visit, or None where it broke off."""
    try:
        return visit(address, scan)
    except Exception as error:  # whatever it was, it counts as lost
        print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def compare(alone: list[Visit], together: list[Visit | None]) -> dict[str, Any]:
    """Counts of what went wrong, and the times."""
    came = [(one, other) for one, other in zip(alone, together, strict=True) if other is not None]
    pairs = [pair for one, other in came for pair in zip([one.size, *one.answers], [other.size, *other.answers], strict=True)]
    first = [second for _, other in came for second in other.seconds]
    return {
        "sessions": len(alone),
        "answers": len(alone) * len(QUESTIONS),
        "lost": (len(together) - len(came)) * len(QUESTIONS) + sum(not answer.startswith("done") for _, o in came for answer in o.answers),
        "mixed_up": sum(one != other for one, other in pairs),
        "first_words_alone": statistics.median(second for one in alone for second in one.seconds),
        "first_words_together": statistics.median(first) if first else None,
        "first_words_together_slowest": max(first) if first else None,
        "visit_alone": statistics.median(one.total for one in alone),
        "visit_together": statistics.median(other.total for _, other in came) if came else None,
    }


def serve(model: Path, run: Callable[[str], Any]) -> Any:
    """Start the chat on a free port, run against it, and end it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(CHAT), "--model", str(model), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}) as chat:
        try:
            assert chat.stdout is not None
            words = chat.stdout.readline().split()
            address = next((word for word in words if word.startswith("http")), None)
            if address is None:
                raise ValueError(f"the chat did not start with {model}")
            return run(address)
        finally:
            chat.terminate()
            chat.communicate()  # it says that it ends


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=Path("outputs/demo/model"), help="directory of a trained model (default: %(default)s)"
    )
    parser.add_argument("--address", help="of a chat that runs already")
    parser.add_argument("--sessions", type=positive, default=20, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"))
    arguments = parser.parse_args(argv)

    def run(address: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            scans = write_scans(Path(folder), arguments.sessions)
            alone = [visit(address, scan) for scan in scans]
            with ThreadPoolExecutor(len(scans)) as pool:
                together = list(pool.map(lambda scan: attempt(address, scan), scans))
        return compare(alone, together)

    results = run(arguments.address) if arguments.address else serve(arguments.model, run)
    results["processor"] = platform.processor() or platform.machine()
    results["cores"] = os.cpu_count()
    write_json(arguments.output / "app.json", results)
    rows = [[name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else value] for name, value in results.items()]
    table = markdown_table(("figure, times in s", "value"), rows) + "\n"
    write_text(arguments.output / "app.md", table)
    print(table)


if __name__ == "__main__":
    sys.exit(run(main))

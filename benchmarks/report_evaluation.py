"""Compare the speed of writing and scoring reports with the protocol of the published evaluation, by the same model, with the same outcome.

    python -m benchmarks.report_evaluation
    python -m benchmarks.report_evaluation --root outputs/demo --studies 64 --runs 3

The published way takes one study at a time: encoder as trained, generation for a batch of one, each metric called for each study, and
BERTScore's model loaded anew each time. Ours encodes with the fused encoder, generates in batches, scores all at once and loads BERTScore once.
Both begin with a loaded model and end with all figures; they take turns after a warm-up, and the median run counts. Texts must be equal and
figures equal to 1e-5, or the program fails.

Besides, how many volumes eval/vqa.py and eval/retrieval.py encode, beside one for each question and one for each study of each of four pools.
Reads model, stage1 and prepared below ROOT, as `make demo` leaves them. Writes <output>/eval.json and .md.
"""

import argparse
import contextlib
import io
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook

from med3dvlm import Med3DChat, evaluation
from med3dvlm.allocator import keep_freed_memory
from med3dvlm.datasets.store import PreparedData, same_preprocessing
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.encoders.base import Encoder
from med3dvlm.files import read_lines, write_json, write_text
from med3dvlm.metrics import bertscore
from med3dvlm.metrics.evaluate_module import TextScore
from med3dvlm.metrics.meteor import meteor_available
from med3dvlm.metrics.text import text_values
from med3dvlm.programs import Parser, positive, run
from med3dvlm.prompts import REPORT_PROMPTS
from med3dvlm.records import Study

PROMPT = REPORT_PROMPTS[0]
FIGURES = ("bleu1", "rouge1", "rouge2", "rougeL", "meteor", "bertscore_f1")
Outcome = tuple[list[str], dict[str, float], dict[str, float]]  # texts, figures, and seconds by part


class Clock:
    """Seconds by the name of what was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@torch.no_grad()
def published(chat: Med3DChat, data: PreparedData, studies: Sequence[Study], length: int) -> Outcome:
    """One study at a time."""
    clock, texts, rows = Clock(), [], []
    metrics = [TextScore(name) for name in ("bleu", "rouge", *(["meteor"] if meteor_available() is None else []))]
    for study in studies:
        with clock.time("writing"):
            prompt = torch.tensor([chat.processor.encode([{"role": "user", "content": PROMPT}], generate=True)["input_ids"]])
            volume = load_volumes(data, [study], chat.model.device).to(chat.model.dtype)
            tokens = chat.model.generate(prompt.to(chat.model.device), pixel_values=volume, max_new_tokens=length)[0]
            texts.append(chat.processor.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip())
        with clock.time("words"):
            row: dict[str, float] = {}
            for metric in metrics:
                row |= metric.compute(predictions=texts[-1:], references=[study.report])
        with clock.time("BERTScore"):
            bertscore._load.cache_clear()
            row["bertscore_f1"] = float(bertscore.bert_scorer().values(texts[-1:], [study.report])["bertscore_f1"][0])
        rows.append(row)
    return texts, {name: float(np.mean([row[name] for row in rows])) for name in FIGURES if name in rows[0]}, clock.seconds


def ours(chat: Med3DChat, data: PreparedData, studies: Sequence[Study], length: int, batch_size: int) -> Outcome:
    """Evaluate as eval/report_gen.py does."""
    clock, texts = Clock(), []
    with clock.time("writing"):
        for batch in evaluation.in_batches(studies, batch_size):
            features = [chat.encode(data.volume(study).to(chat.model.device)) for study in batch]
            texts += [answer.text for answer in chat.answers(features, [PROMPT] * len(batch), length, batch_size)]
    references = [study.report for study in studies]
    with clock.time("words"):
        values = text_values(texts, references)
    with clock.time("BERTScore"):
        bertscore._load.cache_clear()
        values |= bertscore.bert_scorer().values(texts, references)
    return texts, {name: float(values[name].mean()) for name in FIGURES if name in values}, clock.seconds


def encoded(script: str, *arguments: object) -> int:
    """Count the volumes that an encoder computes while an evaluation runs."""
    seen = [0]

    def count(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(module, Encoder):
            seen[0] += len(inputs[0])

    hook = register_module_forward_hook(count)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import_module(f"med3dvlm.evaluation.{script}").main([*map(str, arguments)])
    finally:
        hook.remove()
    return seen[0]


def counts(root: Path, split: str, studies: int) -> dict[str, dict[str, int]]:
    """Volumes encoded by vqa.py and retrieval.py, beside those that nothing remembered would take."""
    pools = sorted({max(1, studies // part) for part in (8, 4, 2, 1)})
    common = ("--data", root / "prepared", "--split", split, "--limit", studies, "--output")
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "vqa"
        vqa = encoded("vqa", "--model", root / "model", *common, answers, "--max-new-tokens", 1)
        questions = len(read_lines(answers / "predictions.jsonl"))
        sizes = ",".join(map(str, pools))
        retrieval = encoded("retrieval", "--model", root / "stage1", *common, Path(folder) / "retrieval", "--pools", sizes)
    return {
        "vqa": {"encoded": vqa, "one a question": questions, "volumes": studies},
        "retrieval": {"encoded": retrieval, "one a pool and study": sum(pools), "volumes": studies},
    }


def check_equal(one: Outcome, other: Outcome) -> None:
    """Raises ValueError unless both ways wrote the same and scored it alike."""
    if different := sum(a != b for a, b in zip(one[0], other[0], strict=True)):
        raise ValueError(f"{different} of {len(one[0])} reports differ between the two ways, so their times do not compare")
    for name, value in one[1].items():
        if abs(value - other[1][name]) > 1e-5:
            raise ValueError(f"{name} is {value} the published way and {other[1][name]} ours; they must be equal")


def table(results: dict[str, Any]) -> str:
    """Markdown: seconds by part, then the volumes encoded."""
    parts = list(results["published"]["parts"])
    lines = [
        f"{results['studies']} reports of at most {results['max_new_tokens']} tokens, {results['threads']} threads, "
        f"BERTScore by {results['bertscore_model']}: {results['times']:.1f} x faster end to end, with the same texts and figures.",
        "",
        f"| seconds, median of {results['runs']} runs | {' | '.join(parts)} | all |",
        "|---|" + "---|" * (len(parts) + 1),
    ]
    for name in ("published", "ours"):
        seconds = [*results[name]["parts"].values(), results[name]["seconds"]]
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in seconds)} |")
    lines += ["", "| volumes encoded | ours | without remembering | there are |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(map(str, row.values()))} |" for name, row in results["volumes"].items()]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("outputs/demo"), help="with model, stage1 and prepared (default: %(default)s)")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--studies", type=positive, default=64, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=32, help="of our way (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="(default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=3, help="of each way (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"))
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    data = PreparedData(arguments.root / "prepared")
    studies = data.studies(arguments.split)[: arguments.studies]
    chat = Med3DChat.from_pretrained(arguments.root / "model", "cpu")
    same_preprocessing(chat.processor.image_processor, data)
    length = arguments.max_new_tokens
    ways = {
        "published": lambda studies: published(chat, data, studies, length),
        "ours": lambda studies: ours(chat, data, studies, length, arguments.batch_size),
    }
    for way in ways.values():
        way(studies[:2])  # warm-up
    outcomes: dict[str, list[Outcome]] = {name: [] for name in ways}
    for _ in range(arguments.runs):
        for name, way in ways.items():
            outcomes[name].append(way(studies))
        check_equal(outcomes["published"][-1], outcomes["ours"][-1])
    results: dict[str, Any] = {
        "studies": len(studies),
        "max_new_tokens": length,
        "batch_size": arguments.batch_size,
        "runs": arguments.runs,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "bertscore_model": bertscore.bert_scorer().name,
        "figures": outcomes["ours"][0][1],
    }
    for name, runs in outcomes.items():
        parts = {part: statistics.median(seconds[part] for _, _, seconds in runs) for part in runs[0][2]}
        results[name] = {"seconds": statistics.median(sum(seconds.values()) for _, _, seconds in runs), "parts": parts}
    results["times"] = results["published"]["seconds"] / results["ours"]["seconds"]
    results["volumes"] = counts(arguments.root, arguments.split, len(studies))
    write_json(arguments.output / "eval.json", results)
    write_text(arguments.output / "eval.md", table(results))
    print(table(results))


if __name__ == "__main__":
    sys.exit(run(main))

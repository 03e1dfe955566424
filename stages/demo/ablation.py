"""Tables 5 to 8 of the Med3DVLM paper from the runs of stages/demo/ablation.sh, with the published figures beside.

    bash stages/demo/ablation.sh demo
    python stages/demo/ablation.py --root outputs/ablation

Writes report.md and summary.json to the root. A row that was not run, or a score that cannot be computed here, is a dash. Figures are per cent.
Every row says where it comes from: ours learned from small volumes of another kind for a few steps, so that they compare with one another
and with nothing that the paper prints.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from med3dvlm import evaluation
from med3dvlm.evaluation.paper_tables import TABLES
from med3dvlm.files import read_lines, write_text
from med3dvlm.metrics.meteor import meteor_available
from med3dvlm.metrics.text import text_scores
from med3dvlm.programs import Parser, run
from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.records import QUESTION_KINDS
from med3dvlm.training.environment import environment

ENCODERS = {
    "vit3d_clip": "ViT3D CLIP",
    "vit3d_siglip": "ViT3D SigLIP",
    "dcformer_clip": "DCFormer CLIP",
    "dcformer_siglip": "DCFormer-S SigLIP",
}
PROJECTORS = {
    "mlp": "2xMLP",
    "low_high_mlp": "2xMLP-H",
    "mixer_1": "1xMLP-Mixer-H",
    "mixer_2": "2xMLP-Mixer-H",
    "spatial_pooling": "spatial pooling",
}
PAPER = "paper"
M3D_LAMED = "paper, M3D-LaMed"  # the one published model with this projector; its encoder and language model are others too

PUBLISHED = yaml.safe_load(TABLES.read_text(encoding="utf-8-sig"))["tables"]


def figures(table: str, method: str) -> list[tuple[float, ...]]:
    """Return a method's figures in a table of published.yaml, a tuple a row."""
    width = len(PUBLISHED[table]["columns"])
    return [tuple(row[-width:]) for row in PUBLISHED[table]["rows"] if row[0].removesuffix(" (Ours)") == method]


# As printed. Table 5: lines R@1, R@5, R@10 of image retrieval, then of text retrieval; columns by POOLS.
POOLS = (100, 500, 1000, 2000)
RECALLS = tuple((direction, recall) for direction in ("text_to_image", "image_to_text") for recall in ("r1", "r5", "r10"))
TEXT_SCORES = {"bleu1": "BLEU", "rouge1": "ROUGE", "meteor": "METEOR", "bertscore": "BERTScore"}
KINDS = (*QUESTION_KINDS, "mean")
ABLATED = {row: method for row, method in PROJECTORS.items() if row != "spatial_pooling"}
TABLE_5 = {row: tuple(zip(*rows, strict=True)) for row, method in ENCODERS.items() if (rows := figures("med3dvlm_5", method))}
TABLE_6 = {row: figures("med3dvlm_6", method)[0] for row, method in ABLATED.items()}
TABLE_7 = {row: tuple(figures("med3dvlm_7", method)) for row, method in ABLATED.items()}  # lines by TEXT_SCORES, columns by KINDS
TABLE_8 = {row: figures("med3dvlm_8", method)[0] for row, method in ABLATED.items()}  # columns by KINDS
# The row of spatial pooling is M3D-LaMed's of Tables 2 (with the MLP), 3 and 4.
TABLE_6["spatial_pooling"] = figures("med3dvlm_2", "M3D-LaMed (MLP)")[0]
TABLE_7["spatial_pooling"] = tuple(figures("med3dvlm_3", "M3D-LaMed"))
TABLE_8["spatial_pooling"] = figures("med3dvlm_4", "M3D-LaMed")[0]


def collect(root: Path) -> dict[str, dict[str, Any]]:
    """Row -> its stages' steps, seconds and trained parameters, and its scores as shares of 1; rows that were not finished are left out."""
    rows: dict[str, dict[str, Any]] = {}
    for row in ENCODERS:
        folder = root / row
        if (retrieval := folder / "eval" / "retrieval" / "scores.json").is_file():
            rows[row] = training(folder) | {"retrieval": {scores["pool"]: scores for scores in read(retrieval).values()}}
    for row in PROJECTORS:
        folder = root / row
        if all((folder / "eval" / name / "scores.json").is_file() for name in ("vqa", "report")):
            vqa, report = (read(folder / "eval" / name / "scores.json") for name in ("vqa", "report"))
            rows[row] = training(folder / "stage2", folder / "stage3") | {
                "report": {name: report["text"].get(name) for name in TEXT_SCORES} | {"findings_f1": report["findings_f1"]},
                "open": open_answers(read_lines(folder / "eval" / "vqa" / "predictions.jsonl")),
                "letter": by_kind(vqa["letter"]),
                "likeliest": by_kind(vqa["closed"]),
                "blind": by_kind(vqa["closed"]["blind"]),
            }
    return rows


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def training(*stages: Path) -> dict[str, Any]:
    runs = [read(stage / "run.json") for stage in stages]
    return {
        "steps": [run["steps"] for run in runs],
        "seconds": sum(run["seconds"] for run in runs),
        "trained_parameters": [run["parameters"]["trainable"] for run in runs],
    }


def by_kind(scores: dict[str, Any]) -> dict[str, float | None]:
    return {kind: scores.get(kind) for kind in QUESTION_KINDS} | {"mean": scores["accuracy"]}


def open_answers(predictions: Iterable[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Score -> kind of question -> its value over the answers written freely, and the mean of the kinds, as in Table 7."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for line in predictions:
        if line["choices"] != ["Yes", "No"]:
            kinds.setdefault(line["kind"], []).append((line["open"], line["answer"]))
    scores: dict[str, dict[str, float | None]] = {name: dict.fromkeys(KINDS) for name in TEXT_SCORES}
    for kind, pairs in kinds.items():
        written, expected = zip(*pairs, strict=True)
        found = text_scores(written, expected)
        for name in ("bleu1", "rouge1", "meteor"):
            scores[name][kind] = found.get(name)
    for columns in scores.values():
        known = [value for value in columns.values() if value is not None]
        columns["mean"] = fmean(known) if known else None
    return scores


def source(row: dict[str, Any] | None, data: str) -> str:
    """Describe the origin of one of our figures."""
    return f"{data}, not run" if row is None else f"{data}, {' + '.join(map(str, row['steps']))} steps"


def percent(values: Iterable[float | None]) -> list[str | None]:
    return [None if value is None else f"{100 * value:.2f}" for value in values]


def printed(values: Iterable[float]) -> list[str]:
    return [f"{value:.2f}" for value in values]


def table_5(rows: dict[str, dict[str, Any]], data: str) -> str:
    lines: list[Sequence[Any]] = []
    for name, method in ENCODERS.items():
        if name in TABLE_5:
            lines += ([method, PAPER, pool, *printed(figures)] for pool, *figures in zip(POOLS, *TABLE_5[name], strict=True))
        row = rows.get(name)
        if row is None:
            lines.append([method, source(row, data), None, *[None] * len(RECALLS)])
            continue
        for pool, scores in row["retrieval"].items():
            lines.append([method, source(row, data), pool, *percent(scores[direction][recall] for direction, recall in RECALLS)])
    header = [f"{way} R@{k}" for way in ("IR", "TR") for k in (1, 5, 10)]
    return evaluation.markdown_table(("method", "figures of", "samples", *header), lines)


def table_6(rows: dict[str, dict[str, Any]], data: str) -> str:
    lines: list[Sequence[Any]] = []
    for name, method in PROJECTORS.items():
        row = rows.get(name)
        lines.append([method, published(name), *printed(TABLE_6[name]), None])
        lines.append([method, source(row, data), *(percent(row["report"].values()) if row else [None] * (len(TEXT_SCORES) + 1))])
    return evaluation.markdown_table(("method", "figures of", *TEXT_SCORES.values(), "findings F1"), lines)


def table_7(rows: dict[str, dict[str, Any]], data: str) -> str:
    lines: list[Sequence[Any]] = []
    for name, method in PROJECTORS.items():
        row = rows.get(name)
        for score, figures in zip(TEXT_SCORES, TABLE_7[name], strict=True):
            lines.append([method, TEXT_SCORES[score], published(name), *printed(figures)])
            ours = percent(row["open"][score][kind] for kind in KINDS) if row else [None] * len(KINDS)
            lines.append([method, TEXT_SCORES[score], source(row, data), *ours])
    return evaluation.markdown_table(("method", "metric", "figures of", *KINDS), lines)


def table_8(rows: dict[str, dict[str, Any]], data: str) -> str:
    lines: list[Sequence[Any]] = []
    for name, method in PROJECTORS.items():
        row = rows.get(name)
        lines.append([method, published(name), "letter", *printed(TABLE_8[name])])
        for answer in ("letter", "likeliest", "blind"):
            ours = percent(row[answer][kind] for kind in KINDS) if row else [None] * len(KINDS)
            lines.append([method, source(row, data), answer, *ours])
    return evaluation.markdown_table(("method", "figures of", "answer", *KINDS), lines)


def published(row: str) -> str:
    return M3D_LAMED if row == "spatial_pooling" else PAPER


def effort(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        [
            ENCODERS.get(name) or PROJECTORS[name],
            " + ".join(map(str, row["steps"])),
            " + ".join(f"{number / 1e6:.3f}" for number in row["trained_parameters"]),
            f"{row['seconds'] / 60:.1f}",
        ]
        for name, row in rows.items()
    ]
    return evaluation.markdown_table(("method", "steps", "trained parameters, M", "minutes of training"), lines)


def write_report(rows: dict[str, dict[str, Any]], data: str) -> str:
    """report.md: a heading, a note and a table each."""
    sections = (
        (
            "Table 5: vision encoder and loss, image-text retrieval",
            "Recall in per cent. IR looks for the scan of a report, TR for the report of a scan, among so many samples. "
            "The paper sets the methods side by side; here every row says where it comes from. The paper has no ViT3D with SigLIP.",
            table_5(rows, data),
        ),
        (
            "Table 6: projectors, report generation",
            "BLEU is BLEU-1 and ROUGE is ROUGE-1, averaged over the reports. BERTScore needs a model that is not at hand. Findings F1, which the "
            "paper lacks, is the macro F1 of the findings that a report states, against the labels: word scores see mostly style.",
            table_6(rows, data),
        ),
        (
            "Table 7: projectors, open questions",
            "What the model writes after the bare question. The mean is that of the kinds of question.",
            table_7(rows, data),
        ),
        (
            "Table 8: projectors, closed questions",
            "Accuracy by the letter that the model writes, as in the paper; by the likeliest of the choices' texts; and that again on an empty "
            "volume (blind), which shows what the question alone gives away.",
            table_8(rows, data),
        ),
        ("Effort", "Steps and trained parameters of stage 1, or of stages 2 + 3.", effort(rows)),
    )
    parts = [
        "# Ablations of the Med3DVLM paper",
        f"*{RESEARCH_NOTICE}*",
        f'Rows marked "{PAPER}" are the published ones: clinical scans of 128x256x256 voxels and, in Tables 6 to 8, a language model of 7 billion '
        f'parameters. Rows marked "{data}" come from this code on small volumes with small models and a few steps: they compare with one another '
        "alone. The paper has no row for spatial pooling; beside it stands M3D-LaMed, which uses it with another encoder and language model.",
        *filter(None, [meteor_available()]),
    ]
    for heading, note, table in sections:
        parts += [f"## {heading}", note, table]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder of the runs, one below it for each row")
    parser.add_argument("--data-name", default="phantoms", help="what our rows learned from, as the tables call it (default: %(default)s)")
    arguments = parser.parse_args(argv)
    root: Path = arguments.root
    rows = collect(root)
    if not rows:
        raise FileNotFoundError(
            f"{root} has no finished row of {', '.join((*ENCODERS, *PROJECTORS))}; run: bash stages/demo/ablation.sh demo"
        )
    tables = {"table_5": TABLE_5, "table_6": TABLE_6, "table_7": TABLE_7, "table_8": TABLE_8}
    evaluation.write_scores(root / "summary.json", {"data": arguments.data_name, "rows": rows, "published": tables, **environment()})
    report = write_report(rows, arguments.data_name)
    write_text(root / "report.md", report)
    print(report)


if __name__ == "__main__":
    sys.exit(run(main))

"""All figures of one run in summary.json, report.md with pictures and report.html, from what the stages and evaluations left under a folder.

    python stages/demo/summary.py --root outputs/demo --name demo
    python stages/demo/summary.py --root outputs/demo-full --name demo-full --scans outputs/demo-full/phantoms

Reads eval/retrieval, eval/vqa, eval/report and prepared, and where they are there eval/segmentation, the stages' run.json and losses.jsonl, and
seconds.jsonl.
It sets the figures that are expected of the run of that name beside those that were reached; it never fails because of one.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from med3dvlm import evaluation, plots
from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation.page import write_page
from med3dvlm.evaluation.question_scores import YES_NO
from med3dvlm.evaluation.targets import Targets, at, compare, target_table
from med3dvlm.files import read_lines, write_text
from med3dvlm.metrics.answers import right_choices
from med3dvlm.metrics.retrieval import recall_curve
from med3dvlm.programs import Parser, run
from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.records import QUESTION_KINDS, Study
from med3dvlm.training.environment import environment
from med3dvlm.volume import read_volume

STAGES = {"stage0": "language_model", "stage1": "stage1", "stage2": "stage2", "stage3": "stage3"}  # step -> folder
EVALUATIONS = {name: f"eval/{name}" for name in ("retrieval", "segmentation", "vqa", "report")}
CASES = 5

TARGETS: Targets = {
    "retrieval.image_to_text.r1": ("at least", {"demo": 0.05, "demo-full": 0.25}, 0.45),
    "retrieval.image_to_text.r10": ("at least", {"demo": 0.40, "demo-full": 0.85}, 0.97),
    "retrieval.text_to_image.r1": ("at least", {"demo": 0.05, "demo-full": 0.25}, 0.45),
    "retrieval.text_to_image.r10": ("at least", {"demo": 0.40, "demo-full": 0.85}, 0.97),
    "vqa_closed.accuracy": ("at least", {"demo": 0.45, "demo-full": 0.65}, 0.80),
    "vqa_closed.plane": ("at least", {"demo": 0.80, "demo-full": 0.95}, 0.98),
    "vqa_closed.phase": ("at least", {"demo": 0.60, "demo-full": 0.85}, 0.95),
    "vqa_closed.location": ("at least", {"demo": 0.45, "demo-full": 0.75}, 0.90),
    "vqa_closed.sides": ("at least", {"demo": 0.70, "demo-full": 0.95}, 0.99),
    "vqa_yes_no.balanced": ("at least", {"demo": 0.65, "demo-full": 0.85}, 0.95),
    "vqa_closed.blind": ("at most", {"demo": 0.40, "demo-full": 0.40}, 0.30),
    "vqa_closed.letter": ("at least", {}, None),
    "vqa_open.exact": ("at least", {}, None),
    "report.findings_f1": ("at least", {"demo": 0.35, "demo-full": 0.65}, 0.80),
    "report.lead": ("at least", {"demo": 0.10, "demo-full": 0.25}, 0.40),
    "masks.pointing": ("at least", {"demo": 0.75, "demo-full": 0.90}, 0.97),
    "masks.dice": ("at least", {"demo": 0.40, "demo-full": 0.65}, 0.80),
    "masks.drawn_though_absent": ("at most", {"demo": 0.20, "demo-full": 0.10}, 0.05),
    "seconds.total": ("at most", {"demo": 720, "demo-full": 3600}, None),
    "peak_rss_gb": ("at most", {"demo": 8, "demo-full": 8}, None),
}


def read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; write it with eval/retrieval.py, eval/vqa.py and eval/report_gen.py first")
    return json.loads(path.read_text(encoding="utf-8-sig"))


def collect(root: Path) -> dict[str, Any]:
    """Every figure under its name in summary.json."""
    retrieval, vqa, report = (read(root / "eval" / name / "scores.json") for name in ("retrieval", "vqa", "report"))
    segmentation = root / "eval" / "segmentation" / "scores.json"
    masks = read(segmentation) if segmentation.is_file() else None
    figures = at(masks, "large.figures") or {}
    pool = next(iter(retrieval.values()))  # the smallest: 100 studies, or all of a smaller split
    records = {step: root / folder / "run.json" for step, folder in (STAGES | EVALUATIONS).items()}
    made = {step: read(record) for step, record in records.items() if record.is_file()}
    runs = {step: run for step, run in made.items() if step in STAGES}
    commits = {step: run.get("commit") for step, run in made.items()}
    timed = read_lines(root / "seconds.jsonl")
    seconds: dict[str, float] = {}
    for line in timed:  # a step that was interrupted has several
        seconds[line["step"]] = round(seconds.get(line["step"], 0.0) + line["seconds"], 1)
    seconds |= {step: run["seconds"] for step, run in runs.items() if step not in seconds}
    return {
        "retrieval": pool,
        "vqa_closed": {
            "accuracy": vqa["closed"]["accuracy"],
            **{kind: vqa["closed"].get(kind) for kind in QUESTION_KINDS},
            "blind": at(vqa, "closed.blind.accuracy"),
            "letter": vqa["letter"]["accuracy"],
            "sides": at(vqa, "laterality.accuracy"),
            "interval": vqa["closed"]["accuracy_interval"],
        },
        "vqa_open": {name: vqa["open"][name] for name in ("exact", "token_f1")},
        "vqa_yes_no": {
            "accuracy": vqa["yes_no"]["accuracy"],
            "balanced": vqa["yes_no"].get("balanced_accuracy"),
            "blind": at(vqa, "yes_no.blind.accuracy"),
        },
        "report": {
            "findings_f1": report["findings_f1"],
            "findings_f1_interval": report["findings_f1_interval"],
            "lead": difference(report["findings_f1"], at(report, "modal.findings_f1")),
            **{name: at(report, f"{name}.findings_f1") for name in ("blind", "shuffled", "modal", "best_fixed", "nearest")},
            **{name: value for name, value in report["text"].items() if name != "unavailable"},
            **report["collapse"],
        },
        "masks": {
            "dice": at(figures, "dice.value"),
            "dice_mean_mask": at(figures.get("mean_mask.dice"), "value"),
            "pointing": at(figures, "pointing.value"),
            "pointing_middle": at(figures.get("middle.pointing"), "value"),
            "drawn_though_absent": at(masks, "all.figures.absent.value"),
            "studies_with_any_drawn_though_absent": at(masks, "studies_with_an_absent_finding_drawn.value"),
        },
        "seconds": seconds | {"total": sum(seconds.values()) if seconds else None},
        "peak_rss_gb": max((line["peak_rss_gb"] for line in timed), default=None),
        "parameters": {step: run["parameters"] for step, run in runs.items()},
        "seed": next((run["settings"]["seed"] for run in runs.values()), None),
        "versions": environment()["versions"],
        "commit": next(iter(commits.values())) if len(set(commits.values())) == 1 else None,
        "commits": commits,
    }


def difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def draw(root: Path, summary: dict[str, Any], data: PreparedData, scans: Path) -> dict[str, Path]:
    """Every picture, by heading."""
    folder = root / "pictures"
    folder.mkdir(exist_ok=True)
    losses = {step: {line["step"]: line["loss"] for line in read_lines(root / path / "losses.jsonl")} for step, path in STAGES.items()}
    losses = {
        step: sorted(points.items()) for step, points in losses.items() if points
    }  # a step that was repeated after a break counts once
    embeddings = load_file(root / "eval" / "retrieval" / "embeddings.safetensors")
    pool = summary["retrieval"]["pool"]
    vqa, report = read(root / "eval" / "vqa" / "scores.json")["closed"], read(root / "eval" / "report" / "scores.json")
    by_finding = {name: entry for name, entry in report["findings"]["per_class"].items() if entry["f1"] is not None}
    fixed = at(report, "best_fixed.findings.per_class") or {}
    answers = read_lines(root / "eval" / "report" / "predictions.jsonl")
    chosen = [answers[index] for index in sorted({round(place) for place in np.linspace(0, len(answers) - 1, CASES)})]
    known = {study.id: study for split in data.summary["splits"] for study in data.studies(split)}
    pictures = {}
    if losses:
        pictures["Losses"] = plots.loss_curves(losses, folder / "losses.png")
    curve = recall_curve(embeddings["image"], embeddings["text"], pool=pool)
    pictures["Retrieval"] = plots.retrieval_curve(curve, folder / "retrieval.png", chance=1 / pool)
    if kinds := [kind for kind in QUESTION_KINDS if kind in vqa]:
        asked = [row for row in read_lines(root / "eval" / "vqa" / "predictions.jsonl") if row["choices"] not in ([], YES_NO)]
        chance = float(np.mean([len(right_choices(row["choices"], row["answer"])) / len(row["choices"]) for row in asked]))
        accuracy, blind = ({kind: scores[kind] for kind in kinds if kind in scores} for scores in (vqa, vqa.get("blind", {})))
        pictures["Closed questions"] = plots.vqa_bars(accuracy, blind, folder / "vqa.png", chance)
    if by_finding:
        f1, baseline = ({name: entry["f1"] for name, entry in table.items() if name in by_finding} for table in (by_finding, fixed))
        support = {name: entry["support"] for name, entry in by_finding.items()}
        pictures["Findings stated in the written reports"] = plots.findings_bars(f1, folder / "findings.png", baseline, "F1", support)
    cases = [show(known[row["id"]], data, scans) | {"reference": row["reference"], "prediction": row["prediction"]} for row in chosen]
    pictures["Cases of the test split"] = plots.cases(cases, folder / "cases.png")
    return pictures


def show(study: Study, data: PreparedData, scans: Path) -> dict[str, Any]:
    """Return a case for `plots.cases`: the scan in its true proportions if its file exists, else the prepared volume."""
    if not (scans / study.image).is_file():
        return {"name": study.id, "array": data.processor.dequantize(data.volume(study))[0]}
    volume = read_volume(scans / study.image)
    low, high = np.percentile(volume.array, (0.5, 99.5))
    array = np.clip((volume.array.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)
    return {"name": study.id, "array": array, "spacing": volume.spacing, "orientation": volume.orientation}


def notes(summary: dict[str, Any]) -> dict[str, str]:
    """Return remarks about a picture, by heading."""
    vqa, report, pool = summary["vqa_closed"], summary["report"], summary["retrieval"]["pool"]
    return {
        "Retrieval": f"The share of scans whose own report is among the first k of {pool} reports, and the other way round.",
        "Closed questions": (
            f"The likeliest of the choices after the bare question, mean over the kinds {spread(vqa['accuracy'], vqa['interval'])}. "
            f"Asked to write the letter of the right choice, {value(vqa['letter'])} are right; of answers written freely, "
            f"{value(summary['vqa_open']['exact'])} match word for word; "
            f"of yes/no questions {value(summary['vqa_yes_no']['accuracy'])} are right."
        ),
        "Findings stated in the written reports": (
            f"Positives of the split in brackets; macro F1 {spread(report['findings_f1'], report['findings_f1_interval'])}. "
            f"The marks are the best single report for every scan. Distinct reports: {value(report['distinct'])}."
        ),
        "Cases of the test split": "Evenly spread over the split, not selected: three slices, the reference, and what the model wrote.",
    }


def write_report(path: Path, name: str, summary: dict[str, Any], targets: str, pictures: dict[str, Path]) -> None:
    parts, words = [f"# {name}: results", f"*{RESEARCH_NOTICE}*", targets], notes(summary)
    for heading, picture in pictures.items():
        parts += [f"## {heading}", *filter(None, [words.get(heading)]), f"![{heading}]({picture.relative_to(path.parent).as_posix()})"]
    minutes = [(step, f"{seconds / 60:.1f}") for step, seconds in summary["seconds"].items() if seconds is not None]
    versions = ", ".join(f"{package} {version}" for package, version in summary["versions"].items())
    memory = f"At most {summary['peak_rss_gb']} GB of memory at a time; s" if summary["peak_rss_gb"] else "S"
    commits = [f"{step} {commit}" for step, commit in summary["commits"].items()]
    commit = (
        f"made by different commits: {', '.join(commits)}" if len(set(summary["commits"].values())) > 1 else f"commit {summary['commit']}"
    )
    parts += ["## Time and versions", evaluation.markdown_table(("step", "minutes"), minutes)]
    parts += [f"{memory}eed {summary['seed']}; {commit}; {versions}."]
    write_text(path, "\n\n".join(parts) + "\n")


def spread(figure: float | None, interval: list[float] | None) -> str:
    return (
        value(figure)
        if interval is None
        else f"{value(figure)} (95 % of resamples of the patients: {interval[0]:.2f} to {interval[1]:.2f})"
    )


def value(figure: float | None) -> str:
    return "none" if figure is None else f"{figure:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder of the run, with eval/ and prepared/ in it")
    parser.add_argument("--name", default="demo", help="demo, demo-full, or a name of which nothing is expected (default: %(default)s)")
    parser.add_argument(
        "--scans", type=Path, help="data set with the scan files, to draw cases in true proportions (default: ROOT/phantoms)"
    )
    arguments = parser.parse_args(argv)
    root = arguments.root
    summary = collect(root)
    summary["reached"] = compare(summary, TARGETS, arguments.name)
    evaluation.write_scores(root / "summary.json", summary)
    targets = target_table(summary["reached"])
    pictures = draw(root, summary, PreparedData(root / "prepared", exclude_failures=True), arguments.scans or root / "phantoms")
    write_report(root / "report.md", arguments.name, summary, targets, pictures)
    write_page([root], arguments.name)
    print(targets)


if __name__ == "__main__":
    sys.exit(run(main))

"""Write report.html: the figures of runs, their baselines without the scan, and their cases, in one file.

    med3dvlm evaluate page outputs/paper --cases 200 --megabytes 10
    med3dvlm evaluate page runs/retrieval runs/report_7b --output runs/report.html

Takes folders that evaluations wrote, or the folder above eval/ that holds them; all about the same data, whose volumes are read from
where run.json says. Losses are those of the stages beside eval/. The page needs neither network nor server; it follows the system's light or
dark mode and prints. Cases are spread evenly over the split, not selected:
three slices, reference and prediction with their findings marked as agreed, missed or invented by med3dvlm.reports.findings, and the answers.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation import compare, page_cases, page_masks, paper_tables
from med3dvlm.evaluation.question_scores import WITHOUT_SCAN, YES_NO, likeliest
from med3dvlm.files import read_lines, write_text
from med3dvlm.metrics.answers import right_choices
from med3dvlm.metrics.intervals import intervals, mean_of
from med3dvlm.metrics.retrieval import retrieval_ranks
from med3dvlm.metrics.text import LABELS
from med3dvlm.programs import Parser, positive
from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.records import ALL_KINDS, Study

HERE = Path(__file__).parent
STAGES = {"language model": "language_model", "stage 1": "stage1", "stage 2": "stage2", "stage 3": "stage3"}
COLLAPSE = {"distinct": "different reports", "commonest": "share of the commonest", "similarity": "words two reports share"}
CLASSES = 12  # rows and columns of a confusion matrix; rarer answers are one more
WAYS = compare.WAYS
KS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
Row = dict[str, Any]


def write_page(
    folders: Sequence[Path],
    name: str | None = None,
    output: Path | None = None,
    data_folder: Path | None = None,
    cases: int | None = None,
    megabytes: float = 20,
) -> Path:
    """Write the page of the runs in `folders`.

    Args:
        name: what the page is called, the name of the folder above eval/ by default.
        output: the file, report.html in that folder by default.
        data_folder: the prepared data, those that the runs name by default.
        cases: how many to show, all by default.
        megabytes: how large the page may become; cases are left out beyond, and the page says so.

    Raises:
        FileNotFoundError: there is no evaluation, or its data is not where it was.
        ValueError: an evaluation is about other data, or two are of the same kind.
    """
    import jinja2

    runs, detections = open_runs(folders)
    opened = [*runs.values(), *detections]
    first = opened[0].folder
    root = first.parent.parent if first.parent.name == "eval" else first
    beside = root / "prepared"
    data_folder = data_folder or (beside if beside.is_dir() else opened[0].record["data"])
    data = PreparedData(data_folder, exclude_failures=True, split_file=opened[0].record.get("split_file"))
    for run in opened:
        studies = compare.studies_of(run, data.root)
    sections = {"retrieval": retrieval, "vqa": questions, "report": reports}
    found: Row = {task: sections[task](run, scores_of(run), studies) for task, run in runs.items() if task in sections}
    if "segmentation" in runs:
        run = runs["segmentation"]
        found["masks"] = page_masks.figures(scores_of(run)) | {"pictures": page_masks.pictures(run.rows, data, studies)}
    if detections:
        found["detection"] = [{"name": run.folder.name, "scores": scores_of(run)} for run in detections]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "span": span, "words": lambda text: text.replace("_", " ")}
    everything = page_cases.gallery(runs, studies)
    shown = spread(everything, cases)
    page_cases.draw(shown, data, studies)

    def render() -> str:
        return environment.get_template("page.html").render(
            name=name or root.name,
            notice=RESEARCH_NOTICE,
            found=found,
            losses=losses(root),
            cases=shown,
            total=len(everything),
            findings=sorted({finding for case in shown for finding, _ in case["findings"]}),
            record=[(run.folder.name, run.record) for run in opened],
            data=data,
            about=opened[0].record["identity"]["split"],
        )

    text = render()
    while len(text.encode()) > megabytes * 1e6 and len(shown) > 1:
        shown = spread(shown, max(1, int(0.95 * len(shown) * megabytes * 1e6 / len(text.encode()))))
        text = render()
    path = output or root / "report.html"
    write_text(path, text)
    return path


def open_runs(folders: Sequence[Path]) -> tuple[dict[str, Any], list[Any]]:
    """Return the runs by their task, and those that detect findings, of which there may be several."""
    runs: dict[str, Any] = {}
    detections = []
    for folder in dict.fromkeys(below for given in folders for below in paper_tables.runs_below(given)):
        run = compare.open_run(folder)
        if run.task == "detection":
            detections.append(run)
        elif run.task in runs:
            raise ValueError(f"{runs[run.task].folder} and {folder} are both runs of {run.task}; name one of them")
        else:
            runs[run.task] = run
    return {task: runs[task] for task in compare.FIELDS if task in runs}, detections


def scores_of(run: Any) -> Row:
    return json.loads((run.folder / "scores.json").read_text(encoding="utf-8-sig"))


def number(value: float | None, places: int = 2) -> str:
    return "–" if value is None else f"{value:.{places}f}".replace("-", "−")


def span(interval: Sequence[float] | None, places: int = 2) -> str:
    return "" if interval is None else f"{number(interval[0], places)}–{number(interval[1], places)}"


def spread(values: Sequence[Any], count: int | None) -> list[Any]:
    """Return at most `count` of the values, evenly spaced."""
    places = np.linspace(0, len(values) - 1, min(count or len(values), len(values)))
    return [values[place] for place in sorted({round(place) for place in places})]


def retrieval(run: Any, scores: Row, studies: Mapping[str, Study]) -> Row:
    """Return a table line for each pool, direction and way of counting, and the curve of the largest pool."""
    lines = []
    for entry in scores.values():
        for way in WAYS:
            counted = {"": entry, "any of equal": entry["any_of_equal"], "shuffled": entry.get("shuffled", {})}
            if not entry["any_of_equal"]["duplicated"]:
                del counted["any of equal"]
            lines += [
                {"pool": entry["pool"], "way": way.replace("_", " "), "counted": name, "spans": part[way].get("intervals", {}), **part[way]}
                for name, part in counted.items()
                if way in part
            ]
        lines.append({"pool": entry["pool"], "way": "", "counted": "chance", "spans": {}, **entry["chance"]})
        pool = entry["pool"]
    stored = load_file(run.folder / "embeddings.safetensors")
    ks = [k for k in KS if k < pool] + [pool]
    curve = {}
    for way, ranks in retrieval_ranks(stored["image"], stored["text"], pool).items():
        hits = np.stack([ranks <= k for k in ks], axis=1).astype(float)  # (N, K)
        bands = intervals({"hits": mean_of(hits)}, [studies[row["id"]].patient for row in run.rows[:pool]])["hits"]
        curve[way.replace("_", " ")] = [(k, value, *band) for k, value, band in zip(ks, hits.mean(axis=0).tolist(), bands, strict=True)]
    chance = [(k, k / pool, None, None) for k in ks]
    return {"lines": lines, "pool": pool, "chart": chart(curve | {"chance": chance}, logarithmic=True, highest=1.0)}


def questions(run: Any, scores: Row, studies: Mapping[str, Study]) -> Row:
    """Return a line for each kind of question with the accuracy of every way of answering, and confusion tables of the chosen answers."""
    rows: dict[str, list[Row]] = {name: [] for name in (*ALL_KINDS, "yes/no")}
    for row in run.rows:
        rows["yes/no" if row["choices"] == YES_NO else row["kind"]].append(row)
    rows = {name: group for name, group in rows.items() if group}
    closed, yes_no = scores["closed"], scores["yes_no"]
    without = [name for name in WITHOUT_SCAN if name in closed]

    def line(name: str, key: str, entry: Row, interval: Any, asked: int) -> Row:
        """Return a table line of the figure `key`, by its ways of answering."""
        return {
            "kind": name,
            "count": asked,
            "closed": entry.get(key),
            "span": interval,
            "without": [entry.get(way, {}).get(key) for way in without],
            **dict.fromkeys(("letter", "strict", "open", "chance")),
        }

    lines, kinds = [], [kind for kind in rows if kind != "yes/no"]
    for kind in kinds:
        lines.append(line(kind, kind, closed, closed.get("intervals", {}).get(kind), len(rows[kind])))
        lines[-1] |= {"chance": chance_of(rows[kind])}
    if kinds:
        chances = [each["chance"] for each in lines if each["chance"] is not None]
        lines.append(line("mean of the kinds", "accuracy", closed, closed["accuracy_interval"], sum(len(rows[kind]) for kind in kinds)))
        lines[-1] |= {"chance": float(np.mean(chances)) if chances else None}
    for each, kind in zip(lines, [*kinds, "accuracy"], strict=False):
        each |= {way: scores[way].get(kind) for way in ("letter", "strict")}
        each |= {"open": scores["open"].get("exact") if kind == "accuracy" else scores["open"][kind]["exact"]}
    if "yes/no" in rows:  # all questions, as they were asked, and both answers alike
        for name, key in (("yes/no", "of_questions"), ("yes/no, balanced", "balanced_accuracy")):
            lines.append(line(name, key, yes_no, yes_no[f"{key}_interval"], len(rows["yes/no"])) | {"chance": 0.5})
    confusions = {name: confusion(group) for name, group in rows.items()}
    return {"lines": lines, "without": without, "confusions": {name: table for name, table in confusions.items() if table["names"]}}


def chance_of(rows: Sequence[Row]) -> float | None:
    """Return the accuracy of a random choice, None where none of the questions has choices."""
    shares = [len(right_choices(row["choices"], row["answer"])) / len(row["choices"]) for row in rows if row["choices"]]
    return float(np.mean(shares)) if shares else None


def confusion(rows: Sequence[Row]) -> Row:
    """Count expected answers (rows) and chosen ones (columns); answers beyond CLASSES are "other"."""
    pairs = [(row["answer"], likeliest(row)) for row in rows if row["choices"]]
    counted = Counter(answer for pair in pairs for answer in pair)
    names = sorted(sorted(counted), key=lambda name: -counted[name])[:CLASSES]
    names = sorted(names) + (["other"] if len(counted) > CLASSES else [])
    counts = np.zeros((len(names), len(names)), dtype=int)
    for pair in pairs:
        one, other = (names.index(answer) if answer in names else len(names) - 1 for answer in pair)
        counts[one, other] += 1
    return {"names": names, "counts": counts.tolist(), "shares": (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).tolist()}


def reports(run: Any, scores: Row, studies: Mapping[str, Study]) -> Row:
    """Return the model's line beside the baselines, and a line for each finding."""
    columns = {"model": scores} | {name: entry for name, entry in scores.items() if isinstance(entry, dict) and "findings_f1" in entry}

    def line(label: str, path: str) -> Row:
        values: list[Any] = list(columns.values())
        for key in path.split("."):
            values = [value.get(key) if isinstance(value, dict) else None for value in values]
        return {"label": label, "values": values, "spans": [entry["intervals"].get(path) for entry in columns.values()]}

    model = scores["text"].get("bertscore_model")
    figures = {"findings.macro.f1": "findings F1, macro", "findings.micro.f1": "findings F1, micro", "findings.crg": "findings CRG"}
    figures |= {f"text.{key}": f"{label} ({model})" if key.startswith("bert") else label for key, label in LABELS.items()}
    figures |= {f"collapse.{key}": label for key, label in COLLAPSE.items()}
    lines = [each for each in (line(label, path) for path, label in figures.items()) if each["values"][0] is not None]
    fixed = (scores.get("best_fixed") or {}).get("findings", {}).get("per_class", {})
    findings = [
        {"name": name, **entry, "span": entry["f1_interval"], "fixed": fixed.get(name, {}).get("f1")}
        for name, entry in scores["findings"]["per_class"].items()
        if entry["f1"] is not None
    ]
    fixed_texts = {name: entry["report"] for name, entry in columns.items() if "report" in entry}
    without_report = sum(not studies[row["id"]].report.strip() for row in run.rows)
    return {
        "columns": list(columns),
        "lines": lines,
        "findings": findings,
        "against": scores["findings"]["against"],
        "fixed": fixed_texts,
        "without_report": without_report,
    }


def losses(root: Path) -> dict[str, Row]:
    """Return the chart of each stage's logged losses; a step that was repeated after a break counts once."""
    curves = {
        stage: {line["step"]: line["loss"] for line in read_lines(root / folder / "losses.jsonl")} for stage, folder in STAGES.items()
    }
    return {
        stage: chart({"loss": [(step, loss, None, None) for step, loss in sorted(points.items())]})
        for stage, points in curves.items()
        if points
    }


def chart(curves: Mapping[str, Sequence[tuple[Any, ...]]], logarithmic: bool = False, highest: float | None = None) -> Row:
    """Return the positions of a chart's lines, bands and ticks. Curves are (x, y, low, high), with a band where low and high are numbers."""
    width, height, left, top, right, bottom = 380, 250, 34, 20, 16, 34
    xs = [point[0] for points in curves.values() for point in points]
    first, last = min(xs), max(xs)
    most = highest or 1.05 * max(point[1] for points in curves.values() for point in points)

    def across(value: float) -> float:
        share = np.log(value / first) / max(np.log(last / first), 1e-9) if logarithmic else (value - first) / max(last - first, 1e-9)
        return float(round(left + share * (width - left - right), 1))

    def up(value: float) -> float:
        return round(height - bottom - min(value, most) / most * (height - top - bottom), 1)

    lines = []
    for name, points in curves.items():
        band = [point for point in points if point[2] is not None]
        edge = [(x, high) for x, _, _, high in band] + [(x, low) for x, _, low, _ in reversed(band)]
        path = " ".join(f"{across(x)},{up(y)}" for x, y, _, _ in points)
        lines.append({"name": name, "path": path, "band": " ".join(f"{across(x)},{up(y)}" for x, y in edge)})
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if first <= k <= last] if logarithmic else round_ticks(first, last)
    return {
        "size": (width, height, left, top, width - right, height - bottom),
        "lines": lines,
        "x": [(across(tick), f"{tick:g}") for tick in ticks],
        "y": [(up(tick), f"{tick:g}") for tick in (round_ticks(0, most) if highest is None else (0, 0.25, 0.5, 0.75, 1))],
    }


def round_ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers between two."""
    steps = [factor * 10.0**power for power in range(-6, 9) for factor in (1, 2, 5)]
    step = next(step for step in steps if (high - low) / step <= 5 or step == steps[-1])
    return [round(step * place, 9) for place in range(int(np.ceil(low / step)), int(high / step) + 1)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of predictions, or one above eval/")
    parser.add_argument("--name", help="title of the page (default: the name of the folder above eval/)")
    parser.add_argument("--output", type=Path, help="file of the page (default: report.html in the folder above eval/)")
    parser.add_argument("--data", type=Path, help="prepared data of the runs (default: beside eval/, or where their run.json says)")
    parser.add_argument("--cases", type=positive, help="how many cases to show (default: all)")
    parser.add_argument("--megabytes", type=float, default=20, help="maximum size of the page in MB (default: %(default)s)")
    arguments = parser.parse_args(argv)
    print(write_page(arguments.runs, arguments.name, arguments.output, arguments.data, arguments.cases, arguments.megabytes))

"""Compare a run of an evaluation with another run, with the papers, or with itself without duplicates.

    med3dvlm evaluate compare outputs/demo/eval/report outputs/other/eval/report
    med3dvlm evaluate compare outputs/demo/eval/vqa --split-file outputs/demo/prepared/audit/deduplicated.json
    med3dvlm evaluate compare --published outputs/demo

Two runs about the same studies: each figure of both, their difference, its 95 % bootstrap interval and the p value of a paired randomisation
test, both by patient. They are computed from predictions.jsonl; patients and labels come from the prepared data that the runs name.
With --split-file, of one run: its figures over all studies and over those that the file keeps (retrieval then has a smaller pool); of two:
the comparison over those alone. --published prints the papers' tables (paper_tables.py). With --output, comparison.md and comparison.json.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.stats import rankdata

from med3dvlm import evaluation
from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation import paper_tables
from med3dvlm.evaluation.detection import label_table, log_odds_table
from med3dvlm.evaluation.question_scores import YES_NO, check_likelihoods, letter_is_right, likeliest_is_right, strict_is_right
from med3dvlm.evaluation.report_scores import reference_findings
from med3dvlm.files import read_lines, write_json, write_text
from med3dvlm.metrics.detection import of_known
from med3dvlm.metrics.intervals import (
    Statistic,
    Weights,
    auroc_of,
    average_precision_of,
    intervals,
    macro_f1_of,
    mean_of,
    mean_over,
    micro_f1_of,
    paired_test,
)
from med3dvlm.metrics.retrieval import rank_values, retrieval_ranks
from med3dvlm.metrics.text import text_values
from med3dvlm.programs import Parser
from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.records import ALL_KINDS, Study, has_letters
from med3dvlm.reports.findings import findings_table

FIELDS = {
    "retrieval": ("image_to_text", "text_to_image"),
    "vqa": ("question", "answer", "kind"),
    "report": ("reference", "prediction"),
    "detection": ("log_odds",),
    "segmentation": ("asked", "findings"),
}
WAYS = ("image_to_text", "text_to_image")
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """An evaluation's folder: run.json and predictions. `task` names the evaluation."""

    folder: Path
    task: str
    record: dict[str, Any]
    rows: list[Row]

    @property
    def cases(self) -> list[tuple[Any, ...]]:
        """Return the subject of each prediction: a study, the question, its choices or the findings."""
        return [(row["id"], row.get("question"), *map(str, row.get("choices") or row.get("log_odds") or ())) for row in self.rows]


class Figure(NamedTuple):
    """Values (N, ...), a row a case, and the function that makes the figure's statistic of them, or of two runs' values stacked."""

    values: NDArray[Any]
    statistic: Callable[[NDArray[Any]], Statistic]


def read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; name a folder that `med3dvlm evaluate` wrote")
    return json.loads(path.read_text(encoding="utf-8-sig"))


def open_run(folder: Path) -> Run:
    record, path = read(folder / "run.json"), folder / "predictions.jsonl"
    if missing := {"data", "split"} - record.get("identity", {}).keys():
        raise ValueError(f"{folder / 'run.json'} does not name the {' and '.join(sorted(missing))} of the run; run the evaluation again")
    rows = read_lines(path)
    if not rows:
        raise FileNotFoundError(f"{path} holds no predictions; run the evaluation that writes them")
    if not (folder / "scores.json").is_file():
        raise FileNotFoundError(f"{folder} holds {len(rows)} predictions and no scores.json: run the same evaluation again, it continues")
    task = next((task for task, fields in FIELDS.items() if all(field in rows[0] for field in fields)), None)
    if task is None:
        raise ValueError(
            f"{path} holds {', '.join(rows[0])}, which is no output of `med3dvlm evaluate retrieval`, `vqa`, `report`, `zero_shot`, `linear_probe` "
            "or `segmentation`"
        )
    return Run(folder, task, record, rows)


def check_alike(first: Run, second: Run) -> None:
    """Raise ValueError unless both runs did the same task for the same studies of the same data."""
    if first.task != second.task:
        raise ValueError(f"{first.folder} is a run of {first.task} and {second.folder} one of {second.task}; compare runs of one task")
    for name in ("data", "split"):
        one, other = (run.record["identity"][name] for run in (first, second))
        if one != other:
            raise ValueError(
                f"{first.folder} has the {name} {one} and {second.folder} {other} in their run.json; compare runs of the same {name}"
            )
    if first.cases != second.cases:
        differing = len(set(first.cases) ^ set(second.cases))
        raise ValueError(
            f"{first.folder} has {len(first.rows)} predictions and {second.folder} {len(second.rows)}, and {differing} have no counterpart in "
            "the other; finish both runs, with the same --limit"
        )


def studies_of(run: Run, folder: str | Path | None) -> dict[str, Study]:
    """Return the studies of the prepared data by id.

    Raises:
        ValueError: the run is about others.
    """
    data = PreparedData(folder or run.record["data"], exclude_failures=True, split_file=run.record.get("split_file"))
    known = {study.id: study for split in data.summary["splits"] for study in data.studies(split)}
    for row in run.rows:
        if row["id"] not in known or row.get("reference", known[row["id"]].report) != known[row["id"]].report:
            raise ValueError(
                f"{data.root} does not hold study {row['id']} as {run.folder} has it; name the run's prepared data with --data"
            )
    if data.summary["fingerprint"] != run.record["identity"]["data"]:
        raise ValueError(
            f"{data.root} is not the data that {run.folder} is about, or was prepared anew since; name the data of the run with --data"
        )
    return known


def keep(run: Run, split_file: Path) -> tuple[Run, NDArray[np.int64]]:
    """Return the run restricted to the studies that a split file has in the run's split, and their places in the whole."""
    split = run.record["identity"]["split"]
    listed = set(read(split_file).get(split, ()))
    places = np.array([place for place, row in enumerate(run.rows) if row["id"] in listed], dtype=np.int64)
    if not len(places):
        raise ValueError(f"{split_file} keeps no study of {run.folder} in split {split!r}; name the split file of the run's own data")
    rows = [run.rows[place] for place in places]
    if run.task == "retrieval":  # the others no longer stand between a query and its partner
        stored = load_file(run.folder / "embeddings.safetensors")
        ranks = retrieval_ranks(stored["image"][places], stored["text"][places])
        rows = [row | {way: int(ranks[way][place]) for way in WAYS} for place, row in enumerate(rows)]
    return replace(run, rows=rows), places


def figures(run: Run, studies: dict[str, Study]) -> dict[str, Figure]:
    of_task = {"retrieval": retrieval_figures, "vqa": answer_figures, "report": report_figures, "detection": detection_figures}
    if run.task not in of_task:
        raise ValueError(f"{run.folder} is a run of {run.task}, which cannot be compared; its scores.md has each figure with its interval")
    return of_task[run.task](run.rows, studies)


def retrieval_figures(rows: Sequence[Row], studies: dict[str, Study]) -> dict[str, Figure]:
    """Return the figures of the whole split as one pool."""
    found = {way: rank_values(np.array([row[way] for row in rows])) for way in WAYS}
    return {f"{way.replace('_', ' ')}, {name}": Figure(values, mean_of) for way in WAYS for name, values in found[way].items()}


def detection_figures(rows: Sequence[Row], studies: dict[str, Study]) -> dict[str, Figure]:
    """Return the figures that need no threshold. Each finding's log-odds are replaced by ranks among the studies, so that two runs are on one
    scale.
    """
    names = list(rows[0]["log_odds"])
    log_odds = log_odds_table((row["log_odds"] for row in rows), names)
    labels = np.where(np.isnan(log_odds), np.nan, label_table([studies[row["id"]] for row in rows], names))
    ranks = np.nan_to_num(rankdata(log_odds, axis=0, nan_policy="omit"))

    def macro(area: Callable[[Any, Any], Statistic], ranks: NDArray[Any]) -> Statistic:
        return mean_over(of_known(area, np.tile(labels, (len(ranks) // len(labels), 1)), ranks))

    return {"AUROC, macro": Figure(ranks, partial(macro, auroc_of)), "AUPRC, macro": Figure(ranks, partial(macro, average_precision_of))}


def report_figures(rows: Sequence[Row], studies: dict[str, Study]) -> dict[str, Figure]:
    """Return the figures of findings and words that eval/report_gen.py has. A study counts only where it has the label, or the report."""
    asked = [studies[row["id"]] for row in rows]
    labels, known, names, _ = reference_findings(asked)
    stated = findings_table([row["prediction"] for row in rows], names, literal=True) * known

    def against_labels(figure: Callable[[Any, Any], Statistic], stated: NDArray[Any]) -> Statistic:
        return figure(np.tile(labels, (len(stated) // len(labels), 1)), stated)

    found = {
        "findings F1, macro": Figure(stated, partial(against_labels, macro_f1_of)),
        "findings F1, micro": Figure(stated, partial(against_labels, micro_f1_of)),
    }
    has_report = np.array([bool(study.report.strip()) for study in asked])
    words = text_values([row["prediction"] for row in rows], [row["reference"] for row in rows])
    return found | {name: Figure(np.where(has_report, values, np.nan), mean_of) for name, values in words.items()}


def answer_figures(rows: Sequence[Row], studies: dict[str, Study]) -> dict[str, Figure]:
    """Return the figures that eval/vqa.py has: means over the kinds of question, and of yes/no questions over all, and over both answers."""
    check_likelihoods(rows)
    yes_no = np.array([row["choices"] == YES_NO for row in rows])
    closed = np.array([bool(row["choices"]) for row in rows]) & ~yes_no
    lettered = closed & np.array([has_letters(row["choices"]) for row in rows])
    kinds, replies = (
        [[row[field] == name for name in names] for row in rows] for field, names in (("kind", ALL_KINDS), ("answer", YES_NO))
    )
    everything = [[True]] * len(rows)
    text_figures = text_values([row.get("open") or "" for row in rows], [row["answer"] for row in rows])

    def right(measure: Callable[[Row], bool], asked: NDArray[np.bool_]) -> NDArray[Any]:
        return np.array([one and measure(row) for row, one in zip(rows, asked, strict=True)], dtype=float)

    measured = {
        "closed, likeliest": (right(likeliest_is_right, closed), closed, kinds),
        "closed, letter": (right(letter_is_right, lettered), lettered, kinds),
        "closed, strict": (right(strict_is_right, lettered), lettered, kinds),
        "yes/no, accuracy": (right(likeliest_is_right, yes_no), yes_no, everything),
        "yes/no, balanced accuracy": (right(likeliest_is_right, yes_no), yes_no, replies),
        **{f"open, {name}": (text_figures[name], ~yes_no, kinds) for name in ("exact_match", "token_f1", "bleu1", "rouge1")},
    }
    tables = {name: np.where(np.array(by) & asked[:, None], values[:, None], np.nan) for name, (values, asked, by) in measured.items()}
    return {name: Figure(table, lambda table: mean_over(mean_of(table))) for name, table in tables.items() if not np.isnan(table).all()}


def compare_runs(first: Run, second: Run, studies: dict[str, Study]) -> dict[str, dict[str, Any]]:
    """Return for each figure its value in both runs, difference, interval and p value."""
    patients = [studies[row["id"]].patient for row in first.rows]
    ours, theirs = figures(first, studies), figures(second, studies)
    pairs = {name: (ours[name].statistic(ours[name].values), theirs[name].statistic(theirs[name].values)) for name in ours}
    spans = intervals({name: difference(*pair) for name, pair in pairs.items()}, patients)
    result = {}
    for name, (one, other) in pairs.items():
        once = np.ones((1, len(patients)))
        values = (float(one(once)[0]), float(other(once)[0]))
        if np.isnan(values).any():
            continue  # nothing of the kind in these data, such as no finding at all
        test = paired_test(ours[name].statistic, ours[name].values, theirs[name].values, patients)
        result[name] = {"values": values, "difference": test.difference, "interval": spans[name], "p_value": test.p_value}
    if not result:
        raise ValueError(f"the {len(first.rows)} studies have neither reports nor labels with a finding, so there is nothing to compare")
    return result


def without_duplicates(run: Run, kept: Run, places: NDArray[np.int64], studies: dict[str, Study]) -> dict[str, dict[str, Any]]:
    """Return for each figure its value over all studies and over those that are kept, difference and interval."""
    patients = [studies[row["id"]].patient for row in run.rows]
    every, fewer = figures(run, studies), figures(kept, studies)

    def only(statistic: Statistic, weights: Weights) -> NDArray[np.float64]:
        return statistic(weights[:, places])

    pairs = {
        name: (every[name].statistic(every[name].values), partial(only, fewer[name].statistic(fewer[name].values)))
        for name in every
        if name in fewer
    }
    spans = intervals({name: difference(*pair) for name, pair in pairs.items()}, patients)
    once = np.ones((1, len(patients)))
    values = {name: tuple(float(each(once)[0]) for each in pair) for name, pair in pairs.items()}
    return {
        name: {"values": pair, "difference": pair[0] - pair[1], "interval": spans[name]}
        for name, pair in values.items()
        if not np.isnan(pair).any()
    }


def difference(one: Statistic, other: Statistic) -> Statistic:
    return lambda weights: one(weights) - other(weights)


def difference_table(header: Sequence[str], compared: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, entry in compared.items():
        span = "-" if entry["interval"] is None else "{:+.3f} to {:+.3f}".format(*entry["interval"])
        chance = [f"{entry['p_value']:.4f}"] if "p_value" in entry else []
        rows.append([name, *entry["values"], f"{round(entry['difference'], 3) + 0:+.3f}", span, *chance])  # + 0: no minus before 0.000
    return evaluation.markdown_table(("figure", *header), rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders of predictions: two, or one with --split-file; any number with --published"
    )
    parser.add_argument("--published", action="store_true", help="set all runs below the folders beside the papers' tables")
    parser.add_argument("--data-name", default="this data", help="what the tables of --published call the data (default: %(default)s)")
    parser.add_argument("--split-file", type=Path, help="JSON of the studies of each split, as `med3dvlm audit` writes it")
    parser.add_argument("--data", type=Path, help="prepared data of the runs (default: where their run.json says)")
    parser.add_argument("--output", type=Path, help="folder of comparison.md and comparison.json")
    arguments = parser.parse_args(argv)
    if arguments.published:
        print(paper_tables.compare_with_papers(arguments.runs, arguments.data_name, arguments.output))
        return
    if len(arguments.runs) > 2 or (len(arguments.runs) == 1 and not arguments.split_file):
        raise ValueError("name two runs to compare, one with --split-file, or --published; see --help")
    first, *others = map(open_run, arguments.runs)
    studies = studies_of(first, arguments.data)
    counted = f"{len(first.rows)} cases"
    if others:
        second = others[0]
        check_alike(first, second)
        if arguments.split_file:
            first, second = (keep(run, arguments.split_file)[0] for run in (first, second))
            counted = f"{len(first.rows)} of {counted}, those of {arguments.split_file}"
        result = compare_runs(first, second, studies)
        table = difference_table(("first", "second", "difference", "95 % interval", "p"), result)
        note = f"First: {first.folder}. Second: {second.folder}. Each p value is that of a single test: of many, some are small by chance."
    else:
        kept, places = keep(first, arguments.split_file)
        result = without_duplicates(first, kept, places, studies)
        table = difference_table(("all", "kept", "difference", "95 % interval"), result)
        note = f"All: {first.folder}. Kept: {len(kept.rows)} of them, those of {arguments.split_file}."
    text = "\n\n".join((f"# {first.task}, {counted}", table, note, f"*{RESEARCH_NOTICE}*")) + "\n"
    if arguments.output:
        write_text(arguments.output / "comparison.md", text)
        write_json(arguments.output / "comparison.json", {"runs": [str(run) for run in arguments.runs], "figures": result})
    print(text)

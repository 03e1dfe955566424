"""Print the tables of the papers (med3dvlm/evaluation/paper_tables.yaml) with the figures of runs below the papers' rows.

    med3dvlm evaluate compare --published outputs/demo
    med3dvlm evaluate compare --published outputs/paper/eval/report --data-name M3D-Cap --output outputs/paper/published

Takes folders with a scores.json, or the folder above eval/. Only tables that some run has figures for are printed, in the papers' units; a
figure that the run lacks is a dash. At the end stands what each name means, there and here. With --output, published.md and published.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from med3dvlm import evaluation
from med3dvlm.files import write_json, write_text
from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.records import QUESTION_KINDS
from med3dvlm.reports.findings import FINDINGS_CT_RATE

TABLES = Path(__file__).with_name("paper_tables.yaml")
COSTS = {"Params (M)": 1e-6, "GFLOPS": 1e-9}  # columns that are in no table's unit
BERTSCORE_MODEL = "roberta-large, layer 17"  # the papers'


def beside_papers(runs: Sequence[Path], data_name: str) -> tuple[str, dict[str, Any]]:
    """Return the papers' tables that some run has figures for, and our rows by table."""
    published = yaml.safe_load(TABLES.read_text(encoding="utf-8-sig"))
    measures = published["measures"]
    parts, ours, used = [], {}, dict[str, None]()
    for name, table in published["tables"].items():
        rows = [row for folder in runs for row in our_rows(table, folder, data_name, measures)]
        if not rows:
            continue
        paper, width = published["papers"][table["paper"]], len(table["columns"])
        decimals = [max(len(str(row[column - width]).partition(".")[2]) for row in table["rows"]) for column in range(width)]
        pool = f", pool of {table['pool']}" if isinstance(table.get("pool"), int) else ""
        parts += [
            f"## {paper['title'].split(':')[0]}, Table {table['number']}: {table['title']}",
            f"arXiv {paper['arxiv']}. {table['data']}, split {table['split']}{pool}; in {table['unit']}. {'. '.join(table['remarks'])}.",
            evaluation.markdown_table(
                (*table["by"], *table["columns"]), [[*row[:-width], *shown(row[-width:], decimals)] for row in (*table["rows"], *rows)]
            ),
            apart(table["data"], data_name),
        ]
        used |= dict.fromkeys(measured(table))
        ours[name] = rows
    if not parts:
        raise ValueError(
            f"no table of the papers has a figure of {' or '.join(map(str, runs))}; they are of retrieval, reports, questions, and of CT-RATE's "
            "18 findings alone"
        )
    meanings = [f"- {label}: {meaning(measures[label])}" for label in used if measures[label]["key"]]
    return "\n\n".join([*parts, "## What the names mean", "\n".join(meanings)]), ours


def measured(table: dict[str, Any]) -> list[str]:
    """Return the measures of a table."""
    if table["measure"] == "by row":
        return [row[table["by"].index("metric")] for row in table["rows"]]
    return [table["measure"]] if isinstance(table["measure"], str) else list(table["measure"])


def apart(theirs: str, ours: str) -> str:
    if theirs != ours:
        return f"The last rows are about {ours}, those above about {theirs}: no figure of the ones compares with one of the others."
    return f"All rows are about {theirs} by name; they compare where split, pool and preparation are the paper's, too."


def meaning(measure: dict[str, Any]) -> str:
    return measure["definition"] + (f". Here: {measure['differs']}" if measure["differs"] else "") + "."


def shown(values: Sequence[Any], decimals: Sequence[int]) -> list[str | None]:
    return [None if value is None else f"{value:.{places}f}" for value, places in zip(values, decimals, strict=True)]


def our_rows(table: dict[str, Any], folder: Path, data_name: str, measures: dict[str, Any]) -> list[list[Any]]:
    """Return a run's rows for a table, in the table's unit, None for a figure that it lacks; no rows if it did another task."""
    scores, label = read(folder / "scores.json"), f"this run, {data_name}"
    unit = 100 if table["unit"] == "%" else 1

    def of(scores: dict[str, Any], key: str | None, unit: float = unit) -> float | None:
        value: Any = scores
        for part in (key or "-").split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return None if value is None else unit * value

    pools = [entry for entry in scores.values() if isinstance(entry, dict) and "pool" in entry]
    if table["task"] == "retrieval" and pools:
        key = "{}" if table["by"][1] == "samples" else "pool of {}"
        figures = [[of(entry, measures[column]["key"]) for column in table["columns"]] for entry in pools]
        return [[label, key.format(entry["pool"]), *row] for entry, row in zip(pools, figures, strict=True)]
    if table["task"] == "report" and "text" in scores:
        return [[label, *(of(comparable_text_scores(scores["text"]), measures[column]["key"]) for column in table["columns"])]]
    own = scores.get("per_class", {}).keys() - set(FINDINGS_CT_RATE)  # another mean than the papers'
    if table["task"] == scores.get("task") and scores["published"]["dcformer"] is not None and not own:
        return [
            [label, scores["encoder"]["name"], *(of(scores, measures[name]["key"], COSTS.get(name, unit)) for name in table["columns"])]
        ]
    if table["task"] == "vqa" and "letter" in scores:
        if table["measure"] != "by row":
            letter = scores["letter"] | {"mean": scores["letter"]["accuracy"]}
            return [[label, *(of(letter, column.lower()) for column in table["columns"])]]
        answers = scores["open"]
        model = {name: answers[name] for name in ("bertscore_model",) if name in answers}
        by_kind = {kind: comparable_text_scores(answers[kind] | model) for kind in QUESTION_KINDS if kind in answers} | {
            "mean": comparable_text_scores(answers)
        }
        names = dict.fromkeys(row[1] for row in table["rows"])
        return [[label, name, *(of(by_kind, f"{column.lower()}.{measures[name]['key']}") for column in table["columns"])] for name in names]
    return []


def comparable_text_scores(text: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of texts without a BERTScore of another model than the papers', which has another scale."""
    other = text.get("bertscore_model", BERTSCORE_MODEL) != BERTSCORE_MODEL
    return {name: value for name, value in text.items() if not (other and name.startswith("bertscore"))}


def write_beside(folder: Path, data_name: str) -> str:
    """Write published.md of one run: the papers' tables that it has figures for, with its own below. Returns a sentence where there is none."""
    try:
        text = beside_papers([folder], data_name)[0]
    except ValueError as error:
        text = f"Nothing stands beside the papers: {error}."
    text = f"*{RESEARCH_NOTICE}*\n\n{text}\n"
    write_text(folder / "published.md", text)
    return text


def frequencies() -> dict[str, tuple[float, float]]:
    """Return for each finding, under our name, its share of CT-RATE's training and validation split (DCFormer paper, Table 5)."""
    table = yaml.safe_load(TABLES.read_text(encoding="utf-8-sig"))["tables"]["dcformer_5"]
    return {row[0].lower().replace(" ", "_"): (row[3], row[4]) for row in table["rows"]}


def runs_below(folder: Path) -> list[Path]:
    """Return the folder itself, or the folders of a demo's evaluations."""
    found = [folder] if (folder / "scores.json").is_file() else sorted(path.parent for path in folder.glob("eval/*/scores.json"))
    if not found:
        raise FileNotFoundError(f"{folder} holds neither a scores.json nor eval/*/scores.json; name the output of an evaluation")
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def compare_with_papers(folders: Sequence[Path], data_name: str, output: Path | None = None) -> str:
    """Return the papers' tables with the figures of all runs below the folders, as Markdown; also writes published.md and .json to `output`."""
    runs = [run for folder in folders for run in runs_below(folder)]
    text, rows = beside_papers(runs, data_name)
    text = f"*{RESEARCH_NOTICE}*\n\n{text}\n"
    if output:
        write_text(output / "published.md", text)
        write_json(output / "published.json", {"runs": [str(run) for run in runs], "data": data_name, "rows": rows})
    return text

"""The table of stages/demo/places.sh: what teaches a model places, with equal minutes of training.

    python stages/demo/places.py --root outputs/places

Writes report.md and summary.json to the root. A row that was not run is left out; a score that a row cannot have is a dash.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from med3dvlm import evaluation
from med3dvlm.evaluation.targets import at
from med3dvlm.files import write_text
from med3dvlm.programs import Parser, run
from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.training.run import environment

ROWS = {
    "paper": "the paper's method: pairs alone, and its mixer",
    "dense": "dense supervision (the demo)",
    "no_attention": "without Dual Cross-Attention",
    "no_windows": "without windows of intensity",
    "finer": "finer tokens for the language model",
}
FIGURES = {  # column -> evaluation and where its scores have the figure
    "location": ("vqa", "closed.location"),
    "sides": ("vqa", "laterality.accuracy"),
    "phase": ("vqa", "closed.phase"),
    "yes/no": ("vqa", "yes_no.balanced_accuracy"),
    "findings F1": ("report", "findings_f1"),
    "R@1": ("retrieval", "image_to_text.r1"),
    "pointing": ("segmentation", "large.figures.pointing"),
    "Dice": ("segmentation", "large.figures.dice"),
    "drawn though absent": ("segmentation", "all.figures.absent"),
}


def collect(root: Path) -> dict[str, dict[str, Any]]:
    """Row -> minutes and steps of its stages, and its figures; rows that were not finished are left out."""
    rows = {}
    for name in ROWS:
        runs = [root / name / "run.json", *(root / name / stage / "run.json" for stage in ("stage2", "stage3"))]
        if not (root / name / "eval" / "report" / "scores.json").is_file():
            continue
        made = [read(path) for path in runs]
        minutes, steps = sum(each["seconds"] for each in made) / 60, [each["steps"] for each in made]
        rows[name] = {"minutes": minutes, "steps": steps} | {column: figure(root / name, *place) for column, place in FIGURES.items()}
    return rows


def figure(folder: Path, name: str, place: str) -> float | None:
    path = folder / "eval" / name / "scores.json"
    if not path.is_file():
        return None
    scores = read(path)
    found = at(next(iter(scores.values())) if name == "retrieval" else scores, place)
    return found["value"] if isinstance(found, dict) else found


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder of the runs, one below it for each row")
    root: Path = parser.parse_args(argv).root
    rows = collect(root)
    if not rows:
        raise FileNotFoundError(f"{root} has no finished row of {', '.join(ROWS)}; run: bash stages/demo/places.sh demo")
    lines = [
        [ROWS[name], f"{row['minutes']:.1f}", " + ".join(map(str, row["steps"]))]
        + [None if row[column] is None else f"{row[column]:.2f}" for column in FIGURES]
        for name, row in rows.items()
    ]
    table = evaluation.markdown_table(("method", "minutes", "steps", *FIGURES), lines)
    note = "One run each, with one seed, on phantoms: differences of a few hundredths say nothing."
    evaluation.write_scores(root / "summary.json", {"rows": rows, **environment()})
    write_text(root / "report.md", "\n\n".join(["# What teaches places", f"*{RESEARCH_NOTICE}*", note, table]) + "\n")
    print(table)


if __name__ == "__main__":
    sys.exit(run(main))

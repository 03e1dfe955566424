"""Scores of answers to questions, from the records that eval/vqa.py writes; its text says what the columns and figures are."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from med3dvlm.metrics.answers import NOTHING, confusion, first_letter, grouped_means, named_choices
from med3dvlm.metrics.bertscore import BertScorer
from med3dvlm.metrics.text import text_values
from med3dvlm.records import ALL_KINDS, LETTERS, QUESTION_KINDS, Question
from med3dvlm.tables import markdown_table, with_interval

FEW = 12  # different answers of a kind whose confusion is given by text
YES_NO = ["Yes", "No"]
WITHOUT_SCAN = ("blind", "shuffled", "modal")
Row = dict[str, Any]


def question_scores(
    rows: Sequence[Row], patients: Mapping[str, str], train: Sequence[Question] = (), scorer: BertScorer | None = None
) -> dict[str, Any]:
    """scores.json of eval/vqa.py.

    Args:
        rows: a record a question.
        patients: by study.
        train: the questions of the training split, for `modal`.
        scorer: for BERTScore, from `metrics.bertscore`.
    """
    yes_no = [row for row in rows if row["choices"] == YES_NO]
    others = [row for row in rows if row["choices"] != YES_NO]
    closed = [row for row in others if row["choices"]]
    for row in closed + yes_no:
        if len(row.get("closed") or ()) != len(row["choices"]):
            raise ValueError(f"a record about {row['id']} does not say how likely its {len(row['choices'])} choices are; predict it again")
    columns = [name for name in ("closed", "blind", "shuffled") if all(row.get(name) for row in closed + yes_no)]
    choose: dict[str, Callable[[Row], str]] = {name: partial(_likeliest, column=name) for name in columns}
    choose |= {"modal": _usual_choice(train)} if train else {}
    found = _tally(closed, {name: _is_right(chosen) for name, chosen in choose.items()} | {"letter": _letter, "strict": _strict}, patients)
    by_kind = {kind: [row for row in closed if row["kind"] == kind] for kind in ALL_KINDS}
    by_kind = {kind: group for kind, group in by_kind.items() if group}
    texts = {kind: confusion((row["answer"], _likeliest(row)) for row in group) for kind, group in by_kind.items()}
    letters = {
        kind: confusion((_right_letter(row), first_letter(row["letter"], len(row["choices"])) or NOTHING) for row in group)
        for kind, group in by_kind.items()
    }
    asked = Counter(row["kind"] for row in others)
    return {
        "closed": {
            **found["closed"],
            **{name: found[name] for name in WITHOUT_SCAN if name in found},
            "confusion": {kind: table for kind, table in texts.items() if len(table["chosen"]) <= FEW},
        },
        "letter": found["letter"] | {"confusion": letters},
        "strict": found["strict"],
        "open": _open_scores(others, patients, scorer),
        "yes_no": _yes_no_scores(yes_no, {name: _is_right(chosen) for name, chosen in choose.items()}, patients),
        "questions": {kind: asked[kind] for kind in ALL_KINDS if kind in QUESTION_KINDS or kind in asked} | {"yes_no": len(yes_no)},
    }


def question_tables(scores: Mapping[str, Any]) -> str:
    """Closed, open and yes/no questions as Markdown, by kind as in the Med3DVLM paper."""
    kinds = [kind for kind, count in scores["questions"].items() if count and kind != "yes_no"]
    closed, written, answered = scores["closed"], scores["open"], scores["yes_no"]

    def line(name: str, entry: Mapping[str, Any]) -> list[str | None]:
        row = [with_interval(entry.get(kind), entry.get("intervals", {}).get(kind)) for kind in kinds]
        return [name, *row, *(with_interval(entry[figure], entry[f"{figure}_interval"]) for figure in ("accuracy", "of_questions"))]

    header = ("", *kinds, "mean of kinds", "all questions")
    ways = {"likeliest choice": closed, "first letter written": scores["letter"], "right choice named, no other": scores["strict"]}
    named = {"blind": "likeliest choice, blind", "shuffled": "likeliest choice, shuffled", "modal": "usual answer in training"}
    ways |= {label: closed[name] for name, label in named.items() if name in closed}
    parts = ["## Closed questions", markdown_table(header, [line(name, entry) for name, entry in ways.items()])]
    counts = [f"{scores['questions'][kind]} {kind}" for kind in kinds]
    parts += [f"Questions, the open ones included: {', '.join(counts)}."]
    if "of_questions" in written:
        rows = [
            [_label(name, written), *(written[kind][name] for kind in kinds), written[name], value]
            for name, value in written["of_questions"].items()
        ]
        parts += ["## Answers written freely", markdown_table(header, rows)]
    figures = ("of_questions", "balanced_accuracy")
    entries = {"likeliest choice": answered} | {label: answered[name] for name, label in named.items() if name in answered}
    rows = [[name, *(with_interval(entry[figure], entry[f"{figure}_interval"]) for figure in figures)] for name, entry in entries.items()]
    parts += [f"## Yes/no: {scores['questions']['yes_no']} questions", markdown_table(("", "accuracy", "balanced accuracy"), rows)]
    return "\n\n".join([*parts, "In brackets 95 % of bootstrap resamples of the patients."])


def _label(name: str, scores: Mapping[str, Any]) -> str:
    return f"{name} ({scores['bertscore_model']})" if name.startswith("bertscore") else name


def _likeliest(row: Row, column: str = "closed") -> str:
    choice: str = row["choices"][int(np.argmax(row[column]))]
    return choice


def _usual_choice(train: Iterable[Question]) -> Callable[[Row], str]:
    """The choice that answered the same words most often in training, the first where none did."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        seen[question.text][question.answer] += 1
    return lambda row: max(row["choices"], key=lambda choice: seen[row["question"]][choice])


def _is_right(choose: Callable[[Row], str]) -> Callable[[Row], bool]:
    return lambda row: choose(row) == row["answer"]


def _right_letter(row: Row) -> str:
    return LETTERS[row["choices"].index(row["answer"])]


def _letter(row: Row) -> bool:
    return first_letter(row["letter"], len(row["choices"])) == _right_letter(row)


def _strict(row: Row) -> bool:
    return named_choices(row["letter"], row["choices"]) == {row["choices"].index(row["answer"])}


def _tally(rows: Sequence[Row], measures: Mapping[str, Callable[[Row], bool]], patients: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Of each measure the mean of the kinds as "accuracy", of all questions, and of each kind that occurs, with intervals."""
    values = {name: [float(measure(row)) for row in rows] for name, measure in measures.items()}
    found = grouped_means(values, [row["kind"] for row in rows], ALL_KINDS, [patients[row["id"]] for row in rows])
    return {
        name: {"accuracy": entry.pop("mean"), "accuracy_interval": entry.pop("mean_interval"), **entry} for name, entry in found.items()
    }


def _yes_no_scores(rows: Sequence[Row], measures: Mapping[str, Callable[[Row], bool]], patients: Mapping[str, str]) -> dict[str, Any]:
    """As `_tally`, and the mean of both answers' accuracies."""
    found = _tally(rows, measures, patients)
    values = {name: [float(measure(row)) for row in rows] for name, measure in measures.items()}
    balanced = grouped_means(values, [row["answer"] for row in rows], YES_NO, [patients[row["id"]] for row in rows])
    for name, entry in balanced.items():
        found[name] |= {f"balanced_accuracy{end}": entry[f"mean{end}"] for end in ("", "_interval")}
        found[name] |= {"sensitivity": entry.get("Yes"), "specificity": entry.get("No")}
    return found["closed"] | {name: found[name] for name in WITHOUT_SCAN if name in found}


def _open_scores(rows: Sequence[Row], patients: Mapping[str, str], scorer: BertScorer | None) -> dict[str, Any]:
    """`{score: mean of the kinds, score_interval, "of_questions": {score: mean}, <kind>: {score: mean}}`."""
    if not rows:
        return dict.fromkeys(("exact", "exact_interval", "token_f1", "token_f1_interval"))
    values = text_values([row["open"] for row in rows], [row["answer"] for row in rows], scorer)
    values = {"exact": values.pop("exact_match"), **values}
    found = grouped_means(values, [row["kind"] for row in rows], ALL_KINDS, [patients[row["id"]] for row in rows])
    scores: dict[str, Any] = {f"{name}{end}": entry[f"mean{end}"] for name, entry in found.items() for end in ("", "_interval")}
    scores |= {"bertscore_model": scorer.name} if scorer else {}
    scores["of_questions"] = {name: entry["of_questions"] for name, entry in found.items()}
    return scores | {kind: {name: entry[kind] for name, entry in found.items()} for kind in ALL_KINDS if kind in found["exact"]}

"""Scores of answers to questions, from the records that eval/vqa.py writes; its text says what the columns and figures are.

A choice that is listed twice is right at both places. Of choices that are equally likely the model is taken to choose a wrong one, so that
what finds all alike has nothing right. There are letters for `len(LETTERS)` choices: a question with more has no score by letter.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from med3dvlm.metrics.answers import NOTHING, confusion, first_letter, grouped_means, named_choices, right_choices
from med3dvlm.metrics.bertscore import BertScorer
from med3dvlm.metrics.intervals import intervals, mean_of
from med3dvlm.metrics.laterality import side_in
from med3dvlm.metrics.meteor import meteor_available
from med3dvlm.metrics.text import text_values
from med3dvlm.records import ALL_KINDS, LETTERS, QUESTION_KINDS, Question, has_letters
from med3dvlm.tables import markdown_table, with_interval

FEW = 12  # different answers of a kind whose confusion is given by text
YES_NO = ["Yes", "No"]
ONE_SIDE = ("left", "right")
LIKELIHOODS = ("closed", "blind", "shuffled")
WITHOUT_SCAN = ("blind", "shuffled", "modal")
Row = dict[str, Any]


def question_scores(
    rows: Sequence[Row], patients: Mapping[str, str], train: Sequence[Question] = (), scorer: BertScorer | None = None
) -> dict[str, Any]:
    """Return the scores.json of eval/vqa.py.

    Args:
        rows: a record a question.
        patients: by study.
        train: the questions of the training split, for `modal`.
        scorer: for BERTScore, from `metrics.bertscore`.
    """
    check_likelihoods(rows)
    yes_no = [row for row in rows if row["choices"] == YES_NO]
    others = [row for row in rows if row["choices"] != YES_NO]
    closed = [row for row in others if row["choices"]]
    lettered = [row for row in closed if has_letters(row["choices"])]
    columns = [name for name in LIKELIHOODS if all(row.get(name) for row in closed + yes_no)]
    measures: dict[str, Callable[[Row], bool]] = {name: partial(likeliest_is_right, column=name) for name in columns}
    measures |= {"modal": _usual_choice_is_right(train)} if train else {}
    found = _tally(closed, measures, patients)
    by_letter = _tally(lettered, {"letter": letter_is_right, "strict": strict_is_right}, patients)
    left_out = {"left_out": len(closed) - len(lettered)}
    by_kind = {kind: [row for row in closed if row["kind"] == kind] for kind in ALL_KINDS}
    texts = {kind: confusion((row["answer"], likeliest(row)) for row in group) for kind, group in by_kind.items() if group}
    by_kind = {kind: [row for row in lettered if row["kind"] == kind] for kind in ALL_KINDS}
    letters = {kind: confusion(map(_letters, group)) for kind, group in by_kind.items() if group}
    asked = Counter(row["kind"] for row in others)
    return {
        "closed": {
            **found["closed"],
            **{name: found[name] for name in WITHOUT_SCAN if name in found},
            "confusion": {kind: table for kind, table in texts.items() if len(table["chosen"]) <= FEW},
        },
        "letter": by_letter["letter"] | left_out | {"confusion": letters},
        "strict": by_letter["strict"] | left_out,
        "laterality": _side_scores(closed, measures, patients),
        "open": _open_scores(others, patients, scorer),
        "yes_no": _yes_no_scores(yes_no, measures, patients),
        "questions": {kind: asked[kind] for kind in ALL_KINDS if kind in QUESTION_KINDS or kind in asked} | {"yes_no": len(yes_no)},
    }


def question_tables(scores: Mapping[str, Any]) -> str:
    """Return closed, open and yes/no questions as Markdown, by kind as in the Med3DVLM paper."""
    kinds = [kind for kind, count in scores["questions"].items() if count and kind != "yes_no"]
    closed, written, answered = scores["closed"], scores["open"], scores["yes_no"]

    def line(name: str, entry: Mapping[str, Any]) -> list[str | None]:
        row = [with_interval(entry.get(kind), entry.get("intervals", {}).get(kind)) for kind in kinds]
        return [name, *row, *(with_interval(entry[figure], entry[f"{figure}_interval"]) for figure in ("accuracy", "of_questions"))]

    header = ("", *kinds, "mean of kinds", "all questions")
    counts = ", ".join(f"{scores['questions'][kind]} {kind}" for kind in kinds)
    named = {"blind": "likeliest choice, blind", "shuffled": "likeliest choice, shuffled", "modal": "usual answer in training"}
    parts = [f"Questions, besides yes/no: {counts}."] if kinds else []
    if closed["accuracy"] is not None:
        ways = {"likeliest choice": closed, "first letter written": scores["letter"], "right choice named, no other": scores["strict"]}
        ways |= {label: closed[name] for name, label in named.items() if name in closed}
        parts += ["## Closed questions", markdown_table(header, [line(name, entry) for name, entry in ways.items()])]
    if (sides := scores.get("laterality", {})).get("accuracy") is not None:
        shares = [f"side of the likeliest choice right {with_interval(sides['accuracy'], sides['interval'])}"]
        shares += [f"{name} {with_interval(sides[name]['accuracy'], sides[name]['interval'])}" for name in WITHOUT_SCAN if name in sides]
        parts += [f"Of {sides['questions']} questions whose choices differ in side: {', '.join(shares)}, chance {sides['chance']:.3f}."]
    if left_out := scores["letter"]["left_out"]:
        parts += [
            f"{left_out} have more than {len(LETTERS)} choices, so no letters; first letter written and right choice named leave them out."
        ]
    if "of_questions" in written:
        rows = [
            [_label(name, written), *(written[kind][name] for kind in kinds), written[name], value]
            for name, value in written["of_questions"].items()
        ]
        parts += ["## Answers written freely", markdown_table(header, rows)]
        parts += [f"No {name}: {reason}" for name, reason in written["unavailable"].items()]
    if scores["questions"]["yes_no"]:
        figures = ("of_questions", "balanced_accuracy")
        entries = {"likeliest choice": answered} | {label: answered[name] for name, label in named.items() if name in answered}
        rows = [
            [name, *(with_interval(entry[figure], entry[f"{figure}_interval"]) for figure in figures)] for name, entry in entries.items()
        ]
        parts += [f"## Yes/no: {scores['questions']['yes_no']} questions", markdown_table(("", "accuracy", "balanced accuracy"), rows)]
    return "\n\n".join([*parts, "In brackets 95 % of bootstrap resamples of the patients."])


def _label(name: str, scores: Mapping[str, Any]) -> str:
    return f"{name} ({scores['bertscore_model']})" if name.startswith("bertscore") else name


def check_likelihoods(rows: Sequence[Row]) -> None:
    """Raise ValueError where a record lacks the likelihood of a choice."""
    for row in rows:
        for name in LIKELIHOODS if row["choices"] else ():
            values = row.get(name)
            if name != "closed" and not values:
                continue  # was not asked for
            if not isinstance(values, list) or len(values) != len(row["choices"]) or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"a record about {row['id']} lacks a number for each of its {len(row['choices'])} choices as {name!r}; predict it again"
                )


def likeliest(row: Row, column: str = "closed") -> str:
    """Return the choice that the model finds likeliest; of several a wrong one."""
    right, values = right_choices(row["choices"], row["answer"]), row[column]
    places = [place for place, value in enumerate(values) if value == max(values)]
    wrong = [place for place in places if place not in right]
    return str(row["choices"][wrong[0]] if wrong else row["answer"])


def likeliest_is_right(row: Row, column: str = "closed") -> bool:
    return likeliest(row, column) == row["answer"]


def letter_is_right(row: Row) -> bool:
    right, written = _letters(row)
    return right == written


def strict_is_right(row: Row) -> bool:
    """Return whether the words name the right choice, and no other."""
    named = named_choices(row["letter"], row["choices"])
    return bool(named) and named <= set(right_choices(row["choices"], row["answer"]))


def _letters(row: Row) -> tuple[str, str]:
    """Return the letters of the right choice and of the written one, both the first where the right choice is listed twice."""
    right = right_choices(row["choices"], row["answer"])
    letter = first_letter(row["letter"], len(row["choices"]))
    known = LETTERS[right[0]]
    return known, NOTHING if letter is None else known if LETTERS.index(letter) in right else letter


def _usual_choice_is_right(train: Iterable[Question]) -> Callable[[Row], bool]:
    """Return a function that tells whether the choice that answered the same words most often in training is right."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        seen[question.text][question.answer] += 1

    def is_right(row: Row) -> bool:
        counts = [seen[row["question"]][choice] for choice in row["choices"]]
        return counts.index(max(counts)) in right_choices(row["choices"], row["answer"])

    return is_right


def _tally(rows: Sequence[Row], measures: Mapping[str, Callable[[Row], bool]], patients: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return for each measure the mean of the kinds as "accuracy", of all questions, and of each kind that occurs, with intervals."""
    values = {name: [float(measure(row)) for row in rows] for name, measure in measures.items()}
    found = grouped_means(values, [row["kind"] for row in rows], ALL_KINDS, [patients[row["id"]] for row in rows])
    return {
        name: {"accuracy": entry.pop("mean"), "accuracy_interval": entry.pop("mean_interval"), **entry} for name, entry in found.items()
    }


def _side_scores(rows: Sequence[Row], measures: Mapping[str, Callable[[Row], bool]], patients: Mapping[str, str]) -> dict[str, Any]:
    """Return how often the likeliest choice has the right side, over closed questions whose answer is on one side and that list a choice on
    the other: `{"questions", "accuracy", "interval", "chance": where all choices are alike}`, and the accuracy of each way without the scan
    that ranks the choices.
    """
    asked = [row for row in rows if side_in(row["answer"]) in ONE_SIDE and any(_other_side(choice, row) for choice in row["choices"])]
    columns = [name for name in LIKELIHOODS if name in measures]
    if not asked or not columns:
        return {"questions": len(asked), "accuracy": None, "interval": None, "chance": None}
    right = {name: [float(side_in(likeliest(row, name)) == side_in(row["answer"])) for row in asked] for name in columns}
    chance = [sum(side_in(choice) == side_in(row["answer"]) for choice in row["choices"]) / len(row["choices"]) for row in asked]
    spans = intervals({name: mean_of(values) for name, values in right.items()}, [patients[row["id"]] for row in asked])
    entries = {
        name: {"accuracy": sum(values) / len(asked), "interval": spans[name]} for name, values in right.items() if name in WITHOUT_SCAN
    }
    first = columns[0]
    scores = {"accuracy": sum(right[first]) / len(asked), "interval": spans[first], "chance": sum(chance) / len(asked)}
    return {"questions": len(asked), **scores, **entries}


def _other_side(choice: str, row: Row) -> bool:
    side = side_in(choice)
    return side in ONE_SIDE and side != side_in(row["answer"])


def _yes_no_scores(rows: Sequence[Row], measures: Mapping[str, Callable[[Row], bool]], patients: Mapping[str, str]) -> dict[str, Any]:
    """Return `_tally`, and the mean of both answers' accuracies."""
    found = _tally(rows, measures, patients)
    values = {name: [float(measure(row)) for row in rows] for name, measure in measures.items()}
    balanced = grouped_means(values, [row["answer"] for row in rows], YES_NO, [patients[row["id"]] for row in rows])
    for name, entry in balanced.items():
        found[name] |= {f"balanced_accuracy{end}": entry[f"mean{end}"] for end in ("", "_interval")}
        found[name] |= {"sensitivity": entry.get("Yes"), "specificity": entry.get("No")}
    return found["closed"] | {name: found[name] for name in WITHOUT_SCAN if name in found}


def _open_scores(rows: Sequence[Row], patients: Mapping[str, str], scorer: BertScorer | None) -> dict[str, Any]:
    """Return `{score: mean of the kinds, score_interval, "of_questions": {score: mean}, <kind>: {score: mean}}`."""
    if not rows:
        return dict.fromkeys(("exact", "exact_interval", "token_f1", "token_f1_interval"))
    values = text_values([row["open"] for row in rows], [row["answer"] for row in rows], scorer)
    values = {"exact": values.pop("exact_match"), **values}
    found = grouped_means(values, [row["kind"] for row in rows], ALL_KINDS, [patients[row["id"]] for row in rows])
    scores: dict[str, Any] = {f"{name}{end}": entry[f"mean{end}"] for name, entry in found.items() for end in ("", "_interval")}
    scores |= {"bertscore_model": scorer.name} if scorer else {}
    scores["unavailable"] = {} if (reason := meteor_available()) is None else {"meteor": reason}
    scores["of_questions"] = {name: entry["of_questions"] for name, entry in found.items()}
    return scores | {kind: {name: entry[kind] for name, entry in found.items()} for kind in ALL_KINDS if kind in found["exact"]}

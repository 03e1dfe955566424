"""Answers to questions with choices: which choice a text names, means by group, confusions.

Shapes: N = questions, K = groups of them (kinds of question, or right answers).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from med3dvlm.metrics.intervals import Statistic, intervals, mean_of, mean_over

LETTERS = "ABCDEFGH"
NOTHING = "none"  # where an answer names no choice


def first_letter(text: str, choices: int) -> str | None:
    """The first of A, B, ... that stands by itself in an answer, as the papers count."""
    found = re.search(rf"\b[{LETTERS[:choices]}]\b", text)
    return found.group() if found else None


def named_choices(text: str, choices: Sequence[str]) -> set[int]:
    """The places of all choices that an answer names, by letter or in words, those that it denies included.

    A letter must stand as one: "B" at the end, "(B)", "B.", "option B"; the article in "A cyst" is none. Words within a longer choice do
    not name a shorter one: who says "left lung" does not say "lung". Case and punctuation count for nothing.
    """
    letters = LETTERS[: len(choices)]
    marked = re.findall(rf"\b(?:option|choice|answer(?: is)?:?) ([{letters}])\b|(?<![\w'])([{letters}])(?=[.):,;]|\s*$)", text)
    found = {letters.index(one or other) for one, other in marked}
    said, phrases = _spaced(text), [_spaced(choice) for choice in choices]
    for place in sorted(range(len(choices)), key=lambda place: -len(phrases[place])):
        if phrases[place].strip() and phrases[place] in said:
            found.add(place)
            said = said.replace(phrases[place], " | ")
    return found


def grouped_means(
    values: Mapping[str, Any], groups: Sequence[str], names: Sequence[str], patients: Sequence[Any]
) -> dict[str, dict[str, Any]]:
    """Each measure's mean over the groups' means, over all questions, and of each group, with 95 % bootstrap intervals by patient.

    Args:
        values: N figures of each measure.
        groups: the group of each question.
        names: all groups there may be; those that do not occur are left out.

    Returns:
        `{measure: {"mean", "mean_interval", "of_questions", "of_questions_interval", <group>: mean, ..., "intervals": {<group>: pair}}}`;
        without questions the means are None.
    """
    present = [name for name in names if name in set(groups)]
    if not present:
        return {name: {"mean": None, "mean_interval": None, "of_questions": None, "of_questions_interval": None} for name in values}
    members = np.array([[group == name for name in present] for group in groups])  # (N, K)
    by_group = {name: mean_of(np.where(members, np.array(column, dtype=float)[:, None], np.nan)) for name, column in values.items()}
    statistics: dict[str, Statistic] = {}
    for name, column in values.items():
        statistics |= {f"{name}/mean": mean_over(by_group[name]), f"{name}/of_questions": mean_of(column), f"{name}/group": by_group[name]}
    spans, once = intervals(statistics, patients), np.ones((1, len(groups)))
    result: dict[str, dict[str, Any]] = {}
    for name in values:
        entry: dict[str, Any] = {}
        for figure in ("mean", "of_questions"):
            entry |= {figure: float(statistics[f"{name}/{figure}"](once)[0]), f"{figure}_interval": spans[f"{name}/{figure}"]}
        entry |= dict(zip(present, by_group[name](once)[0].tolist(), strict=True))
        result[name] = entry | {"intervals": dict(zip(present, spans[f"{name}/group"], strict=True))}
    return result


def confusion(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Of pairs (right, chosen): the right answers, these and all that were chosen, and `counts[right][chosen]`; "none" comes last."""
    counted = Counter(pairs)
    rows = sorted({right for right, _ in counted})
    columns = sorted({answer for pair in counted for answer in pair} - {NOTHING}) + [NOTHING] * any(
        chosen == NOTHING for _, chosen in counted
    )
    return {"right": rows, "chosen": columns, "counts": [[counted[one, other] for other in columns] for one in rows]}


def _spaced(text: str) -> str:
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "

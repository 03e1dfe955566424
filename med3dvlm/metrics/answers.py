"""Score answers to questions with choices: the choice that a text names, means by group, confusions.

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
NAMED = "|"  # takes the place of a choice that an answer names in words

# Decimals stay whole, and a sign that tells "<5 mm" from "5 mm" or "T+" from "T" is a word of its own.
WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+|[<>≤≥=+]|(?<!\w)[-−](?=\d)")
BEFORE_LETTER = re.compile(
    r"(?:^|[.!?:;=\n]|\b(?:is|are|be|it's|i'd say|say|choose|select|pick|think|believe|with|either|neither|both"
    r"|(?:the |my )?(?:option|choice|answer|letter)s?)(?: the)?)$",
    re.IGNORECASE,
)
BETWEEN_LETTERS = re.compile(r"(?:[\s,/&]|\b(?:or|and|nor|but|not)\b)+$", re.IGNORECASE)
AFTER_LETTER = re.compile(
    r"\s*(?:$|[,:;!?)\]\"'*/&]|\.(?!\w)|(?<=\s)[-–—]\s|(?:or|and|nor|but|not|because|since|as|is|of)\b)", re.IGNORECASE
)


def first_letter(text: str, choices: int) -> str | None:
    """Return the first of A, B, ... that stands by itself in an answer, as the papers count."""
    found = re.search(rf"\b[{LETTERS[:choices]}]\b", text)
    return found.group() if found else None


def right_choices(choices: Sequence[str], answer: str) -> list[int]:
    """Return the indices of the answer among the choices, case and punctuation apart: several where it is listed several times."""
    words = _words(answer)
    return [place for place, choice in enumerate(choices) if choice == answer or (words and _words(choice) == words)]


def named_choices(text: str, choices: Sequence[str]) -> set[int]:
    """Return the indices of all choices that an answer names, by letter or in words, those that it denies included.

    A letter must stand as an answer does: alone, at the beginning, after "option" or "the answer is", with another such letter or with a
    choice's text. The "B" of "Hepatitis B" is none, nor is the article of "A cyst". Words within a longer choice do not name a shorter
    one: who says "left lung" does not say "lung". Case and punctuation count for nothing, but for signs such as "<" and "+". Of a choice
    that is listed twice, its words name the first.
    """
    found = set()
    words = [(word.group().lower(), *word.span()) for word in WORD.finditer(text)]
    for place in sorted(range(len(choices)), key=lambda place: -len(" ".join(_words(choices[place])))):
        phrase = _words(choices[place])
        for first in range(len(words) - len(phrase) + 1 if phrase else 0):
            candidate = words[first : first + len(phrase)]
            if [word for word, _, _ in candidate] == phrase:
                found.add(place)
                words[first : first + len(phrase)] = [("", start, end) for _, start, end in candidate]
                start, end = candidate[0][1], candidate[-1][2]
                text = text[:start] + NAMED * (end - start) + text[end:]
    for letter in re.finditer(rf"(?<![\w'’-])[{LETTERS[: len(choices)]}](?![\w'’]|-\w)", text):
        if _is_answer(text, *letter.span(), bool(found)):
            found.add(LETTERS.index(letter.group()))
    return found


def grouped_means(
    values: Mapping[str, Any], groups: Sequence[str], names: Sequence[str], patients: Sequence[Any]
) -> dict[str, dict[str, Any]]:
    """Return each measure's mean over the groups' means, over all questions, and of each group, with 95 % bootstrap intervals by patient.

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
    """Count pairs (right, chosen). Returns the right answers, all answers, and `counts[right][chosen]`; "none" comes last."""
    counted = Counter(pairs)
    rows = sorted({right for right, _ in counted})
    columns = sorted({answer for pair in counted for answer in pair} - {NOTHING}) + [NOTHING] * any(
        chosen == NOTHING for _, chosen in counted
    )
    return {"right": rows, "chosen": columns, "counts": [[counted[one, other] for other in columns] for one in rows]}


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _is_answer(text: str, start: int, end: int, others: bool) -> bool:
    """Return whether a letter stands where an answer's does. `others`: something was named before it. Choices in words are `NAMED` signs."""
    before, after = text[:start].rstrip(" \t([\"'*"), text[end:]
    followed = AFTER_LETTER.match(text, end) or (text[start] != "A" and after.lstrip().startswith(NAMED))  # "A cyst" has an article
    if not followed:
        return False
    if BEFORE_LETTER.search(before) or (before.endswith(NAMED) and text[len(before) : start].strip()):  # "left lung (B)"
        return True
    joined = BETWEEN_LETTERS.sub("", before)  # "B or C", "not B but C"
    return joined != before and (others or bool(BEFORE_LETTER.search(joined)))

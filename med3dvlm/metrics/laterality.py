"""The sides of findings in reports, and whether two reports agree on them.

A side word speaks of the findings of its own part of a clause; parts are separated by commas and by words such as "and". A part without a
finding speaks of the one before it ("effusion, larger on the right"), or, at the start, of the next one. A finding whose part names no side
shares that of the finding joined to it ("consolidation and atelectasis of the left lower lobe"), unless it is one that has no side.

Shapes: N studies.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from med3dvlm.metrics.intervals import intervals, ratio_of
from med3dvlm.reports.findings import Mention, find_mentions
from med3dvlm.reports.findings.clauses import clauses

WORDS = {
    "left": r"left(?:-sided)?|lingula\w*",
    "right": r"right(?:-sided)?",
    "both": r"bilateral(?:ly)?|both|either side",
}
SIDE_WORD = re.compile("|".join(rf"(?P<{side}>\b(?:{words})\b)" for side, words in WORDS.items()), re.IGNORECASE)
SEPARATOR = re.compile(r",|\||:|\b(?:and|or|with|but|while|whereas|as well as)\b", re.IGNORECASE)
# Findings of one organ, or of the whole: a side in their neighbour's words is not theirs.
WITHOUT_SIDE = {
    "aortic_aneurysm", "arterial_wall_calcification", "ascites", "bowel_obstruction", "cardiomegaly", "coronary_artery_wall_calcification",
    "emphysema", "gallstone", "hiatal_hernia", "liver_mass", "lymphadenopathy", "medical_material", "mosaic_attenuation_pattern",
    "pancreatic_mass", "pericardial_effusion", "splenomegaly",
}  # fmt: skip


def side_in(text: str) -> str | None:
    """Return "left", "right" or "both" by the side words of a text; None where it names no side."""
    named = {str(found.lastgroup) for found in SIDE_WORD.finditer(text)}
    return "both" if "both" in named or len(named) > 1 else next(iter(named), None)


def finding_sides(text: str, names: Sequence[str] | None = None) -> dict[str, str | None]:
    """Return for each finding that a report states as present "left", "right", "both", or None without a side.

    Args:
        names: findings to look for, all that the rules know by default.

    Raises:
        ValueError: a name is unknown.
    """
    mentions = find_mentions(text, names)
    everything = mentions if names is None else find_mentions(text)  # which a side word may belong to in their place
    sides: dict[str, set[str]] = {mention.finding: set() for mention in mentions if mention.present}
    for clause in clauses(text):
        within = [one for one in everything if clause.start <= one.start < clause.start + len(clause.text)]
        for mention, side in _sides_in_clause(clause.text, clause.start, within):
            if mention.finding in sides and mention.present and side is not None:
                sides[mention.finding].add(side)
    return {name: "both" if "both" in found or len(found) > 1 else next(iter(found), None) for name, found in sides.items()}


def _sides_in_clause(text: str, start: int, mentions: Sequence[Mention]) -> list[tuple[Mention, str | None]]:
    """Return each mention of a clause, which begins at `start` of the report, with its side."""
    cuts = [found.span() for found in SEPARATOR.finditer(text)]
    ends = [0, *(place for cut in cuts for place in cut), len(text)]
    parts: list[tuple[list[Mention], list[str]]] = []  # findings, and the words about them
    before: list[str] = []
    for low, high in zip(ends[::2], ends[1::2], strict=True):
        found = [one for one in mentions if low <= one.start - start < high]
        if found:
            parts.append((found, [*before, text[low:high]]))
            before = []
        elif parts:
            parts[-1][1].append(text[low:high])
        else:
            before.append(text[low:high])
    sides = [side_in(" ".join(words)) for _, words in parts]
    named = []
    for place, (found, words) in enumerate(parts):
        for one in found:
            side = sides[place]
            if side is None and len(words) == 1 and place + 1 < len(parts) and one.finding not in WITHOUT_SIDE:
                side = sides[place + 1]
            named.append((one, side))
    return named


def laterality_scores(written: Sequence[str], references: Sequence[str], patients: Sequence[Any]) -> dict[str, Any]:
    """Return how often the side is right, over the findings that both reports state and whose side the reference names.

    Args:
        written, references: N reports each; an empty reference states nothing.
        patients: of each study.

    Returns:
        `{"findings": how many, "accuracy", "interval", "opposite": the share with the other side, "unnamed": the share without a side,
        "confusion": {reference: {written or "none": number}}}`; shares are None where there is no such finding, the interval, 95 % of
        bootstrap resamples of the patients, also where there are too few.
    """
    counts = np.zeros((len(written), 4))  # right, opposite, unnamed, all
    confusion: dict[str, dict[str, int]] = {}
    for row, (ours, theirs) in enumerate(zip(written, references, strict=True)):
        known = {name: side for name, side in finding_sides(theirs).items() if side is not None}
        stated = finding_sides(ours)
        for name in known.keys() & stated.keys():
            right, found = known[name], stated[name]
            counts[row] += (found == right, {found, right} == {"left", "right"}, found is None, 1)
            table = confusion.setdefault(right, {})
            table[found or "none"] = table.get(found or "none", 0) + 1
    total = counts[:, 3].sum()
    shares = [float(value) if total else None for value in counts[:, :3].sum(axis=0) / max(total, 1)]
    span = intervals({"accuracy": ratio_of(counts[:, 0], counts[:, 3])}, patients)["accuracy"] if total else None
    table_of = {side: dict(sorted(confusion[side].items())) for side in sorted(confusion)}
    return {
        "findings": int(total),
        "accuracy": shares[0],
        "interval": span,
        "opposite": shares[1],
        "unnamed": shares[2],
        "confusion": table_of,
    }

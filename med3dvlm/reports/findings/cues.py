"""Find the cues of `rules.yaml` in a clause: how far each reaches, and the state of the findings there."""

import re
from functools import lru_cache
from typing import NamedTuple

from med3dvlm.reports.findings.phrases import Phrases, Span, overlaps, rules_data

STATES = ("present", "uncertain", "absent")
# Kind of cue -> what it makes of a finding, and whether a label would still be 1; the first kind that reaches a finding counts.
KINDS = {
    "absent": ("absent", False),
    "pseudo": ("absent", False),
    "past": ("absent", False),
    "earlier": ("absent", False),
    "normal": ("absent", False),
    "asked": ("uncertain", False),
    "hedged": ("uncertain", True),
}
SIGNS = re.compile(r"[.;](?!\d)|\||(?<!following)(?<!\bfor)(?<!\bof)(?<!^no):(?!\d)", re.IGNORECASE)  # stops that are no words
LIST = re.compile(r"\b(or|nor|versus|vs)\b", re.IGNORECASE)


class Cue(NamedTuple):
    """A cue of one of `KINDS` at `span` of a clause; `forward` where it applies to the words after it."""

    kind: str
    forward: bool
    span: Span
    words: str


class Reach(NamedTuple):
    """The part of a clause to which a cue applies, itself included."""

    cue: Cue
    span: Span


def find_cues(text: str) -> list[Cue]:
    """Return the cues of a text, of overlapping ones the longest."""
    found = [
        Cue(kind, forward, match.span(), match.group())
        for kind, forward, phrases in _rules().cues
        for match in phrases.find(text)
        if kind != "earlier" or not _rules().unless.is_in(text)
    ]
    chosen: list[Cue] = []
    for cue in sorted(found, key=lambda cue: (cue.span[0] - cue.span[1], cue.span)):
        if not overlaps(cue.span, (other.span for other in chosen if other.span != cue.span)):
            chosen.append(cue)
    return chosen


def reaches(text: str) -> list[Reach]:
    """Return the reaches of a text's cues in the order of `KINDS`."""
    rules, cues = _rules(), find_cues(text)
    if not cues:
        return []
    asides, signs = rules.aside.spans(text), [match.span() for match in SIGNS.finditer(text)]
    stops = {key: [stop for stop in phrases.spans(text) if not overlaps(stop, asides)] for key, phrases in rules.stops.items()}
    of_doubt = [stop for stop in stops["of_doubt"] if not LIST.search(text, stop[1])]
    found = []
    for cue in cues:
        ends = signs + stops["both"] + stops["ahead"] * cue.forward + of_doubt * (cue.kind in ("normal", "hedged"))
        start, end = cue.span
        if cue.kind != "pseudo" and cue.forward:
            end = min((stop for stop, _ in ends if stop >= end), default=len(text))
        elif cue.kind != "pseudo":
            start = max((stop for _, stop in ends if stop <= start), default=0)
        found.append(Reach(cue, (start, end)))
    return sorted(found, key=lambda reach: list(KINDS).index(reach.cue.kind))


class _Rules(NamedTuple):
    cues: list[tuple[str, bool, Phrases]]
    unless: Phrases
    stops: dict[str, Phrases]
    aside: Phrases


@lru_cache(maxsize=1)
def _rules() -> _Rules:
    data = rules_data()
    cues = [(kind, side == "before", Phrases.of(phrases[side])) for kind, phrases in data["cues"].items() for side in ("before", "after")]
    return _Rules(
        [*cues, ("pseudo", True, Phrases.of(data["pseudo"]))],
        Phrases.of(data["cues"]["earlier"]["unless"]),
        {key: Phrases.of(phrases) for key, phrases in data["stops"].items()},
        Phrases.of(data["aside"]),
    )

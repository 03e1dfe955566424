"""Read the answer behind a finding's name, as in "Pleural effusion: none on the right, small on the left"."""

import re
from functools import lru_cache
from typing import NamedTuple

from med3dvlm.reports.findings.cues import KINDS, find_cues
from med3dvlm.reports.findings.phrases import any_of, rules_data

PARTS = re.compile(r"[,;|]|\.(?!\d)|\bbut\b", re.IGNORECASE)


@lru_cache(maxsize=1 << 12)
def answer_state(answer: str) -> tuple[str, bool] | None:
    """Return a state and whether a label would be 1, as in `KINDS`; None where the answer says nothing of the finding."""
    patterns = _patterns()
    parts = [part.strip() for part in PARTS.split(answer) if part.strip()]
    if not parts or patterns.unknown.match(answer):
        return None
    state = _of_part(parts[0], patterns)
    if state == KINDS["absent"] and any(map(patterns.amount.fullmatch, parts[1:])):
        return "present", True
    return state


def _of_part(part: str, patterns: "_Patterns") -> tuple[str, bool]:
    for state, signs in patterns.signs.items():
        if part.lower() in signs:
            return state, state != "absent"
    part = part.strip("()\"' ") or part
    if filler := patterns.fillers.match(part):
        part = part[filler.end() :].strip() or part
    cues = find_cues(part)
    for kind, result in KINDS.items():
        if any(cue.kind == kind != "normal" and (not cue.forward or cue.span[0] == 0) for cue in cues):
            return ("present", True) if kind == "pseudo" else result
        if kind == "absent" and patterns.absent.match(part):
            return result
    return ("uncertain", True) if patterns.uncertain.match(part) else ("present", True)


class _Patterns(NamedTuple):
    absent: re.Pattern[str]
    uncertain: re.Pattern[str]
    unknown: re.Pattern[str]
    fillers: re.Pattern[str]
    amount: re.Pattern[str]
    signs: dict[str, list[str]]


@lru_cache(maxsize=1)
def _patterns() -> _Patterns:
    data = rules_data()["answers"]
    absent, uncertain, unknown = (any_of(data[key]) for key in ("absent", "uncertain", "unknown"))
    fillers, amount = any_of(data["fillers"], end=r"\s*", several=True), any_of(data["amount"], end=r"[\s:-]*", several=True)
    signs = {state: [*data["signs"].get(state, []), *alone] for state, alone in data["signs_alone"].items()}
    return _Patterns(absent, uncertain, unknown, fillers, amount, signs)

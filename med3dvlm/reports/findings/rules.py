"""Find the findings that a free-text report names, and their states, by the rules in `rules.yaml`.

The rules are those of NegEx and ConText (Chapman et al. 2001, Harkema et al. 2009) in plain words: a phrase names a finding, and cues around it
in its clause (`clauses.py`) say that it is denied, past, asked for or doubted. Same finding named several times: one present mention is enough.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from med3dvlm.reports.findings.answers import answer_state
from med3dvlm.reports.findings.clauses import clauses
from med3dvlm.reports.findings.cues import KINDS, STATES, reaches
from med3dvlm.reports.findings.names import finding_name
from med3dvlm.reports.findings.phrases import Phrases, Span, overlaps, rules_data

FINDINGS_CT_RATE = (
    "medical_material",
    "arterial_wall_calcification",
    "cardiomegaly",
    "pericardial_effusion",
    "coronary_artery_wall_calcification",
    "hiatal_hernia",
    "lymphadenopathy",
    "emphysema",
    "atelectasis",
    "lung_nodule",
    "lung_opacity",
    "pulmonary_fibrotic_sequela",
    "pleural_effusion",
    "mosaic_attenuation_pattern",
    "peribronchial_thickening",
    "consolidation",
    "bronchiectasis",
    "interlobular_septal_thickening",
)
FINDINGS = tuple(rules_data()["findings"])  # those of CT-RATE, in its order, and others, of the abdomen


@dataclass(frozen=True)
class Mention:
    """A mention of a finding in a report.

    `state` is "present", "uncertain" or "absent"; `present` is what a label of 0 and 1 would be, true for most of what is uncertain.
    `phrase` are the words that name it, from `start` of the report, `cue` those that make it uncertain or absent ("no", "history of", ...).
    """

    finding: str
    phrase: str
    start: int
    sentence: str
    state: str
    present: bool
    cue: str | None


def read_findings(text: str, names: Sequence[str] | None = None) -> dict[str, bool]:
    """Return `{finding: stated as present}` for each of `names` (default: `FINDINGS`); what the text does not name is False.

    Raises:
        ValueError: if a name is unknown.
    """
    names = FINDINGS if names is None else tuple(names)
    present = {mention.finding for mention in find_mentions(text, names) if mention.present}
    return {name: name in present for name in names}


def finding_states(text: str, names: Sequence[str] | None = None) -> dict[str, str]:
    """Return `{finding: one of STATES}` of those findings that the text names, in the order in which it first names them.

    A finding stated plainly anywhere is present. One that is named only with doubt is uncertain, and one that is denied, or belongs to the
    past, is absent. What the text does not name is not in the result: a report's silence is no statement.

    Args:
        names: findings to look for, all of `FINDINGS` by default.

    Raises:
        ValueError: a name is unknown.
    """
    states: dict[str, str] = {}
    for mention in find_mentions(text, names):
        states[mention.finding] = min(states.get(mention.finding, mention.state), mention.state, key=STATES.index)
    return states


def findings_table(texts: Iterable[str], names: Sequence[str] | None = None, literal: bool = False) -> NDArray[np.int64]:
    """Return (N, K) of 0 and 1: `read_findings` of N texts, columns in the order of `names`; `literal` as for `find_mentions`."""
    names = FINDINGS if names is None else tuple(names)
    present = [{mention.finding for mention in find_mentions(text, names, literal) if mention.present} for text in texts]
    return np.array([[name in found for name in names] for found in present], dtype=np.int64).reshape(len(present), len(names))


def find_mentions(text: str, names: Sequence[str] | None = None, literal: bool = False) -> list[Mention]:
    """Return every mention in reading order with the cue that changed its state; it explains how a report was read.

    Args:
        literal: take names that the rules do not know, too: such a finding is named by its own words, "haemorrhage" also by "hemorrhages".

    Raises:
        ValueError: if a name is unknown, unless `literal`.
    """
    names = FINDINGS if names is None else tuple(names)
    if unknown := [name for name in names if name not in _rules() and not literal]:
        raise ValueError(f"Unknown finding {', '.join(map(repr, unknown))}; known are {', '.join(_rules())}.")
    mentions = {}
    for clause in clauses(text):
        for mention in _read_clause(clause.text, clause.answers, names):
            start = clause.start + mention.start
            words = text[start : start + len(mention.phrase)]
            # A line that ends in a colon is read again with each of its bullets.
            mentions[mention.finding, start, clause.start, clause.text] = replace(mention, start=start, phrase=words)
    return sorted(mentions.values(), key=lambda mention: mention.start)


class _Finding(NamedTuple):
    """The phrases of a finding in rules.yaml, by their keys."""

    phrases: Phrases
    context: Phrases
    unless: Phrases
    ordinary: Phrases
    structures: Phrases


@lru_cache(maxsize=1)
def _rules() -> dict[str, _Finding]:
    return {name: _Finding(*(Phrases.of(rule.get(key, ())) for key in _Finding._fields)) for name, rule in rules_data()["findings"].items()}


@lru_cache(maxsize=1 << 10)
def _finding(name: str) -> _Finding:
    if name in _rules():
        return _rules()[name]
    words = " ".join(re.escape(word) for word in re.split(r"[\s_-]+", name.lower()))
    for letters, either in (("ae", "a?e"), ("oe", "o?e"), ("our", "ou?r")):
        words = words.replace(letters, either)
    nothing = Phrases(())
    return _Finding(Phrases.of([f"{words}(s|es)?"]), nothing, nothing, nothing, nothing)


@lru_cache(maxsize=1 << 16)  # most sentences of a report are those of other reports
def _read_clause(text: str, answers: tuple[tuple[int, str], ...], names: tuple[str, ...]) -> tuple[Mention, ...]:
    """Return the mentions of a clause; their `start` is a position in it."""
    mentions: list[Mention] = []
    sentence = " ".join(text.split())
    for name in names:
        spans = _named(text, _finding(name))
        for span in spans:
            state, present, cue = _stated(span, text, _finding(name))
            label, answer = next(((end, answer) for end, answer in answers if span[1] <= end), (0, ""))
            if label and state != "absent":
                answered = None if any(start >= label for start, _ in spans) else answer_state(answer)
                if answered is None:
                    continue  # the answer names the finding itself, or says nothing of it
                if STATES.index(answered[0]) > STATES.index(state):
                    (state, present), cue = answered, answer
            mentions.append(Mention(name, text[slice(*span)], span[0], sentence, state, present, cue))
    return tuple(mentions)


def _named(text: str, finding: _Finding) -> list[Span]:
    """Return the spans where a clause names a finding."""
    spans = dict.fromkeys(finding.phrases.spans(text))  # two phrases may match the same words
    if not spans or (finding.context.patterns and not finding.context.is_in(text)) or finding.unless.is_in(text):
        return []
    elsewhere = finding.ordinary.spans(text)
    return [span for span in spans if not overlaps(span, elsewhere)]


def _stated(span: Span, text: str, finding: _Finding) -> tuple[str, bool, str | None]:
    """Return state, label and cue of a mention by the words around it."""
    for reach in _reaches(text):
        kind = reach.cue.kind
        is_structure = kind == "normal" and not overlaps(span, [reach.cue.span])
        if overlaps(span, [reach.span]) and not (is_structure and not finding.structures.is_in(text[slice(*span)])):
            return *KINDS[kind], reach.cue.words
    return "present", True, None


_reaches = lru_cache(maxsize=1 << 8)(reaches)  # the same for all findings of a clause


def finding_of(phrase: str) -> str:
    """Return the finding that a short phrase names: "lung nodule" -> "lung_nodule", and "pacemaker", by the rules, "medical_material".

    A phrase that the rules do not know stays as it is, spelled as `finding_name` does.
    """
    name = finding_name(phrase)
    return name if name in FINDINGS else next(iter(finding_states(phrase)), name)

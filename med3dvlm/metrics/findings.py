"""Which findings a free-text report states as present, by rules that stand beside this file in `findings.yaml`.

The rules are those of NegEx (Chapman et al. 2001) in plain words: a phrase names a finding, and the finding counts
unless a negation, a history or a doubt reaches it within its sentence. Same finding stated several times: one present
mention is enough.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
FINDINGS_ABDOMEN = (
    "liver_mass",
    "renal_cyst",
    "kidney_stone",
    "gallstone",
    "splenomegaly",
    "ascites",
    "aortic_aneurysm",
    "bowel_obstruction",
    "hydronephrosis",
    "pancreatic_mass",
)
FINDINGS = FINDINGS_CT_RATE + FINDINGS_ABDOMEN

RULES_FILE = Path(__file__).with_name("findings.yaml")
SENTENCE_END = re.compile(r"""(?:\.(?!\d)|[;!?\n"“”•])+""")  # a period inside 5.5 mm ends nothing
WORDS_BETWEEN = 8  # how many words "..." may stand for


@dataclass(frozen=True)
class Mention:
    """One place where a report names a finding.

    `present` is False where `cue` ("no", "history of", ...) takes it back; `cue` is None where nothing does.
    """

    finding: str
    phrase: str
    sentence: str
    present: bool
    cue: str | None


def read_findings(text: str, names: Sequence[str] | None = None) -> dict[str, bool]:
    """`{finding: stated as present}` for each of `names` (default: `FINDINGS`); what the text does not name is False.

    Raises:
        ValueError: if a name is unknown.
    """
    names = FINDINGS if names is None else tuple(names)
    present = {mention.finding for mention in find_mentions(text, names) if mention.present}
    return {name: name in present for name in names}


def findings_table(texts: Iterable[str], names: Sequence[str] | None = None) -> NDArray[np.int64]:
    """(N, K) of 0 and 1: `read_findings` of N texts, columns in the order of `names`."""
    names = FINDINGS if names is None else tuple(names)
    rows = [list(read_findings(text, names).values()) for text in texts]
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(names))


def find_mentions(text: str, names: Sequence[str] | None = None) -> list[Mention]:
    """Every mention in reading order, with what took it back: use this to see why a report was read as it was."""
    names = FINDINGS if names is None else tuple(names)
    rules = _rules()
    unknown = [name for name in names if name not in rules.findings]
    if unknown:
        raise ValueError(f"Unknown finding {', '.join(map(repr, unknown))}; known are {', '.join(rules.findings)}.")
    return [mention for sentence in SENTENCE_END.split(text) for mention in _read_sentence(sentence, names, rules)]


@dataclass(frozen=True)
class _Finding:
    phrases: tuple[re.Pattern[str], ...]
    context: re.Pattern[str] | None
    unless: re.Pattern[str] | None
    ordinary: re.Pattern[str] | None


@dataclass(frozen=True)
class _Rules:
    findings: dict[str, _Finding]
    before: re.Pattern[str]  # cues that reach forward
    after: re.Pattern[str]  # cues that reach back
    ignore: re.Pattern[str]
    stops: re.Pattern[str]


@lru_cache(maxsize=1)
def _rules() -> _Rules:
    import yaml

    data: dict[str, Any] = yaml.safe_load(RULES_FILE.read_text(encoding="utf-8"))
    cues = [data[kind] for kind in ("negation", "history", "doubt")]
    findings = {
        name: _Finding(
            tuple(_any_of([phrase]) for phrase in rule["phrases"]),
            *(_any_of(rule[key]) if key in rule else None for key in ("context", "unless", "ordinary")),
        )
        for name, rule in data["findings"].items()
    }
    return _Rules(
        findings,
        before=_any_of(phrase for kind in cues for phrase in kind["before"]),
        after=_any_of(phrase for kind in cues for phrase in kind["after"]),
        ignore=_any_of(data["negation"]["ignore"]),
        stops=_any_of(data["negation"]["stops"]),
    )


def _any_of(phrases: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(rf"(?:{_to_regex(phrase)})" for phrase in phrases), re.IGNORECASE)


def _to_regex(phrase: str) -> str:
    """One phrase of findings.yaml as a regular expression; the notation is explained at the head of that file."""
    space, gap = r"(?:[\s-]+)", rf"(?:[\s-]+\S+){{0,{WORDS_BETWEEN}}}?[\s-]+"
    parts = {" ... ": gap, " ": space, "*": r"\w*"}
    pattern = re.sub(r" \.\.\. | |\*", lambda found: parts[found.group()], phrase)
    start = "" if phrase.startswith(",") else r"(?<!\w)"
    return rf"{start}{pattern}(?!\w)"


def _read_sentence(sentence: str, names: Sequence[str], rules: _Rules) -> list[Mention]:
    reaches = list(_reaches(sentence, rules))
    mentions = []
    for name in names:
        finding = rules.findings[name]
        if finding.context and not finding.context.search(sentence):
            continue
        if finding.unless and finding.unless.search(sentence):
            continue
        elsewhere = [other.span() for other in finding.ordinary.finditer(sentence)] if finding.ordinary else []
        matches = chain.from_iterable(phrase.finditer(sentence) for phrase in finding.phrases)
        for found in {match.span(): match for match in matches}.values():  # two phrases may match the same words
            if any(start < found.end() and found.start() < end for start, end in elsewhere):
                continue
            cue = next((word for start, end, word in reaches if start < found.end() and found.start() < end), None)
            mentions.append((found.start(), Mention(name, found.group(), sentence.strip(), cue is None, cue)))
    return [mention for _, mention in sorted(mentions, key=lambda pair: pair[0])]


def _reaches(sentence: str, rules: _Rules) -> Iterator[tuple[int, int, str]]:
    """(start, end, cue) of every stretch of the sentence that a negation, a history or a doubt takes back."""
    stops = [stop.span() for stop in rules.stops.finditer(sentence)]
    ignored = [other.span() for other in rules.ignore.finditer(sentence)]

    def counts(cue: re.Match[str]) -> bool:
        return not any(start < cue.end() and cue.start() < end for start, end in ignored)

    for cue in filter(counts, rules.before.finditer(sentence)):
        yield cue.start(), min((start for start, _ in stops if start >= cue.end()), default=len(sentence)), cue.group()
    for cue in filter(counts, rules.after.finditer(sentence)):
        yield max((end for _, end in stops if end <= cue.start()), default=0), cue.end(), cue.group()

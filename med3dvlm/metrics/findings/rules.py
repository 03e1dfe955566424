"""Which findings a free-text report states as present, by rules that stand beside this file in `rules.yaml`.

The rules are those of NegEx (Chapman et al. 2001) in plain words: a phrase names a finding, and the finding counts
unless a negation, a history or a doubt reaches it within its sentence. Same finding stated several times: one present
mention is enough.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
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

RULES_FILE = Path(__file__).with_name("rules.yaml")
# A period inside 5.5 mm ends nothing, nor does the question mark of "(cyst?)".
SENTENCE_END = re.compile(r"""(?:\.(?!\d)|[;!\n"“”•·]|\?(?!\s*\)))+""")
WORDS_BETWEEN = 12  # how many words "..." may stand for


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
    sentences = SENTENCE_END.split(rules.skipped.sub("\n", text))
    return [mention for sentence in sentences for mention in _read_sentence(sentence, names)]


@dataclass(frozen=True)
class _Phrases:
    """Patterns, each with a run of letters that it cannot do without: to look for that first saves most of the time."""

    patterns: tuple[tuple[str, re.Pattern[str]], ...]

    @classmethod
    def of(cls, phrases: Iterable[str]) -> "_Phrases":
        return cls(tuple((_needed(phrase), re.compile(_to_regex(phrase), re.IGNORECASE)) for phrase in phrases))

    def find(self, sentence: str) -> list[re.Match[str]]:
        lowered = sentence.lower()
        return [match for needed, pattern in self.patterns if needed in lowered for match in pattern.finditer(sentence)]


@dataclass(frozen=True)
class _Finding:
    phrases: _Phrases
    context: _Phrases
    unless: _Phrases
    ordinary: _Phrases


@dataclass(frozen=True)
class _Rules:
    findings: dict[str, _Finding]
    before: re.Pattern[str]  # cues that reach forward
    after: re.Pattern[str]  # cues that reach back
    ignore: re.Pattern[str]
    stops: re.Pattern[str]
    aside: _Phrases
    skipped: re.Pattern[str]  # sections that are not read, heading included


@lru_cache(maxsize=1)
def _rules() -> _Rules:
    import yaml

    data: dict[str, Any] = yaml.safe_load(RULES_FILE.read_text(encoding="utf-8-sig"))
    cues = [data[kind] for kind in ("negation", "history", "doubt")]
    return _Rules(
        {
            name: _Finding(*(_Phrases.of(rule.get(key, ())) for key in ("phrases", "context", "unless", "ordinary")))
            for name, rule in data["findings"].items()
        },
        before=_any_of(phrase for kind in cues for phrase in kind["before"]),
        after=_any_of(phrase for kind in cues for phrase in kind["after"]),
        ignore=_any_of(data["negation"]["ignore"]),
        stops=_any_of(data["negation"]["stops"]),
        aside=_Phrases.of(data["negation"]["aside"]),
        skipped=_sections(data["sections"]),
    )


def _sections(headings: dict[str, list[str]]) -> re.Pattern[str]:
    """A section that is not read: from its heading up to the next heading, else to the end of its sentence or line."""
    skip, read = ("|".join(map(_to_regex, headings[kind])) for kind in ("skip", "read"))
    start = r"(?:^|(?<=[.;\n\"]))\s*"
    to_next = rf"(?:(?!\n\s*\n).)*?(?={start}(?:{skip}|{read})\s*:)"
    return re.compile(rf"{start}(?:{skip})\s*:(?:{to_next}|[^.\n]*)", re.IGNORECASE | re.DOTALL)


def _any_of(phrases: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(rf"(?:{_to_regex(phrase)})" for phrase in phrases), re.IGNORECASE)


def _to_regex(phrase: str) -> str:
    """One phrase of rules.yaml as a regular expression; the notation is explained at the head of that file."""
    space, gap = r"(?:[\s-]+)", rf"(?:[\s-]+\S+){{0,{WORDS_BETWEEN}}}?[\s-]+"
    parts = {" ... ": gap, " ": space, "*": r"\w*"}
    pattern = re.sub(r" \.\.\. | |\*", lambda found: parts[found.group()], phrase)
    start = "" if phrase.startswith((",", "-")) else r"(?<!\w)"
    return rf"{start}(?:{pattern})(?!\w)"


def _needed(phrase: str) -> str:
    """The longest run of letters outside all parentheses, lower case; "" where there is none."""
    while "(" in phrase:
        phrase = re.sub(r"\([^()]*\)", " ", phrase)
    return max(re.findall("[a-z]+", phrase.lower()), key=len, default="")


@lru_cache(maxsize=1 << 16)  # most sentences of a report are those of other reports
def _read_sentence(sentence: str, names: tuple[str, ...]) -> tuple[Mention, ...]:
    rules = _rules()
    mentions, reaches = [], None
    for name in names:
        finding = rules.findings[name]
        matches = {match.span(): match for match in finding.phrases.find(sentence)}  # two phrases may match the same words
        if not matches or (finding.context.patterns and not finding.context.find(sentence)) or finding.unless.find(sentence):
            continue
        elsewhere = [other.span() for other in finding.ordinary.find(sentence)]
        reaches = list(_reaches(sentence, rules)) if reaches is None else reaches
        for span, found in matches.items():
            if _overlaps(span, elsewhere):
                continue
            cue = next((word for start, end, word in reaches if _overlaps(span, [(start, end)])), None)
            mentions.append((found.start(), Mention(name, found.group(), sentence.strip(), cue is None, cue)))
    return tuple(mention for _, mention in sorted(mentions, key=lambda pair: pair[0]))


def _reaches(sentence: str, rules: _Rules) -> Iterator[tuple[int, int, str]]:
    """(start, end, cue) of every stretch of the sentence that a negation, a history or a doubt takes back."""
    asides = [aside.span() for aside in rules.aside.find(sentence)]
    stops = [stop.span() for stop in rules.stops.finditer(sentence) if not _overlaps(stop.span(), asides)]
    ignored = [other.span() for other in rules.ignore.finditer(sentence)]

    for cue in rules.before.finditer(sentence):
        if not _overlaps(cue.span(), ignored):
            yield cue.start(), min((start for start, _ in stops if start >= cue.end()), default=len(sentence)), cue.group()
    for cue in rules.after.finditer(sentence):
        if not _overlaps(cue.span(), ignored):
            yield max((end for _, end in stops if end <= cue.start()), default=0), cue.end(), cue.group()


def _overlaps(span: tuple[int, int], others: Iterable[tuple[int, int]]) -> bool:
    return any(start < span[1] and span[0] < end for start, end in others)

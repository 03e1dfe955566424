"""Compile the notation of `rules.yaml`, explained at its head, to regular expressions."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

RULES_FILE = Path(__file__).with_name("rules.yaml")
WORDS_BETWEEN = 12  # how many words "..." may stand for
Span = tuple[int, int]


@lru_cache(maxsize=1)
def rules_data() -> dict[str, Any]:
    """Return the content of `rules.yaml`."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster
    data: dict[str, Any] = yaml.load(RULES_FILE.read_text(encoding="utf-8-sig"), loader)
    return data


@dataclass(frozen=True)
class Phrases:
    """Patterns, each with a run of letters that every match contains: searching for that first saves most of the time."""

    patterns: tuple[tuple[str, re.Pattern[str]], ...]

    @classmethod
    def of(cls, phrases: Iterable[str]) -> "Phrases":
        return cls(tuple((_needed(phrase), re.compile(to_regex(phrase), re.IGNORECASE)) for phrase in phrases))

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """Return every match of every pattern, pattern by pattern."""
        lowered = text.lower()
        return (match for needed, pattern in self.patterns if needed in lowered for match in pattern.finditer(text))

    def spans(self, text: str) -> list[Span]:
        return [match.span() for match in self.find(text)]

    def is_in(self, text: str) -> bool:
        return next(self.find(text), None) is not None


def to_regex(phrase: str) -> str:
    space, gap = r"(?:[\s-]+)", rf"(?:[\s:|-]+[^\s:|-]+){{0,{WORDS_BETWEEN}}}?[\s:|-]+"
    parts = {" ... ": gap, " ": space, "*": r"\w*"}
    pattern = re.sub(r" \.\.\. | |\*", lambda found: parts[found.group()], phrase)
    start = r"(?<!\w)" if phrase[0].isalnum() or phrase[0] == "(" else ""
    end = "" if phrase[-1] == "]" else r"(?!\w)"
    return rf"{start}(?:{pattern}){end}"


def any_of(phrases: Iterable[str], start: str = "", end: str = "", several: bool = False) -> re.Pattern[str]:
    """Return one pattern of several phrases between two others: the first that fits counts, or a row of them."""
    one = f"{start}(?:{'|'.join(map(to_regex, phrases))}){end}"
    return re.compile(f"(?:{one})+" if several else one, re.IGNORECASE)


def overlaps(span: Span, others: Iterable[Span]) -> bool:
    """Return whether the span shares a character with any of the others."""
    return any(start < span[1] and span[0] < end for start, end in others)


def _needed(phrase: str) -> str:
    """Return the longest run of letters outside all brackets, lower case; "" where there is none."""
    bare = re.sub(r"\[[^\]]*\]|\w\?", " ", phrase)
    while (inner := re.sub(r"\([^()]*\)", " ", bare)) != bare:
        bare = inner
    return max(re.findall("[a-z]+", bare.lower()), key=len, default="")

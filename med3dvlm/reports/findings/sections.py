"""Find the sections of a report by the headings of `rules.yaml`."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from med3dvlm.reports.findings.phrases import rules_data

LABEL_LINE = re.compile(r"\n[ \t]*[A-Z][\w ,/&()-]{0,40}:")
WORD = re.compile(r"\S")
BLANK_LINE = re.compile(r"\n[ \t]*\n")
SENTENCE_END = re.compile(r"\.")
LINE_END = re.compile(r"\n")


class Heading(NamedTuple):
    """A heading: `section` is a key of `sections` in rules.yaml, `start` and `end` its span, signs around it included."""

    section: str
    start: int
    end: int


def headings(text: str) -> list[Heading]:
    """Return the headings of a text in order: at the start of a line, alone or with a colon or dash, perhaps in Markdown's signs; after a
    sentence, with a colon.
    """
    pattern, sections = _pattern()
    return [Heading(sections[match.lastgroup or ""], *match.span()) for match in pattern.finditer(text)]


def without_unread(text: str) -> str:
    """Replace sections that are not read (history, indication and the like) by line ends, so that the text keeps its length.

    Such a section ends with its paragraph, before the next heading, and before a line that begins with a label ("Lungs: ..."). Where no
    heading follows it ends with its line, and in a text of one line with its sentence.
    """
    found = headings(text)
    unread = set(rules_data()["unread"])
    for heading, following in zip(found, [*found[1:], None], strict=False):
        if heading.section in unread:
            end = min(_ends(text, heading, following))
            text = text[: heading.start] + "\n" * (end - heading.start) + text[end:]
    return text


def _ends(text: str, heading: Heading, following: Heading | None) -> Iterator[int]:
    words = WORD.search(text, heading.end)
    paragraph = words and BLANK_LINE.search(text, words.start())
    yield paragraph.start() if paragraph else len(text)
    if label := LABEL_LINE.search(text, heading.end):
        yield label.start()
    if following:
        yield following.start
    elif words and "\n" not in text[heading.end : words.start()]:
        stop = (LINE_END if "\n" in text.strip() else SENTENCE_END).search(text, heading.end)
        yield stop.start() if stop else len(text)


@lru_cache(maxsize=1)
def _pattern() -> tuple[re.Pattern[str], dict[str, str]]:
    """Return the pattern of all headings, and the section of each of its groups."""
    forms = {
        "line": r"^[ \t#*_>]*(?:{})[ \t]*[*_]*[ \t]*(?::[ \t]*[*_]*|[ \t]-[ \t]|$)",
        "inline": r"(?<=[.;!?\"])[ \t]*(?:{})[ \t]*:",
    }
    sections, parts = {}, []
    for form, pattern in forms.items():
        for number, (section, names) in enumerate(rules_data()["sections"].items()):
            sections[f"{form}{number}"] = section
            named = "|".join(names).replace(" ", "[ \t]+")
            parts.append(f"(?P<{form}{number}>{pattern.format(named)})")
    return re.compile("|".join(parts), re.IGNORECASE | re.MULTILINE), sections

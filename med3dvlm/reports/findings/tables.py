"""Read tables in a report, drawn with | or set in columns by tabs, dots or blanks, as rows of a label and its answer."""

import re
from collections.abc import Iterator, Sequence

from med3dvlm.reports.findings.phrases import Span

BETWEEN = re.compile(r"\t+ *|(?<!:) {3,}|(?: ?\.){4,} *")
RULE = re.compile(r"[\s|:+=-]*[|+=-]{2}[\s|:+=-]*")  # a drawn line
STATE = re.compile(r"(present|absent|yes|no|positive|negative|normal|abnormal|uncertain|possible|\+|-)", re.IGNORECASE)
LABELS = re.compile(
    r"((finding|pathology|abnormality|diagnosis|organ|structure|region|site|location|item|parameter|name)s?)?", re.IGNORECASE
)
TICK = re.compile(r"[x+*1\u2022\u2713\u2714\u2611\u2612]|\[x\]|\(\+\)|yes", re.IGNORECASE)
LABEL = 60  # characters, at most
Answers = tuple[tuple[int, str], ...]


def cells(line: str, between: re.Pattern[str] = BETWEEN) -> list[Span]:
    """Return the spans of a line's cells; one for a line without columns."""
    if "|" in line:
        edges = [-1, *(place for place, sign in enumerate(line) if sign == "|"), len(line)]
        spans = [(start + 1, end) for start, end in zip(edges, edges[1:], strict=False)]
        inner = spans[1 if not line[slice(*spans[0])].strip() else 0 : len(spans) - (not line[slice(*spans[-1])].strip())]
        return [_stripped(line, span) for span in inner]
    first = len(line) - len(line.lstrip())
    line = line.rstrip() if between is BETWEEN else line
    gaps = [match.span() for match in between.finditer(line, first)]
    starts, ends = [first, *(end for _, end in gaps)], [*(start for start, _ in gaps), len(line)]
    return list(zip(starts, ends, strict=True))


def is_rule(line: str) -> bool:
    return RULE.fullmatch(line) is not None


def table_rows(text: str, lines: Sequence[Span]) -> Iterator[tuple[int, str, Answers]]:
    """Yield (start, words, answers) of the rows of a table, and of the titles of its columns with the cells below them; `lines` are positions
    in `text`. Answers are empty for cells that are sentences of their own.
    """
    drawn = [(start, text[start:end]) for start, end in lines if not is_rule(text[start:end])]
    tabs = {line.count("\t") for _, line in drawn}
    between = re.compile("\t") if len(tabs) == 1 and tabs != {0} and "\t\t" not in drawn[0][1] else BETWEEN  # a cell may be empty
    rows = [(start, line, cells(line, between)) for start, line in drawn]
    titles: list[str] = []
    if len(rows) > 1 and (len(rows) < len(lines) and is_rule(text[slice(*lines[1])]) or _is_header(*(row[1:] for row in rows[:2]))):
        head, line, spans = rows.pop(0)
        titles = [line[slice(*span)] for span in spans]
    for start, line, places in rows:
        words = [line[slice(*place)] for place in places]
        if not titles and len(groups := _groups(words)) > 1:
            parts = [(start + places[first][0], line[places[first][0] : places[last - 1][1]]) for first, last in groups]
            yield from ((begin, part.replace("|", ":", 1), ()) for begin, part in parts)
            continue
        if len(words[0]) > LABEL or words[0].endswith((".", ";")):
            yield from ((start + place[0], one, ()) for place, one in zip(places, words, strict=True))
            continue
        yield start, _drawn(line, places), ((places[0][1], _answer(words[1:], titles[1:])),)
        if titles:
            yield from ((head + span[0], title, ((len(title), one),)) for span, title, one in zip(spans, titles, words, strict=False))


def _groups(words: Sequence[str]) -> list[Span]:
    """Return the groups of cells, (first, last + 1) each, of a row with several labels: "effusion | no | nodule | yes", "effusion: no |
    nodule: yes".
    """
    if any(":" in word[:-1] for word in words[1:]):
        edges = list(range(len(words)))
    else:
        inner = range(2, len(words) - 1)
        edges = [
            0,
            *(place for place in inner if not _is_state(words[place]) and _is_state(words[place - 1]) and _is_state(words[place + 1])),
        ]
    return list(zip(edges, [*edges[1:], len(words)], strict=True))


def _answer(words: Sequence[str], titles: Sequence[str]) -> str:
    """Return the values of a row as one answer; a tick below "Present" or "Absent" is that word."""
    parts = []
    for word, title in zip(words, [*titles, *[""] * len(words)], strict=False):
        ticked = STATE.fullmatch(title) and TICK.fullmatch(word)
        parts.append(title if ticked else word)
    return ", ".join(part for part in parts if part)


def _is_header(first: tuple[str, Sequence[Span]], second: tuple[str, Sequence[Span]]) -> bool:
    """Return whether the first of two rows holds titles: of a column of labels, or words over short values."""
    titles, values = ([line[slice(*span)] for span in spans] for line, spans in (first, second))
    return LABELS.fullmatch(titles[0]) is not None or (all(map(_is_state, values)) and not any(map(_is_state, titles)))


def _is_state(word: str) -> bool:
    return bool(STATE.fullmatch(word) or TICK.fullmatch(word) or word.lower() in ("none", "n", "y", "0", ""))


def _drawn(line: str, places: Sequence[Span]) -> str:
    """Return the line with one | between its cells."""
    signs = list(line.replace("|", " ").replace("\t", " "))
    for start, _ in places[1:]:
        signs[start - 1] = "|"
    return "".join(signs)


def _stripped(line: str, span: Span) -> Span:
    words = line[slice(*span)]
    start = span[0] + len(words) - len(words.lstrip())
    return start, start + len(words.strip())

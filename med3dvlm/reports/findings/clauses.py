"""Cut a report into clauses: its sentences, and the content of "label: value" lines, bullets, check boxes and tables.

No character is moved. Unusual signs are replaced by plain ones of the same length and what belongs to another clause is blanked, so that a
place in a clause is a place in the report.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from med3dvlm.reports.findings.phrases import Span, any_of, rules_data
from med3dvlm.reports.findings.sections import without_unread
from med3dvlm.reports.findings.tables import cells, is_rule, table_rows

# One character for another: what text processors put in place of a blank, a line end, a hyphen, a quotation mark, a bullet, a colon
PLAIN = {
    ord(sign): plain
    for plain, signs in {
        " ": "\r\u00a0\u2002\u2003\u2007\u2009\u200a\u200b\u202f\u3000\ufeff",
        "\n": "\x0b\x0c\x85\u2028\u2029",
        "-": "\u00ad\u2010\u2011\u2012\u2013\u2014\u2015\u2212",
        '"': "\u201c\u201d\u201e\u00ab\u00bb",
        "'": "\u2018\u2019",
        "\u2022": "\u00b7\u25aa\u25cf\u25e6\u2023\u2219",
        ":": "\uff1a",
        "=": "\u2192",
    }.items()
    for sign in signs
}
MARKUP = re.compile(r"\*\*|__|`|</?\w+>")
NOT = re.compile(r"\b(is|are|was|were|do|does|did|has|have|had)n't\b", re.IGNORECASE)
# A period inside 5.5 mm or "no. 3" ends nothing, nor does the question mark of "(cyst?)", "?cyst" or "Cyst? No".
SENTENCE_END = re.compile(
    r"(?:(?<!\bno)\.(?!\d|(?<=\bneg\.)\s*for\b)|\.(?!\s*\d|(?<=\bneg\.)\s*for\b)"
    r"""|[;!\n"\u2022]|(?<=[\w)])\?(?!\s*(?:\)|(?:no|none|yes)\b)))+""",
    re.IGNORECASE,
)
NUMBER = re.compile(r"(?<=[\w.,;:)])\s+(?=\(?\d{1,2}[.)]\s+[a-z])", re.IGNORECASE)  # between "1) ..." and "2) ..."
NEXT_LABEL = re.compile(r",(?=\s*(?!right\b|left\b|both\b|bilateral)[a-z][^,:.]{2,40}:)", re.IGNORECASE)  # between "a: no" and "b: yes"
ANSWER = "(?:yes|no|none|absent|present|negative|positive)"
NEXT_ANSWER = re.compile(
    rf"(?<=:)\s*{ANSWER}(?P<gap>\s{{2,}})(?=[a-z][^,:.]{{2,40}}:)"  # "a: no  b: yes"
    rf"|\b{ANSWER}(?P<comma>,)(?=\s*(?!right\b|left\b|both\b|bilateral)[^,:]*[^\W\d]\s+{ANSWER}\s*(?:,|$))",  # "a yes, b no"
    re.IGNORECASE,
)
BULLET = re.compile(r"\s*(?:(?:[-*>\u2022]|\(?\d{1,2}[.)](?!\d)|\(?[a-z][.)])\s+)+", re.IGNORECASE)
LABELLED = re.compile(r"[^.:;]{1,60}:")
WRAPPED = 60  # characters of a line of capitals that may go on in the next one
SHORT_LABEL = 4  # words; a longer one with nothing behind its colon is a sentence


class Clause(NamedTuple):
    """`text` begins at `start` of the report. `answers` are pairs of a place in it and the answer to the words before that place: a finding
    named there has the answer's state, and an empty answer says nothing of it.
    """

    start: int
    text: str
    answers: tuple[tuple[int, str], ...] = ()


def clauses(report: str) -> Iterator[Clause]:
    """Yield the clauses of a report, without sections that are not read."""
    text = MARKUP.sub(lambda found: " " * len(found.group()), report.translate(PLAIN))
    text = without_unread(NOT.sub(r"\1 no", text))
    head: Span | None = None  # a line that ends in a colon speaks of the bullets below it
    for block in _blocks(text):
        if isinstance(block, list):
            for start, row, answer in table_rows(text, block):
                yield from [Clause(start, row, answer)] if answer else _sentences(start, row)
            continue
        start, end = block
        bullet = BULLET.match(text, start, end)
        words = bullet.end() if bullet else start
        line = " " * (words - start) + text[words:end].replace("\n", " ")
        if head and bullet:
            line = text[slice(*head)] + " " * (start - head[1]) + line
            start = head[0]
        else:
            head = None
        if line.rstrip().endswith(":"):
            head = start, end
        yield from _sentences(start, line)


def _blocks(text: str) -> Iterator[Span | list[Span]]:
    """Yield each table as the list of its lines, and each other line joined with its continuation lines."""
    spans = [match.span() for match in re.finditer(r"[^\n]*\S[^\n]*", text)]
    capitals = text.upper() == text
    table: list[Span] = []
    line: Span | None = None
    for place, span in enumerate(spans):
        neighbours = [text[slice(*spans[near])] for near in (place - 1, place + 1) if 0 <= near < len(spans)]
        if _in_table(text[slice(*span)], neighbours):
            if line:
                yield line
                line = None
            table.append(span)
            continue
        if table:
            yield table
            table = []
        if line and _goes_on(text, line, span, capitals):
            line = line[0], span[1]
            continue
        if line:
            yield line
        line = span
    if table or line:
        yield table or line  # type: ignore[misc]


def _in_table(line: str, neighbours: list[str]) -> bool:
    columns = cells(line)
    if len(columns) < 2:
        return is_rule(line) and any("|" in other for other in neighbours)
    second = line[slice(*columns[1])]
    is_pair = len(columns) == 2 and _patterns().answer.fullmatch(second.strip(" .")) is not None
    return "|" in line or is_pair or any(len(cells(other)) > 1 for other in neighbours)


def _goes_on(text: str, line: Span, following: Span, capitals: bool) -> bool:
    """Return whether a line break is in the middle of a sentence."""
    before, after = text[slice(*line)].strip(), text[slice(*following)].strip()
    if text.count("\n", line[1], following[0]) > 1 or BULLET.match(after + " ") or LABELLED.match(after) or _patterns().sign.match(after):
        return False
    if before.endswith(":"):
        return True
    if before[-1] in ".;!?":
        return False
    bullet = BULLET.match(before)
    begins = before[bullet.end() if bullet else 0]
    return (
        before[-1] in ",-/("
        or _patterns().open.search(before) is not None
        or (after[0].islower() and not begins.islower())
        or (capitals and len(before) >= WRAPPED)
    )


def _sentences(start: int, line: str) -> Iterator[Clause]:
    ends = [(match.start(), match.end() if "?" in match.group() else match.start(), match.end()) for match in SENTENCE_END.finditer(line)]
    ends += [(match.start(), match.start(), match.end()) for match in NUMBER.finditer(line) if _balanced(line[: match.start()])]
    ends += [(match.start(), match.start(), match.end()) for match in NEXT_LABEL.finditer(line)]
    ends += [(start, start, end) for match in NEXT_ANSWER.finditer(line) for start, end in [match.span(match.lastgroup or 0)]]
    done = 0
    for _, end, following in [*sorted(ends), (0, len(line), 0)]:
        if line[done:end].strip():
            yield from _signed(start + done, line[done:end])
        done = max(following, done)


def _balanced(words: str) -> bool:
    return words.count("(") <= words.count(")")


def _signed(start: int, text: str) -> Iterator[Clause]:
    """Cut a sentence at its signs: "(-) effusion (+) nodule", "effusion (-), nodule (+)", "effusion: [ ] yes [x] no"."""
    patterns = _patterns()
    signs = list(patterns.sign.finditer(text))
    if not signs:
        yield _labelled(start, text)
        return
    edges = [*(sign.start() for sign in signs), len(text)]
    before = text[: edges[0]]
    parts = [text[sign.end() : edge] for sign, edge in zip(signs, edges[1:], strict=True)]
    if before.strip() and patterns.answer.fullmatch(parts[0].strip(" ,./")):  # options to choose from
        ticked = [part.strip(" ,./") for sign, part in zip(signs, parts, strict=True) if sign.lastgroup == "present"]
        yield Clause(start, before, ((len(before), ticked[0] if len(ticked) == 1 else ""),))
    elif before.strip(" -"):  # the sign stands behind what it is about, back to the last comma
        for sign, words, begin in zip(signs, [before, *parts], [0, *(sign.end() for sign in signs)], strict=False):
            cut = words.rfind(",") + 1
            yield _labelled(start + begin, words[:cut])
            yield Clause(start + begin + cut, words[cut:], ((len(words) - cut, sign.group()),))
        yield _labelled(start + signs[-1].end(), parts[-1])
    else:
        for sign, words in zip(signs, parts, strict=True):
            absent = sign.lastgroup == "absent"
            yield Clause(start + sign.end(), words, ((len(words), sign.group()),)) if absent else _labelled(start + sign.end(), words)


def _labelled(start: int, text: str) -> Clause:
    """Return a clause of a sentence with the answers behind its colons and similar signs."""
    answers = []
    for found in _patterns().separator.finditer(text):
        answer = text[found.end() :].strip()
        if answer.strip(".,") or len(text[: found.start()].split()) <= SHORT_LABEL:
            answers.append((found.start(), answer))
    return Clause(start, text, tuple(answers))


class _Patterns(NamedTuple):
    sign: re.Pattern[str]  # groups "present" and "absent"
    answer: re.Pattern[str]  # the whole of an answer that is one word
    separator: re.Pattern[str]
    open: re.Pattern[str]  # words at the end of a line that cannot end a sentence


@lru_cache(maxsize=1)
def _patterns() -> _Patterns:
    data = rules_data()["answers"]
    signs = {state: "|".join(map(re.escape, data["signs"][state])) for state in ("present", "absent")}
    alone = "|".join(re.escape(sign) for state in ("present", "absent", "uncertain") for sign in data["signs_alone"][state])
    words = any_of(data["words"]).pattern
    # "Effusion: none", "Effusion? No", "Effusion | none"; without such a sign only before the last word: "Effusion none", "Effusion - none"
    separator = (
        r"(?<!\s)\s*(?:(?<!\d):|:(?!\d)|=|\||->|\?(?=\s*(?:no|none|yes)\b))\s*"
        rf"|(?<!\bis)(?<!\bare)(?<!\bwas)(?<!\bwere)(?<!\bnot)(?<!\bno)(?<!\s)(?:\s*,)?\s+(?:-+\s+)?(?=(?:{words})\W*$)"
        rf"|(?<!\s)\s+(?=(?:{alone})\s*$)"
    )
    return _Patterns(
        re.compile("|".join(f"(?P<{state}>{pattern})" for state, pattern in signs.items()), re.IGNORECASE),
        re.compile(rf"(?:{words})|(?:yes|present|positive|true|y|{alone})", re.IGNORECASE),
        re.compile(separator, re.IGNORECASE),
        any_of(data["open"], start=r"(?:^|.*\s)", end=r"$"),
    )

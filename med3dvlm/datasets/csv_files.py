"""Read tables row by row; errors name the file and the line.

A CSV begins with the names of its columns, in small or capital letters, and is otherwise as RFC 4180 has it: a text with a delimiter or a
line end in it stands in quotes, and a quote within it twice. The delimiter is the comma, semicolon or tab that divides the first line into
the wanted columns. The encoding is UTF-8, or UTF-16 where the file begins with its byte order mark. Empty rows, and empty cells behind the
last column, as spreadsheets write them, count for nothing.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

DELIMITERS = ",;\t"
LINE_END = re.compile(r"\r\n|\r|\n")
ENDING = r"\.[A-Za-z]\w*$"
MAX_CELL_LENGTH = 2**31 - 1  # characters; without it the csv module refuses a text of more than 131072
NO_VALUE = {"", "nan", "-nan", "nat", "none", "null", "na", "n/a", "<na>", "#n/a"}  # as pandas and others write a missing value


def csv_rows(path: Path, columns: Sequence[str], known: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each row's place, such as "labels.csv line 3", and the row; nothing where there is no such file.

    Args:
        columns: those that have to be there, each with a value in every row; the first tells rows apart.
        known: others whose names may be written in capital letters, too. Any other column keeps its name.

    Raises:
        ValueError: a column is missing or there twice, a row is shorter or longer than the head, a quote is not closed, or the encoding
            is another one.
    """
    if not path.is_file():
        return
    csv.field_size_limit(MAX_CELL_LENGTH)
    try:
        with path.open(newline="", encoding=_encoding(path)) as file:
            yield from _rows(path, _Lines(file), columns, known)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} line {_undecodable(path)} is not UTF-8 text; save the table as UTF-8 (spreadsheets call it CSV UTF-8)"
        ) from error


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        mark = file.read(2)
    return "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _undecodable(path: Path) -> int:
    """Return the number of the first line that is not UTF-8."""
    good = path.read_bytes()
    try:
        good.decode()
    except UnicodeDecodeError as error:
        good = good[: error.start]
    return len(LINE_END.split(good.decode()))


class _Lines:
    """The lines of a file; those of the current row are kept."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.begin, self.kept = file, 1, list[str]()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self.file)
        self.kept.append(line)
        return line

    def next_row(self) -> None:
        self.begin += len(self.kept)
        self.kept.clear()


def _rows(path: Path, lines: _Lines, columns: Sequence[str], known: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    first = next((line for line in lines if line.strip()), "")
    if "\0" in first:
        raise ValueError(f"{path} is not UTF-8 text; save the table as UTF-8 (spreadsheets call it CSV UTF-8)")
    delimiter = max(DELIMITERS, key=lambda sign: _fit(first, sign, columns))
    names = own_names(_cells(first, delimiter), (*columns, *known))
    check_columns(path, names, columns)
    identity = names.index(columns[0]) if columns else 0
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.next_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            place = lines.begin + _quote_line("".join(lines.kept), delimiter)
            raise ValueError(
                f"{path} line {place}: a quote opens here that does not close at the end of its value ({error}); close it there, and write "
                "a quote that belongs to the text twice"
            ) from error
        where = f"{path} line {lines.begin}"
        if len(lines.kept) > 1:
            _refuse_swallowed_rows(path, lines.begin, cells, delimiter, len(names), identity)
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) < len(names):
            raise ValueError(f"{where}: the row ends before {names[len(cells)]}{_until(lines)}")
        if any(cell.strip() for cell in cells[len(names) :]):
            raise ValueError(f"{where}: the row has more values than there are columns{_until(lines)}")
        if any(cell[:1].isspace() and cell.lstrip()[:1] == '"' for cell in cells) and _stripped(cells) != _stripped(
            next(csv.reader(lines.kept, delimiter=delimiter, skipinitialspace=True))
        ):
            raise ValueError(f"{where}: a quote follows a space and so does not begin a quoted text; delete the space")
        yield where, dict(zip(names, cells, strict=False))


def _cells(line: str, delimiter: str) -> list[str]:
    """Return the names in a head, without empty ones at its end."""
    cells = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _fit(line: str, delimiter: str, columns: Sequence[str]) -> tuple[int, int]:
    """Return how many of the columns a delimiter finds, and how many cells."""
    cells = _cells(line, delimiter)
    return len({name.casefold() for name in columns} & {cell.casefold() for cell in cells}), len(cells)


def own_names(found: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the column names in our spelling, whatever their capital letters; one without a name gets its number."""
    ours = {name.casefold(): name for name in known}
    return [ours.get(name.strip().casefold(), name.strip()) or f"column {number}" for number, name in enumerate(found, start=1)]


def check_columns(path: Path, found: list[str], columns: Sequence[str]) -> None:
    """Raise ValueError unless each column occurs, and none twice."""
    if missing := [name for name in columns if name not in found]:
        raise ValueError(f"{path} lacks the columns {missing}; it has {found}")
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise ValueError(f"{path} has the columns {twice} twice; rename or delete one of each")


def _stripped(cells: Sequence[str]) -> list[str]:
    return [cell.strip() for cell in cells]


def _until(lines: _Lines) -> str:
    return f" (it goes on to line {lines.begin + len(lines.kept) - 1}; is a quote not closed?)" if len(lines.kept) > 1 else ""


def _quote_line(text: str, delimiter: str) -> int:
    """Return how many lines of a wrong row precede the quote that does not close at the end of its value."""
    opened, closed, inside, line, before = 0, -1, False, 0, delimiter
    for place, sign in enumerate(text):
        if sign == '"' and inside:
            inside, closed = False, place
            if text[place + 1 : place + 2] not in ('"', delimiter, "\r", "\n", ""):
                break
        elif sign == '"' and closed == place - 1 >= 0:  # the second of two
            inside = True
        elif sign == '"' and before in (delimiter, "\r", "\n"):
            opened, inside = line, True
        line += sign == "\n" or (sign == "\r" and text[place + 1 : place + 2] != "\n")
        before = sign
    return opened


def _refuse_swallowed_rows(path: Path, begin: int, cells: Sequence[str], delimiter: str, columns: int, identity: int) -> None:
    """Raise ValueError where a quoted text of several lines most likely holds rows: its quote was never meant, or never closed."""
    own = LINE_END.split(cells[identity])[0].strip() if len(cells) > identity else ""
    line = begin
    for cell in cells:
        _, *further = LINE_END.split(cell)
        for number, text in enumerate(further, start=1):
            if _is_row(text.split(delimiter), own, columns, identity, whole=number < len(further)):  # the last one ends at the quote
                raise ValueError(
                    f"{path} line {line}: a quote opens here, and the text in it holds line {line + number}, which looks like a row of its own; "
                    "close the quote where the text ends, and write a quote that belongs to the text twice"
                )
        line += len(further)


def _is_row(cells: Sequence[str], own: str, columns: int, identity: int, whole: bool) -> bool:
    """Return whether cells are as many as a row's and its name resembles `own`, the name of the row that holds them."""
    if len(cells) < (columns if whole else identity + 2) or not re.fullmatch(r"\S+", name := cells[identity].strip()):
        return False
    folder, _, _ = own.rpartition("/")
    if folder and name.startswith(f"{folder}/"):
        return True
    if re.search(ENDING, own):
        return bool(re.search(ENDING, name))
    if any(cell[:1].isspace() for cell in cells):  # as after a comma of a sentence
        return False
    return re.sub(r"\d+", "0", name) == re.sub(r"\d+", "0", own) if re.search(r"\d", own) else whole


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of each line of a JSON-lines file; empty lines are counted but skipped. NaN, which Python writes, is a
    float.
    """
    with path.open(encoding=_encoding(path)) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line, object_pairs_hook=_object)
                    if not isinstance(row, dict):
                        raise ValueError(f"it must hold a JSON object, not a {type(row).__name__}")
                    yield f"{path} line {number}", row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} line {_undecodable(path)} is not UTF-8 text; save the table as UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} line {number} is not valid JSON: {error.msg} at character {error.colno}; each line must hold one object"
            ) from error
        except RecursionError as error:
            raise ValueError(
                f"{path} line {number} has lists too deep within one another; each line must hold one object of plain values"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {sorted({name for name in names if names.count(name) > 1})} twice; delete one of each")
    return row


def is_missing(text: str) -> bool:
    """Return whether a cell is empty or holds a program's missing value: nan, NaN, None, NULL, NA, ..."""
    return text.strip().casefold() in NO_VALUE


def label_value(name: str, text: str) -> int | None:
    """Return 0 or 1, or None for a cell without a value. Raises ValueError for anything else."""
    if is_missing(text):
        return None
    if text.strip() not in ("0", "1", "0.0", "1.0"):
        raise ValueError(f"{name} is {text.strip()!r} but must be 0, 1 or empty")
    return int(float(text))

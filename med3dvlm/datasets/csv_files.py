"""Tables on disk, row by row; whatever is wrong is told with the file and the line."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row after the words that say where it stands, such as "labels.csv line 3"; no row where there is no such file.

    Args:
        columns: those that have to be there, each with a value in every row; others may be there too.

    Raises:
        ValueError: a column is missing or there twice, a row is shorter or longer than the head, or the file is no UTF-8 text.
    """
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a file with a byte order mark
        reader = csv.DictReader(file)
        try:
            check_columns(path, list(reader.fieldnames or ()), columns)
            for row in reader:
                if short := [name for name, value in row.items() if value is None]:
                    raise ValueError(f"the row ends before {short[0]}")
                if None in row:
                    raise ValueError("the row has more values than there are columns")
                yield f"{path} line {reader.line_num}", row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text; save it as UTF-8 (spreadsheets call it CSV UTF-8)") from error
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num}: {error}") from error
        except ValueError as error:
            raise error if str(path) in str(error) else ValueError(f"{path} line {reader.line_num}: {error}") from error


def check_columns(path: Path, found: list[str], columns: Sequence[str]) -> None:
    """Raises ValueError unless each column is there, and none twice."""
    if missing := [name for name in columns if name not in found]:
        raise ValueError(f"{path} lacks the columns {missing}; it has {found}")
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise ValueError(f"{path} has the columns {twice} twice; rename or delete one of each")


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a file of JSON lines, likewise; empty lines count but hold none."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"{path} line {number} is no JSON object but {type(row).__name__}")
                    yield f"{path} line {number}", row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text; save it as UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is no JSON: {error}") from error


def label_value(name: str, text: str) -> int | None:
    """0 or 1, or None of an empty cell. Raises ValueError for anything else."""
    stated = text.strip()
    if stated not in ("", "0", "1", "0.0", "1.0"):
        raise ValueError(f"{name} is {stated!r} but must be 0, 1 or empty")
    return int(float(stated)) if stated else None

"""Parse the cells of a user's table (`datasets/table.py`). Errors are ValueErrors; the caller adds the place."""

import math
import re
from collections.abc import Mapping
from typing import Any

from med3dvlm.datasets.csv_files import is_missing, label_value
from med3dvlm.geometry.orientation import is_orientation
from med3dvlm.volume import HU_POLICIES, UNITS

LABEL, MASK = "label:", "mask:"
ABOUT_THE_SCAN = {
    "series": 1,
    "hu": 0,
    "rescale": 2,
    "slope": 1,
    "intercept": 1,
    "spacing": 3,
    "orientation": 0,
    "transpose": 1,
    "unit": 0,
}  # column -> how many numbers, 0 for a word
WORDS = {"hu": HU_POLICIES, "unit": UNITS}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "development"),
    "test": ("test", "testing"),
}
MAY_SAY_NONE = ("none", "na", "n/a")  # an answer, too
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of a character: files, names and tokenizers fail over them


def cell_text(name: str, value: Any) -> str:
    """Return a cell's text, stripped. In JSON it may also be null or NaN (empty), a number, or a list of choices or numbers."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if (name == "transpose" or name.startswith(LABEL)) and str(value).strip().casefold() in ("true", "false"):
        return str(int(str(value).strip().casefold() == "true"))
    if isinstance(value, list) and name in ("choices", "rescale", "spacing"):
        parts = [cell_text(name, part) if not isinstance(part, list) else "" for part in value]
        if not all(parts) or any("|" in part for part in parts):
            raise ValueError(f"{name} is {value!r} but must be a list of texts or numbers, none of them empty or with a '|' in it")
        return ("|" if name == "choices" else ",").join(parts)
    if isinstance(value, str):
        if found := NO_TEXT.search(value):
            raise ValueError(f"{name} holds the character U+{ord(found[0]):04X}, which is not part of a text; delete it")
        text = value.strip()
        if name in ("id", "patient", "split", "series"):
            if re.fullmatch(r"-?\d(\.\d+)?[eE]\+\d+", text):
                raise ValueError(f"{name} is {text!r}, which a spreadsheet has rounded; have its column hold text there")
            text = re.sub(r"(?<=\d)\.0+$", "", text) if re.fullmatch(r"-?\d+\.0+", text) else text
        return text
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 2**53)
    if isinstance(value, bool | dict | list) or name in ("report", "question"):
        raise ValueError(f"{name} is {value!r} but must be a text")
    if not whole and not (math.isfinite(value) and (name in ("answer", "choices", *ABOUT_THE_SCAN) or name.startswith(LABEL))):
        raise ValueError(f"{name} is {value!r} but must be a text or a whole number")
    return str(int(value)) if whole else repr(value)


def is_empty(name: str, text: str, row: Mapping[str, str]) -> bool:
    """Return whether a cell counts as empty. "None" is an answer in the columns of a question."""
    is_answer = name == "answer" and text.casefold() in MAY_SAY_NONE and not is_missing(row.get("question", ""))
    return is_missing(text) and not is_answer


def usual_split(text: str) -> str:
    """Return the usual name of a split, "validation" for "Val"; other names are returned unchanged."""
    return next((name for name, spellings in SPLITS.items() if text.casefold() in spellings), text)


def split_name(text: str, spelled: dict[str, str]) -> str:
    """Return the usual name of a split. Raises ValueError where two names differ in capital letters alone."""
    name = usual_split(text)
    if name not in SPLITS and spelled.setdefault(name.casefold(), name) != name:
        raise ValueError(f"split is {text!r} but other rows write {spelled[name.casefold()]!r}; write it in one way")
    return name


def scan_setting(name: str, text: str) -> Any:
    """Return the value of a column about the scan. Raises ValueError for any other value."""
    if name in WORDS:
        for word in WORDS[name]:
            if text.casefold() == word.casefold():
                return word
        raise ValueError(f"{name} is {text!r} but must be one of {', '.join(WORDS[name])}")
    if name == "orientation":
        if not is_orientation(text.upper()):
            raise ValueError(f"orientation is {text!r} but must be one letter each of L/R, A/P and I/S, as SPL")
        return text.upper()
    if name == "transpose":
        return label_value(name, text) == 1
    count = ABOUT_THE_SCAN[name]
    try:
        numbers = [float(part) for part in re.split(r"\s*[,;x]\s*|\s+", text.strip("[]() "))]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        form = {1: "a number", 2: "slope and intercept, as 1,-1024", 3: "mm between slices, rows and columns, as 2.5,0.8,0.8"}[count]
        raise ValueError(f"{name} is {text!r} but must be {form}")
    if name == "series":
        if numbers[0] < 1 or numbers[0] % 1:
            raise ValueError(f"series is {text!r} but must be the number of a series in the list that `med3dvlm inspect` shows")
        return int(numbers[0])
    if min(numbers) <= 0 and name in ("spacing", "slope"):
        raise ValueError(f"{name} is {text!r} but must be above 0")
    return numbers if count > 1 else numbers[0]

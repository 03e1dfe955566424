"""Study and Question: the one schema between data sets on disk and everything else.

A reader in `med3dvlm.datasets` turns files into these two records; nothing after it knows a column name of a published data set.
Both are written to and read from JSON lines, strictly: a missing or unknown field is an error that names the file and the line.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

QUESTION_KINDS = ("plane", "phase", "organ", "abnormality", "location")
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Study:
    """One volume with what is known about it. `labels` maps a finding's name to 0 or 1 and is empty where there are none."""

    id: str
    patient: str
    image: str
    report: str
    labels: dict[str, int]
    split: str
    source: str


@dataclass(frozen=True)
class Question:
    """One question about a study. `choices` is empty for an open question and `("Yes", "No")` for a yes/no question."""

    study: str
    kind: str
    text: str
    choices: tuple[str, ...]
    answer: str

    def __post_init__(self) -> None:
        if self.kind not in QUESTION_KINDS:
            raise ValueError(f"question kind {self.kind!r} of study {self.study} is unknown; known: {', '.join(QUESTION_KINDS)}")
        if self.choices and self.answer not in self.choices:
            raise ValueError(f"answer {self.answer!r} of study {self.study} is not among its choices {list(self.choices)}")

    @property
    def yes_no(self) -> bool:
        return self.choices == ("Yes", "No")

    @property
    def letter(self) -> str:
        """The letter of the right choice, A for the first."""
        return LETTERS[self.choices.index(self.answer)]


Record = TypeVar("Record", Study, Question)


def write_records(path: str | Path, records: Iterable[Study] | Iterable[Question]) -> None:
    """Write one JSON object a line; the file appears under its name only when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
    aside.replace(path)


def read_studies(path: str | Path) -> list[Study]:
    return _read(Path(path), Study)


def read_questions(path: str | Path) -> list[Question]:
    return _read(Path(path), Question)


def _read(path: Path, kind: type[Record]) -> list[Record]:
    known = {field.name for field in dataclasses.fields(kind)}
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            fields = json.loads(line)
            if set(fields) != known:
                missing, unknown = sorted(known - set(fields)), sorted(set(fields) - known)
                raise ValueError(
                    f"{path} line {number}: missing fields {missing}, unknown fields {unknown}; a {kind.__name__} has {sorted(known)}"
                )
            if "choices" in fields:
                fields["choices"] = tuple(fields["choices"])
            records.append(kind(**fields))
    return records

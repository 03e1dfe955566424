"""A folder of one's own -> records: scans, and one table beside them, a .csv or a .jsonl file.

    image      path of the scan below the folder: any file or folder that `read_volume` reads
    report     its text
    id         optional: a name for the study; the image's path without its ending
    patient    optional: whose scan it is; the id, so state it where patients have several scans
    split      optional: train, validation, test or what you like; without it, patients are dealt out 80/10/10 (see `dealt`)
    question, answer, choices, kind
               optional: a question about the scan, its answer, for a closed one the choices ("Yes|No"; in .jsonl also a list),
               and one of plane, phase, organ, abnormality, location, other
    label:<finding>
               optional, as many as there are: 0, 1, or empty where nobody looked

Any other column is an error. A scan with several questions has several rows; what a later row leaves empty is as in the first. In
ten lines, with scans in the folder "mine":

    from pathlib import Path
    from med3dvlm.datasets import table

    Path("mine/table.csv").write_text('''image,report,patient,split,question,answer,choices,label:effusion
    a.nii.gz,"Right pleural effusion.",p1,train,Is there an effusion?,Yes,Yes|No,1
    a.nii.gz,,,,Where is the effusion?,Right,Right|Left|Both sides|Nowhere,
    b.nii.gz,Normal chest.,p2,test,Is there an effusion?,No,Yes|No,0
    ''')
    studies, questions = table.read("mine", "train")
    print(studies[0].report, [question.answer for question in questions])  # Right pleural effusion. ['Yes', 'Right']

From there, `med3dvlm prepare table mine prepared`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from med3dvlm.datasets.csv_files import check_columns, csv_rows, json_rows, label_value
from med3dvlm.records import Question, Study, check_ids, check_inside
from med3dvlm.volume import READERS

NEEDED = ("image", "report")
ABOUT_THE_STUDY = ("report", "id", "patient", "split")
ABOUT_A_QUESTION = ("question", "answer", "choices", "kind")
LABEL = "label:"
SHARES = {"train": 80, "validation": 10, "test": 10}


def splits(root: str | Path) -> list[str]:
    """The splits that the table names, or into which it is dealt out. Raises FileNotFoundError or ValueError where it is missing or wrong."""
    return list(dict.fromkeys(study.split for study in _read(Path(root))[0]))


def read(root: str | Path, split: str, failures: list[dict[str, str]] | None = None) -> tuple[list[Study], list[Question]]:
    """One split's studies and the questions about them.

    Args:
        failures: takes {"study", "file", "reason"} of every study without a report; without it that is an error.

    Raises:
        FileNotFoundError, ValueError: there is no table, or a column or row is wrong; the message says where.
    """
    studies, questions, places = _read(Path(root))
    if split not in (known := list(dict.fromkeys(study.split for study in studies))):
        raise ValueError(f"{table_of(Path(root))} has no split {split!r}; it has: {', '.join(known)}")
    chosen = [study for study in studies if study.split == split]
    for study in chosen:
        if not study.report:
            reason = f"{places[study.id]}: the report of {study.image} is empty"
            if failures is None:
                raise ValueError(reason)
            failures.append({"study": study.id, "file": study.image, "reason": reason})
    kept = {study.id: study for study in chosen if study.report}
    return list(kept.values()), [question for question in questions if question.study in kept]


def table_of(root: Path) -> Path:
    """The table in the folder: the only .csv or .jsonl file there, or the one named table. Raises FileNotFoundError or ValueError."""
    found = sorted(path for path in root.glob("*") if path.suffix in (".csv", ".jsonl"))
    named = [path for path in found if path.stem == "table"]
    if not found:
        raise FileNotFoundError(f"{root} has no table; put one there, say table.csv with the columns image and report")
    if len(found) > 1 and len(named) != 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{root} has several tables ({names}); name the one that describes the scans table.csv or table.jsonl")
    return named[0] if named else found[0]


def dealt(patient: str) -> str:
    """The split of a patient where the table names none: by the SHA-256 of the name, 80 % train, 10 % validation, 10 % test.

    It depends on the name alone, so that a patient stays where they are when others come.
    """
    place = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") % 100
    return "train" if place < SHARES["train"] else "validation" if place < SHARES["train"] + SHARES["validation"] else "test"


def _read(root: Path) -> tuple[list[Study], list[Question], dict[str, str]]:
    """All studies and questions, and where each study is first mentioned."""
    path = table_of(root)
    known: dict[str, dict[str, Any]] = {}  # image -> what its rows say
    asked: list[tuple[str, str, dict[str, str]]] = []
    has_splits = False
    for where, row in _rows(path):
        try:
            image = row["image"]
            check_inside(image, "image")
            labels = {name: label_value(name, text) for name, text in row.items() if name.startswith(LABEL)}
            said = {name: row.get(name, "") for name in ABOUT_THE_STUDY} | {
                name: value for name, value in labels.items() if value is not None
            }
            before = known.setdefault(image, {"where": where})
            for name, value in said.items():
                if value != "" and before.setdefault(name, value) != value:
                    raise ValueError(f"{name} is {value!r} but {before['where']} says {before[name]!r} of the same image")
            if any(row.get(name) for name in ABOUT_A_QUESTION):
                asked.append((where, image, row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        has_splits |= "split" in row
    if not known:
        raise ValueError(f"{path} has no rows")
    studies = {image: _study(image, facts, has_splits) for image, facts in known.items()}
    try:
        check_ids(studies.values())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    questions = [_question(where, studies[image].id, row) for where, image, row in asked]
    return list(studies.values()), questions, {study.id: known[image]["where"] for image, study in studies.items()}


def _study(image: str, facts: Mapping[str, Any], has_splits: bool) -> Study:
    ending = next((ending for ending in READERS if image.lower().endswith(ending)), "")
    name = facts.get("id") or image[: -len(ending) or None]
    patient = facts.get("patient") or name
    split = facts.get("split") if has_splits else dealt(patient)
    if not split:
        raise ValueError(f"{facts['where']}: split is empty; name one, or delete the column to have patients dealt out")
    labels = {column.removeprefix(LABEL): value for column, value in facts.items() if column.startswith(LABEL)}
    try:
        return Study(name, patient, image, facts.get("report", ""), labels, split, "table")
    except ValueError as error:
        raise ValueError(f"{facts['where']}: {error}") from error


def _question(where: str, study: str, row: Mapping[str, str]) -> Question:
    if missing := [name for name in ("question", "answer") if not row.get(name)]:
        raise ValueError(f"{where}: {missing[0]} is empty but other columns of a question are not")
    choices = tuple(choice.strip() for choice in row.get("choices", "").split("|")) if row.get("choices") else ()
    try:
        return Question(study, row.get("kind") or "other", row["question"], choices, row["answer"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row as texts without white space around them, with columns that are known."""
    for where, row in csv_rows(path, NEEDED) if path.suffix == ".csv" else json_rows(path):
        _check(path if path.suffix == ".csv" else Path(where), list(row))
        yield where, {name: _text(where, name, value) for name, value in row.items()}


def _check(place: Path, columns: list[str]) -> None:
    check_columns(place, columns, NEEDED)
    allowed = ("image", *ABOUT_THE_STUDY, *ABOUT_A_QUESTION)
    if unknown := [name for name in columns if name not in allowed and not (name.startswith(LABEL) and name != LABEL)]:
        raise ValueError(
            f"{place} has the unknown columns {unknown}; known are {', '.join(allowed)}, and {LABEL}<finding> for a column of 0 and 1"
        )


def _text(where: str, name: str, value: Any) -> str:
    """A cell; in JSON also null, a number, and a list of choices."""
    if value is None:
        return ""
    if name == "choices" and isinstance(value, list) and all(isinstance(choice, str) and "|" not in choice for choice in value):
        return "|".join(value)
    if isinstance(value, bool | dict | list):
        raise ValueError(f"{where}: {name} is {value!r} but must be a text or a number")
    return str(value).strip()

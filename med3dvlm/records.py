"""Study and Question: the one schema between data sets on disk and everything else.

A reader in `med3dvlm.datasets` turns files into these two records; nothing after it knows a column name of a published data set.
Both are written to and read from JSON lines, strictly: a missing or unknown field is an error that names the file and the line. A study
without masks has no such field, as manifests had none when there were no masks.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from med3dvlm.files import read_lines

QUESTION_KINDS = ("plane", "phase", "organ", "abnormality", "location")  # M3D-VQA's types 1 to 5
ALL_KINDS = (*QUESTION_KINDS, "other")  # a question of one's own may be none of those
LETTERS = "ABCDEFGH"
MASK_KINDS = ("finding", "structure")
SIDES = ("left", "right", "both", "midline", "")  # the patient's; empty where nobody said it


def check_inside(path: str, name: str) -> None:
    """Raise ValueError unless the path stays inside the folder that it is relative to."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise ValueError(f"{name} is {path!r}, but it must be a path relative to the data's folder, without '..'")


@dataclass(frozen=True)
class Mask:
    """The mask of a finding or a structure in a scan, and its description.

    `file` is a path relative to the root of the data set. Of a file with several masks `channel` is this one's number, from 0; of one with
    several labels `value` is this one's. Without a value the file holds 0 and one other number.
    `organ` and `place` are words such as "lung" and "right upper lobe", `text` is the sentence of the report about it; each may be empty.
    """

    file: str
    channel: int | None = None
    value: int | None = None
    kind: str = "finding"
    organ: str = ""
    side: str = ""
    place: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        check_inside(self.file, "file of a mask")
        for name, known in (("kind", MASK_KINDS), ("side", SIDES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} of the mask in {self.file} is {getattr(self, name)!r} but must be one of {', '.join(map(repr, known))}"
                )
        if self.value == 0 or (self.channel is not None and self.channel < 0):
            raise ValueError(
                f"the mask in {self.file} has value {self.value} and channel {self.channel}; a label is not 0, channels count from 0"
            )


@dataclass(frozen=True)
class Study:
    """One volume with what is known about it. `labels` maps a finding's name to 0 or 1; what nobody looked for is not in it.

    `id` and `image` are relative paths: `image` below the root of the data set, `id` below the folder of prepared volumes.
    `reading` holds what the data set knows of the scan and its file does not say: keyword arguments of `read_volume`, as JSON values.
    `masks` maps names of findings and structures, in words such as "lung nodule", to where they lie.
    """

    id: str
    patient: str
    image: str
    report: str
    labels: dict[str, int]
    split: str
    source: str
    reading: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Mask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("id", "image"):
            check_inside(getattr(self, name), f"{name} of study {self.id!r}")


@dataclass(frozen=True)
class Question:
    """One question about a study. `choices` is empty for an open question and `("Yes", "No")` for a yes/no question."""

    study: str
    kind: str
    text: str
    choices: tuple[str, ...]
    answer: str

    def __post_init__(self) -> None:
        if self.kind not in ALL_KINDS:
            raise ValueError(f"question kind {self.kind!r} of study {self.study} is unknown; known: {', '.join(ALL_KINDS)}")
        if self.choices and self.answer not in self.choices:
            raise ValueError(f"answer {self.answer!r} of study {self.study} is not among its choices {list(self.choices)}")

    @property
    def yes_no(self) -> bool:
        return self.choices == ("Yes", "No")

    @property
    def lettered(self) -> bool:
        return has_letters(self.choices)

    @property
    def letter(self) -> str:
        """Return the letter of the right choice, A for the first; only a lettered question has one."""
        return LETTERS[self.choices.index(self.answer)]


Failure = dict[str, str]  # "study", "file" and "reason" of a study that could not be read


@dataclass(frozen=True)
class Records:
    """What the reader of a data set gives: studies, the questions about them, and the studies that could not be read."""

    studies: Sequence[Study]
    questions: Sequence[Question] = ()
    failures: Sequence[Failure] = ()


def has_letters(choices: Sequence[str]) -> bool:
    """Return whether there are choices and a letter for each of them."""
    return 0 < len(choices) <= len(LETTERS)


def check_ids(studies: Iterable[Study]) -> None:
    """Raise ValueError where two studies have one id."""
    seen: set[PurePosixPath] = set()
    for study in studies:
        place = PurePosixPath(study.id)
        if place in seen:
            raise ValueError(f"two studies have the id {study.id!r}; give each its own")
        seen.add(place)


Record = TypeVar("Record", Study, Question)


def fields_of(record: Study | Question) -> dict[str, Any]:
    """Return a record as a JSON object."""
    fields = dataclasses.asdict(record)
    if not fields.get("masks", True):
        del fields["masks"]
    return fields


def read_studies(path: str | Path) -> list[Study]:
    return _read(Path(path), Study)


def read_questions(path: str | Path) -> list[Question]:
    return _read(Path(path), Question)


def _read(path: Path, kind: type[Record]) -> list[Record]:
    records = []
    for number, fields in enumerate(read_lines(path), start=1):
        where = f"{path} line {number}"
        _check_fields(where, fields, kind, optional=("masks",))
        if "choices" in fields:
            fields["choices"] = tuple(fields["choices"])
        try:
            if "masks" in fields:
                fields["masks"] = {name: _mask(f"mask {name!r}", found) for name, found in fields["masks"].items()}
            records.append(kind(**fields))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return records


def _mask(where: str, fields: Mapping[str, Any]) -> Mask:
    _check_fields(where, fields, Mask)
    return Mask(**fields)


def _check_fields(where: str, fields: Mapping[str, Any], kind: type[Any], optional: Sequence[str] = ()) -> None:
    known = {field.name for field in dataclasses.fields(kind)}
    missing, unknown = sorted(known - set(fields) - set(optional)), sorted(set(fields) - known)
    if missing or unknown:
        raise ValueError(f"{where}: missing fields {missing}, unknown fields {unknown}; a {kind.__name__} has {sorted(known)}")


def nested_splits(splits: Mapping[str, Sequence[Study]]) -> dict[str, dict[str, list[str]]]:
    """Return the splits whose studies all lie in another one too, as M3D's "test1k" in "test"; of equal ones the first counts as the whole.

    A study belongs to one split, so such parts are not prepared again; each gets what a split file holds, {split: [study ids]}, in
    which it stands in the place of its whole.
    """
    ids = {split: dict.fromkeys((study.id, study.image) for study in studies) for split, studies in splits.items()}
    wholes: list[str] = []
    found: dict[str, str] = {}
    for split in sorted(splits, key=lambda split: -len(ids[split])):
        whole = next((whole for whole in wholes if ids[split] and ids[split].keys() <= ids[whole].keys()), None)
        if whole is None:
            wholes.append(split)
        else:
            found[split] = whole
    return {
        part: {(part if split == whole else split): [name for name, _ in ids[part if split == whole else split]] for split in wholes}
        for part, whole in found.items()
    }

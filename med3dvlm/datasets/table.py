"""Read your own folder: scans, and one table beside them, a .csv or a .jsonl file.

    image      path of the scan below the folder: any file or folder that `read_volume` reads
    report     its text
    id         optional: a name for the study; the image's path without its ending
    patient    optional: whose scan it is; the id, so state it where patients have several scans
    split      optional: train, validation, test or what you like; without it, patients are divided 80/10/10 (see `default_split`)
    question, answer, choices, kind
               optional: a question about the scan, its answer, for a closed one the choices ("Yes|No"; in .jsonl also a list),
               and one of plane, phase, organ, abnormality, location, other
    label:<finding>
               optional, as many as there are: 0, 1, or empty where nobody looked
    mask:<name>
               optional, as many as there are: the file of its mask below the folder, "file#2" for label 2 of several in it, or empty
    masks      optional: a folder of masks below the folder, a file for each, named by it; lung_nodule.nii.gz is "lung nodule"
    series, hu, rescale (or slope, intercept), spacing, orientation, transpose, unit
               optional: what `read_volume` is given about the scan, as by the options of `inspect`; several numbers as "1,-1024" (in .jsonl
               also a list); transpose is 1 or 0

Any other column is an error; capital letters in their names do not matter. A scan with several questions has several rows; what a later
row leaves empty is as in the first. Cells of nan, None, NULL, NA are empty (an answer may be "None" or "NA"), and 2.0 is 2. In ten lines,
with scans in the folder "mine":

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
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from med3dvlm.datasets.cells import ABOUT_THE_SCAN, LABEL, MASK, cell_text, is_empty, scan_setting, split_name
from med3dvlm.datasets.csv_files import check_columns, csv_rows, json_rows, label_value, own_names
from med3dvlm.datasets.m3d_seg import side_in
from med3dvlm.records import Mask, Question, Study, check_ids, check_inside
from med3dvlm.volume import READERS

logger = logging.getLogger(__name__)

NEEDED = ("image", "report")
ABOUT_THE_STUDY = ("report", "id", "patient", "split", "masks")
ABOUT_A_QUESTION = ("question", "answer", "choices", "kind")
COLUMNS = ("image", *ABOUT_THE_STUDY, *ABOUT_A_QUESTION, *ABOUT_THE_SCAN)
ENDINGS = (".csv", ".tsv", ".jsonl")
SHARES = {"train": 80, "validation": 10, "test": 10}
# Special tokens of language models. Their text is read as words; most often it was left in by mistake.
TOKEN = re.compile(
    r"<\|[^<>|\s]+\|>|</?(?:s|image|img|video|pad|unk|mask|bos|eos|cls|sep|im_\w+|image_\w+|(?:start|end)_of_\w+)>"
    r"|\[/?(?:CLS|SEP|PAD|UNK|MASK|BOS|EOS|INST|IMG)\]|<</?SYS>>"
)
SHOWN = 10


def splits(root: str | Path) -> list[str]:
    """Return the splits that the table names, or into which it is divided. Raises FileNotFoundError or ValueError where it is missing or
    wrong.
    """
    return list(dict.fromkeys(study.split for study in _read(Path(root))[0]))


def read(root: str | Path, split: str, failures: list[dict[str, str]] | None = None) -> tuple[list[Study], list[Question]]:
    """Return one split's studies and the questions about them.

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
    """Return the table in the folder: the only .csv or .jsonl there, or the one named table. Raises FileNotFoundError or ValueError."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; name the one that holds the scans and the table")
    found = sorted(path for path in root.iterdir() if path.suffix.lower() in ENDINGS and not path.name.startswith("."))
    named = [path for path in found if path.stem.lower() == "table"]
    if not found:
        raise FileNotFoundError(
            f"{root} has no table ({', '.join(ENDINGS)}); put one there, say table.csv with the columns image and report"
        )
    if len(found) > 1 and len(named) != 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{root} has several tables ({names}); name the one that describes the scans table.csv or table.jsonl")
    return named[0] if named else found[0]


def default_split(patient: str) -> str:
    """Return the split of a patient where the table names none: by the SHA-256 of the name, 80 % train, 10 % validation, 10 % test.

    It depends on the name alone, so that a patient stays where they are when others come.
    """
    place = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") % 100
    return "train" if place < SHARES["train"] else "validation" if place < SHARES["train"] + SHARES["validation"] else "test"


def _read(root: Path) -> tuple[list[Study], list[Question], dict[str, str]]:
    """Return all studies and questions, and where each study is first mentioned."""
    path = table_of(root)
    state = path.stat()
    return _parsed(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)  # each split asks for it
def _parsed(path: Path, changed: int, size: int) -> tuple[list[Study], list[Question], dict[str, str]]:
    known: dict[str, dict[str, Any]] = {}  # image -> what its rows say
    asked: list[tuple[str, str, dict[str, str]]] = []
    spelled: dict[str, str] = {}  # splits
    doubts = _Doubts(path)
    has_splits = False
    for where, cells in _rows(path):
        try:
            row = {name: cell_text(name, value) for name, value in cells.items()}
            doubts.look(where, row)
            row = {name: "" if is_empty(name, text, row) else text for name, text in row.items()}
            image = row["image"]
            if not image:
                raise ValueError("image is empty; name the scan's file or folder")
            check_inside(image, "image")
            labels = {name: label_value(name, text) for name, text in row.items() if name.startswith(LABEL)}
            facts: dict[str, Any] = {
                name: text for name, text in row.items() if text and (name in ABOUT_THE_STUDY or name.startswith(MASK))
            }
            if "split" in facts:
                facts["split"] = split_name(facts["split"], spelled)
            facts |= {name: value for name, value in labels.items() if value is not None}
            facts |= {name: scan_setting(name, row[name]) for name in ABOUT_THE_SCAN if row.get(name)}
            before = known.setdefault(image, {"where": where})
            for name, value in facts.items():
                if before.setdefault(name, value) != value:
                    raise ValueError(
                        f"{name} is {value!r} but {before['where']} states {before[name]!r} of the same image; state one of them"
                    )
            if any(row.get(name) for name in ABOUT_A_QUESTION):
                asked.append((where, image, row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        has_splits |= "split" in row
    if not known:
        raise ValueError(f"{path} has no rows")
    doubts.tell()
    studies = {image: _study(path.parent, image, facts, has_splits) for image, facts in known.items()}
    try:
        check_ids(studies.values())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    questions = [_question(where, studies[image].id, row) for where, image, row in asked]
    return list(studies.values()), questions, {study.id: known[image]["where"] for image, study in studies.items()}


def _study(root: Path, image: str, facts: Mapping[str, Any], has_splits: bool) -> Study:
    ending = next((ending for ending in READERS if image.lower().endswith(ending)), "")
    name = facts.get("id") or image[: -len(ending) or None]
    patient = facts.get("patient") or name
    split = facts.get("split") if has_splits else default_split(patient)
    if not split:
        raise ValueError(f"{facts['where']}: split is empty; name one, or delete the column to have patients divided into splits")
    labels = {column.removeprefix(LABEL): value for column, value in facts.items() if column.startswith(LABEL)}
    try:
        return Study(name, patient, image, facts.get("report", ""), labels, split, "table", _reading(facts), _masks(root, facts))
    except ValueError as error:
        raise ValueError(f"{facts['where']}: {error}") from error


def _masks(root: Path, facts: Mapping[str, Any]) -> dict[str, Mask]:
    masks = {}
    if folder := facts.get("masks"):
        check_inside(folder, "masks")
        files = [file for file in sorted((root / folder).glob("*")) if file.is_file() and not file.name.startswith(".")]
        if not files:
            raise ValueError(f"masks is {folder!r} but {root / folder} is not a folder with files in it")
        for file in files:
            ending = next((ending for ending in READERS if file.name.lower().endswith(ending)), file.suffix)
            name = file.name[: -len(ending) or None].replace("_", " ")
            masks[name] = Mask(file.relative_to(root).as_posix(), side=side_in(name))
    for column, text in facts.items():
        if column.startswith(MASK):
            name = column.removeprefix(MASK)
            path, mark, value = text.rpartition("#")
            if mark and not re.fullmatch(r"[1-9]\d*", value):
                raise ValueError(f"{column} is {text!r} but must be a file, or file#label with a whole number above 0")
            masks[name] = Mask(path if mark else text, value=int(value) if mark else None, side=side_in(name))
    return masks


def _reading(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `read_volume`."""
    reading = {name: facts[name] for name in ("series", "hu", "rescale", "spacing", "orientation", "transpose", "unit") if name in facts}
    pair = [facts[name] for name in ("slope", "intercept") if name in facts]
    if len(pair) == 1:
        raise ValueError("of slope and intercept one is empty; state both or neither")
    if pair and reading.setdefault("rescale", pair) != pair:
        raise ValueError(f"rescale is {reading['rescale']} but slope and intercept are {pair}; state them once")
    return reading


def _question(where: str, study: str, row: Mapping[str, str]) -> Question:
    if missing := [name for name in ("question", "answer") if not row.get(name)]:
        raise ValueError(f"{where}: {missing[0]} is empty but other columns of a question are not")
    choices = tuple(choice.strip() for choice in row.get("choices", "").split("|")) if row.get("choices") else ()
    try:
        return Question(study, row.get("kind") or "other", row["question"], choices, row["answer"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with known columns, in our spelling."""
    in_json = path.suffix.lower() == ".jsonl"
    for where, row in json_rows(path) if in_json else csv_rows(path, NEEDED, COLUMNS):
        names = [re.sub(rf"(?i)^({LABEL}|{MASK})\s*", lambda found: found[1].lower(), name) for name in own_names(list(row), COLUMNS)]
        _check(Path(where) if in_json else path, names)
        yield where, dict(zip(names, row.values(), strict=True))


def _check(place: Path, columns: list[str]) -> None:
    check_columns(place, columns, NEEDED)
    if unknown := [name for name in columns if name not in COLUMNS and not (name.startswith((LABEL, MASK)) and name not in (LABEL, MASK))]:
        raise ValueError(
            f"{place} has the unknown columns {unknown}; known are {', '.join(COLUMNS)}, {LABEL}<finding> for a column of 0 and 1, and "
            f"{MASK}<name> for one of mask files"
        )


class _Doubts:
    """Counts what is most likely a mistake in a table, to warn once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens: list[str] = []
        self.missing: dict[tuple[str, str], list[str]] = defaultdict(list)

    def look(self, where: str, row: Mapping[str, str]) -> None:
        line = where.rpartition(" ")[2]
        for name, text in row.items():
            if name in ("report", "question", "answer", "choices") and (found := TOKEN.search(text)):
                self.tokens.append(f"line {line}, {name}: {found[0]}")
            elif text and is_empty(name, text, row):
                self.missing[name, text].append(line)

    def tell(self) -> None:
        if self.tokens:
            more = f"; and {len(self.tokens) - SHOWN} more" if len(self.tokens) > SHOWN else ""
            logger.warning(
                "%s: the text of a special token stands in %d cells (%s%s). Models read it as words; delete it if it was left in by mistake.",
                self.path, len(self.tokens), "; ".join(self.tokens[:SHOWN]), more,
            )  # fmt: skip
        for (name, text), lines in self.missing.items():
            logger.warning(
                "%s: %s is %r in %d rows, the first in line %s; it counts as empty.", self.path, name, text, len(lines), lines[0]
            )

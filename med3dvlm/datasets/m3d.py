"""M3D-Cap and M3D-VQA on disk <-> records.

    M3D_Cap/M3D_Cap.json              {"train": [{"image": path, "text": path}, ...], "validation": [...], "test": [...]}
    M3D_Cap/ct_case/<case>/...        volumes (prepared .nii.gz) and reports (.txt)
    M3D_VQA/M3D_VQA_<split>.csv       open and closed questions: one row serves as both
    M3D_VQA/M3D_VQA_yn_<split>.csv    yes/no questions
    labels.csv                        optional, ours: study and one column of 0/1 a finding

Paths in the files are relative to the root. Source: M3D (arXiv 2404.00578), section 3 and the published files.
"""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from med3dvlm.records import LETTERS, QUESTION_KINDS, Question, Study

SPLITS = ("train", "validation", "test")
CSV_SPLIT = {"train": "train", "validation": "val", "test": "test"}
COLUMNS = ("Image Path", "Text", "Question Type", "Question", "Choice A", "Choice B", "Choice C", "Choice D", "Answer", "Answer Choice")
YES_NO_COLUMNS = ("Image Path", "Text", "Question Type", "Question", "Answer")


def read(root: str | Path, split: str) -> tuple[list[Study], list[Question]]:
    """One split's studies and the questions about them (none where the VQA files are absent)."""
    root = Path(root)
    listing = root / "M3D_Cap" / "M3D_Cap.json"
    if not listing.is_file():
        raise FileNotFoundError(f"{listing} is missing; an M3D root holds M3D_Cap/M3D_Cap.json and M3D_VQA/*.csv")
    splits = json.loads(listing.read_text(encoding="utf-8"))
    if split not in splits:
        raise ValueError(f"{listing} has no split {split!r}; it has: {', '.join(splits)}")
    labels = _read_labels(root / "labels.csv")
    studies = []
    for entry in splits[split]:
        name = _study_id(entry["image"])
        text = root / entry["text"]
        if not text.is_file():
            raise FileNotFoundError(f"{text}, the report of {entry['image']} by {listing}, is missing")
        report = report_text(text.read_text(encoding="utf-8"))
        studies.append(Study(name, PurePosixPath(name).parent.name, entry["image"], report, labels.get(name, {}), split, "m3d"))
    known = {study.id for study in studies}
    questions = [question for question in _read_questions(root / "M3D_VQA", split) if question.study in known]
    return studies, questions


def report_text(text: str) -> str:
    """What follows "study_findings:", else "discussion:", else the whole text; white space folded."""
    for heading in ("study_findings:", "discussion:"):
        _, found, rest = text.partition(heading)
        if found:
            text = rest
            break
    return re.sub(r"\s+", " ", text).strip()


def _study_id(image: str) -> str:
    """`M3D_Cap/ct_case/000006/Axial_C.nii.gz` -> `ct_case/000006/Axial_C`, whichever extension the path carries."""
    path = PurePosixPath(image)
    parts = path.parts[1:] if path.parts[0] == "M3D_Cap" else path.parts
    return str(PurePosixPath(*parts[:-1], re.sub(r"(\.nii\.gz|\.nii|\.npy)$", "", parts[-1])))


def _read_labels(path: Path) -> dict[str, dict[str, int]]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row.pop("study"): {name: int(value) for name, value in row.items()} for row in csv.DictReader(file)}


def _read_questions(folder: Path, split: str) -> Iterable[Question]:
    name = CSV_SPLIT.get(split, split)
    for row in _rows(folder / f"M3D_VQA_{name}.csv", COLUMNS):
        choices = tuple(row[f"Choice {letter}"] for letter in LETTERS[:4])
        yield Question(_study_id(row["Image Path"]), _kind(row), row["Question"], choices, row["Answer"])
    for row in _rows(folder / f"M3D_VQA_yn_{name}.csv", YES_NO_COLUMNS):
        yield Question(_study_id(row["Image Path"]), _kind(row), row["Question"], ("Yes", "No"), row["Answer"].capitalize())


def _kind(row: dict[str, str]) -> str:
    """Question types are the numbers 1 to 5: plane, phase, organ, abnormality, location."""
    return QUESTION_KINDS[int(row["Question Type"]) - 1]


def _rows(path: Path, columns: Sequence[str]) -> Iterable[dict[str, str]]:
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} lacks the columns {missing}; it has {reader.fieldnames}")
        yield from reader


def write(root: str | Path, studies: Sequence[Study], questions: Sequence[Question]) -> None:
    """Write reports, questions and labels in this layout; the volumes are the caller's.

    A study's id must be its image path without `M3D_Cap/` and the extension.
    """
    root = Path(root)
    listing: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    texts = {}
    for study in studies:
        text = f"M3D_Cap/{study.id}.txt"
        texts[study.id] = (study, text)
        (root / text).parent.mkdir(parents=True, exist_ok=True)
        (root / text).write_text(f"study_findings: {study.report}\n", encoding="utf-8")
        listing[study.split].append({"image": study.image, "text": text})
    (root / "M3D_VQA").mkdir(parents=True, exist_ok=True)
    for split, name in CSV_SPLIT.items():
        closed = [question for question in questions if texts[question.study][0].split == split and not question.yes_no]
        yes_no = [question for question in questions if texts[question.study][0].split == split and question.yes_no]
        with (root / "M3D_VQA" / f"M3D_VQA_{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for question in closed:
                study, text = texts[question.study]
                kind = QUESTION_KINDS.index(question.kind) + 1
                writer.writerow([study.image, text, kind, question.text, *question.choices, question.answer, question.letter])
        with (root / "M3D_VQA" / f"M3D_VQA_yn_{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(YES_NO_COLUMNS)
            for question in yes_no:
                study, text = texts[question.study]
                writer.writerow([study.image, text, QUESTION_KINDS.index(question.kind) + 1, question.text, question.answer])
    names = sorted({name for study in studies for name in study.labels})
    with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["study", *names])
        writer.writerows([study.id, *(study.labels[name] for name in names)] for study in studies)
    aside = root / "M3D_Cap" / "M3D_Cap.json.part"  # last: its presence says that the rest is whole
    aside.write_text(json.dumps(listing, indent=1), encoding="utf-8")
    aside.replace(root / "M3D_Cap" / "M3D_Cap.json")

"""M3D-Cap and M3D-VQA on disk <-> records.

    M3D_Cap/M3D_Cap.json              {"train": [{"image": path, "text": path}, ...], "validation": [...], "test": [...], perhaps
                                      more, such as "test1k"}; ours beside them: "id" and "patient", where they do not follow from
                                      the image's path
    M3D_Cap/ct_case/<case>/...        reports (text.txt) and a series each as released, a folder of numbered pictures, or prepared:
                                      a volume .npy or .nii.gz under that name
    M3D_VQA/M3D_VQA_<split>.csv       open and closed questions: one row serves as both
    M3D_VQA/M3D_VQA_yn_<split>.csv    yes/no questions
    labels.csv                        optional, ours: study and one column a finding: 0, 1, or empty where nobody looked
    M3D_Seg/...                       optional: masks of these images, see `m3d_seg`

Paths in the files are relative to the root and differ between releases (M3D_Cap, M3D_Cap_npy, M3D_Cap_nii; .npy, .nii.gz): an
image is found under any of these folders and endings, and a question belongs to the study whose path it names but for them.
Where all of a split is in another one too, as "test1k" in "test", `med3dvlm prepare` prepares the whole and writes split_test1k.json
for --split-file; questions are then those of the whole. Splits that share a part of their images only are refused.
Source: M3D (arXiv 2404.00578), section 3 and the published files.
"""

import csv
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from med3dvlm.datasets import m3d_seg
from med3dvlm.datasets.csv_files import csv_rows, is_missing, label_value
from med3dvlm.files import write_json
from med3dvlm.records import LETTERS, QUESTION_KINDS, Question, Study, check_ids, check_inside
from med3dvlm.volume import READERS

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")  # those that `write` writes
CSV_SPLIT = {"train": "train", "validation": "val", "test": "test"}
COLUMNS = ("Image Path", "Text", "Question Type", "Question", "Choice A", "Choice B", "Choice C", "Choice D", "Answer", "Answer Choice")
YES_NO_COLUMNS = ("Image Path", "Text", "Question Type", "Question", "Answer")


def splits(root: str | Path) -> list[str]:
    """Return the splits that M3D_Cap.json lists. Raises FileNotFoundError or ValueError where it is missing or none."""
    return list(_listing(Path(root))[1])


def read(root: str | Path, split: str, failures: list[dict[str, str]] | None = None) -> tuple[list[Study], list[Question]]:
    """Return one split's studies and the questions about them (none where the VQA files are absent).

    Args:
        failures: takes {"study", "file", "reason"} of every study whose report is missing or empty; without it that is an error.

    Raises:
        FileNotFoundError, ValueError: a file or a row is missing or wrong; the message says where.
    """
    root = Path(root)
    listing, entries = _listing(root)
    if split not in entries:
        raise ValueError(f"{listing} has no split {split!r}; it has: {', '.join(entries)}")
    tops = [folder.name for folder in sorted(root.glob("M3D_Cap*")) if folder.is_dir()]
    labels = _read_labels(root / "labels.csv")
    masks = {entry.image: entry.masks for entry in m3d_seg.entries(root)}
    studies: list[Study] = []
    ids: dict[str, str] = {}  # image path, with and without ending -> study
    for number, entry in enumerate(entries[split], start=1):
        where = f"{listing}, entry {number} of {split!r}"
        if not isinstance(entry, dict):
            raise ValueError(f'{where} must be {{"image": path, "text": path}} but is a {type(entry).__name__}')
        if missing := [name for name in ("image", "text") if not isinstance(entry.get(name), str)]:
            raise ValueError(f"{where} lacks {' and '.join(missing)}")
        if wrong := [name for name in ("id", "patient") if not isinstance(entry.get(name, ""), str)]:
            raise ValueError(f"{where}: {' and '.join(wrong)} must be a text")
        image, text = entry["image"], entry["text"]
        try:
            for name, path in (("image", image), ("text", text)):
                check_inside(path, name)
            place = _study_id(image)
            name, patient = entry.get("id", place), entry.get("patient", _patient(place))
            there = _found(root, tops, image, ("", *READERS))
            study = Study(name, patient, there, "", labels.get(name, {}), split, "m3d", masks=masks.get(there, {}))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        ids.setdefault(place, name)
        ids[image] = name
        try:
            place_of_text = root / _found(root, tops, text, (".txt",))
            report = _read_report(place_of_text, f"{place_of_text}, the report of {image} by {listing},")
        except (OSError, ValueError) as error:
            if failures is None:
                raise
            failures.append({"study": name, "file": text, "reason": str(error)})
        else:
            studies.append(replace(study, report=report))
    known = {study.id for study in studies}
    questions = [
        question
        for kind, columns in (("", COLUMNS), ("yn_", YES_NO_COLUMNS))
        for question in _read_questions(_questions_file(root / "M3D_VQA", kind, split), columns, ids)
        if question.study in known
    ]
    return studies, questions


def _listing(root: Path) -> tuple[Path, dict[str, list[dict[str, str]]]]:
    """Find M3D_Cap.json and return its path and content."""
    places = [root / "M3D_Cap" / "M3D_Cap.json", *sorted(root.glob("M3D_Cap*/M3D_Cap.json"))]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{places[0]} is missing; an M3D root holds M3D_Cap/M3D_Cap.json and M3D_VQA/*.csv")
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(listed, list) for listed in entries.values()):
        raise ValueError(f'{path} must be {{"train": [{{"image": path, "text": path}}, ...], ...}} but is something else')
    return path, entries


def _found(root: Path, tops: Sequence[str], path: str, endings: Sequence[str]) -> str:
    """Return the path of a file or folder: as stated, else in a sister folder or with another ending, else as stated."""
    place, top = _study_id(path).removesuffix(".txt"), PurePosixPath(path).parts[0]
    if (root / path).exists():
        return path
    candidates = (f"{folder}/{place}{ending}" for folder in dict.fromkeys([top, *tops]) for ending in endings)
    return next((candidate for candidate in candidates if (root / candidate).exists()), path)


def _questions_file(folder: Path, kind: str, split: str) -> Path:
    """Return the file of a split's questions: its own; for a part such as "test1k" else the whole's; for "test" else that of a part."""
    whole = re.sub(r"\d+k$", "", split)
    own, other = (folder / f"M3D_VQA_{kind}{CSV_SPLIT.get(name, name)}.csv" for name in (split, whole))
    parts = sorted(folder.glob(f"{other.stem}[0-9]*k.csv"))
    return next((path for path in (own, other, *parts) if path.is_file()), own)


def _read_report(path: Path, name: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{name} is missing")
    try:
        report = report_text(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text; save it as UTF-8") from error
    if is_missing(report):
        raise ValueError(f"{name} is {'empty' if not report else repr(report)}; write the report into it, or leave the study out")
    return report


def report_text(text: str) -> str:
    """Return what follows "study_findings:", else "discussion:", else the whole text, with white space folded."""
    for heading in ("study_findings:", "discussion:"):
        _, found, rest = text.partition(heading)
        if found:
            text = rest
            break
    return re.sub(r"\s+", " ", text).strip()


def _study_id(image: str) -> str:
    """Convert `M3D_Cap/ct_case/000006/Axial_C.nii.gz` to `ct_case/000006/Axial_C`, whichever of the scans' endings and folders the path has."""
    path = PurePosixPath(image)
    parts = path.parts[1:] if path.parts[0].startswith("M3D_Cap") else path.parts
    ending = next((ending for ending in READERS if parts and parts[-1].lower().endswith(ending)), "")
    return "/".join(parts)[: -len(ending) or None]


def _patient(study_id: str) -> str:
    """Return the folder, as `ct_case` and `ct_quizze` number their own, or the study itself where there is none."""
    folder = PurePosixPath(study_id).parent.as_posix()
    return study_id if folder == "." else folder


def _read_labels(path: Path) -> dict[str, dict[str, int]]:
    labels = {}
    for where, row in csv_rows(path, ("study",)):
        study = row.pop("study")
        try:
            values = {name: label_value(name, text) for name, text in row.items()}
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        labels[study] = {name: value for name, value in values.items() if value is not None}
    return labels


def _read_questions(path: Path, columns: Sequence[str], ids: Mapping[str, str]) -> list[Question]:
    """Read the questions about the studies `ids` (by image path with and without ending); logs how many are about others."""
    questions, others = [], 0
    for where, row in csv_rows(path, columns):
        image = row["Image Path"]
        try:
            check_inside(image, "Image Path")
            study = ids.get(image, ids.get(_study_id(image)))
            if study is None:
                others += 1
            else:
                questions.append(_question(study, row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if others and not questions:
        raise ValueError(f"{path}: none of its {others} questions is about an image of this split in M3D_Cap.json; compare the image paths")
    if others:
        logger.warning("%s: left out %d of %d questions, whose images M3D_Cap.json does not list", path, others, others + len(questions))
    return questions


def _question(study: str, row: Mapping[str, str]) -> Question:
    """Question types are the numbers 1 to 5: plane, phase, organ, abnormality, location."""
    number, answer = row["Question Type"].strip(), row["Answer"]
    if number not in map(str, range(1, len(QUESTION_KINDS) + 1)):
        raise ValueError(f"Question Type is {number!r} but must be 1 to {len(QUESTION_KINDS)}")
    kind = QUESTION_KINDS[int(number) - 1]
    if "Choice A" not in row:
        return Question(study, kind, row["Question"], ("Yes", "No"), answer.capitalize())
    return Question(study, kind, row["Question"], tuple(row[f"Choice {letter}"] for letter in LETTERS[:4]), answer)


def write(root: str | Path, studies: Sequence[Study], questions: Sequence[Question]) -> None:
    """Write reports, questions and labels in this layout; volumes and masks (`m3d_seg.write`) are the caller's.

    Raises:
        ValueError: two studies have one id, a split is none of `SPLITS`, or a question is about no study or has not two or four choices.
    """
    root = Path(root)
    check_ids(studies)
    ids = {study.id for study in studies}
    if wrong := next((study for study in studies if study.split not in SPLITS), None):
        raise ValueError(f"split {wrong.split!r} of study {wrong.id} is unknown; known: {', '.join(SPLITS)}")
    for question in questions:
        name, choices = f"{question.text!r} of study {question.study}", len(question.choices)
        if question.study not in ids:
            raise ValueError(f"{name} is about none of the studies to write; give a question of one of them")
        if not question.yes_no and choices != 4:
            raise ValueError(f"{name} has {choices} choices; M3D-VQA takes four, or Yes and No")
        if question.kind not in QUESTION_KINDS:
            raise ValueError(f"{name} is of kind {question.kind!r}; M3D-VQA knows {', '.join(QUESTION_KINDS)}")
    listing: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    texts = {}
    for study in studies:
        text = f"M3D_Cap/{study.id}.txt"
        texts[study.id] = (study, text)
        (root / text).parent.mkdir(parents=True, exist_ok=True)
        (root / text).write_text(f"study_findings: {study.report}\n", encoding="utf-8")
        place = _study_id(study.image)
        stated = {"id": (study.id, place), "patient": (study.patient, _patient(place))}
        extra = {name: value for name, (value, derived) in stated.items() if value != derived}
        listing[study.split].append({"image": study.image, "text": text, **extra})
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
        writer.writerows([study.id, *(study.labels.get(name, "") for name in names)] for study in studies)
    write_json(root / "M3D_Cap" / "M3D_Cap.json", listing)  # last: its presence says that the rest is whole

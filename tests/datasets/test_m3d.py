"""The layout of M3D-Cap and M3D-VQA: what is written is read back, published quirks are read too, and what is missing is named."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from med3dvlm.datasets import m3d
from med3dvlm.datasets.phantom import plan_phantoms
from med3dvlm.records import Question, Study


def study(number: int, split: str = "train", **changes: object) -> Study:
    name = f"ct_case/{number:06d}/Axial_C__portal_venous_phase"
    values = {"report": f"Scan {number}: a mass,\n  of 3 cm.", "labels": {"mass": 1, "stone": 0}, **changes}
    return Study(name, f"{number:06d}", f"M3D_Cap/{name}.nii.gz", split=split, source="m3d", **values)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    plans = plan_phantoms(60, seed=1)
    m3d.write(tmp_path, [plan.study for plan in plans], [question for plan in plans for question in plan.questions])
    for split in m3d.SPLITS:
        chosen = [plan for plan in plans if plan.study.split == split]
        studies, questions = m3d.read(tmp_path, split)
        assert studies == [dataclasses.replace(plan.study, source="m3d") for plan in chosen]
        asked = [question for plan in chosen for question in plan.questions]
        assert sorted(questions, key=repr) == sorted(asked, key=repr)
        assert [q for q in questions if not q.yes_no] == [q for q in asked if not q.yes_no]


def test_commas_quotes_and_line_ends_survive(tmp_path: Path) -> None:
    one = study(1)
    question = Question(one.id, "location", 'Where, "exactly"?', ("Left, upper", "Right\nlower", 'The "hilum"', "Nowhere"), 'The "hilum"')
    m3d.write(tmp_path, [one], [question])
    studies, questions = m3d.read(tmp_path, "train")
    assert questions == [question]
    assert studies == [dataclasses.replace(one, report="Scan 1: a mass, of 3 cm.")]  # white space is folded


def test_the_files_are_as_published(tmp_path: Path) -> None:
    """Column names, split names, question types by number and answers by letter, looked up with nothing of ours."""
    one, other = study(1), study(2, "validation")
    questions = [
        Question(one.id, "abnormality", "What?", ("Mass", "Stone", "Cyst", "Tear"), "Cyst"),
        Question(other.id, "abnormality", "Is there a mass?", ("Yes", "No"), "Yes"),
    ]
    m3d.write(tmp_path, [one, other], questions)
    listing = json.loads((tmp_path / "M3D_Cap/M3D_Cap.json").read_text())
    assert {split: len(entries) for split, entries in listing.items()} == {"train": 1, "validation": 1, "test": 0}
    assert listing["train"][0] == {"image": one.image, "text": f"M3D_Cap/{one.id}.txt"}
    assert (tmp_path / listing["train"][0]["text"]).read_text().startswith("study_findings: Scan 1")
    with (tmp_path / "M3D_VQA/M3D_VQA_train.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["Image Path"], row["Question Type"], row["Answer"], row["Answer Choice"]) == (one.image, "4", "Cyst", "C")
    assert [row[f"Choice {letter}"] for letter in "ABCD"] == ["Mass", "Stone", "Cyst", "Tear"]
    with (tmp_path / "M3D_VQA/M3D_VQA_yn_val.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["Question"], row["Answer"]) == ("Is there a mass?", "Yes")


@pytest.mark.parametrize(
    ("text", "report"),
    [
        ("title: x\nstudy_findings: A mass.\n\nNo stone.  discussion: see it", "A mass. No stone. discussion: see it"),
        ("title: x discussion:\tA cyst. ", "A cyst."),
        ("  Plain\ntext. ", "Plain text."),
        ("", ""),
    ],
)
def test_a_report_begins_after_its_heading(text: str, report: str) -> None:
    assert m3d.report_text(text) == report


def test_published_quirks(tmp_path: Path) -> None:
    """Questions name .npy files, a split may be called test1k, questions about other splits' scans and labels may be there or not."""
    one = study(1)
    m3d.write(tmp_path, [one], [])
    path = tmp_path / "M3D_Cap/M3D_Cap.json"
    path.write_text(json.dumps({"test1k": json.loads(path.read_text())["train"]}))
    with (tmp_path / "M3D_VQA/M3D_VQA_test1k.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(m3d.COLUMNS)
        writer.writerow([f"M3D_Cap/{one.id}.npy", "", 1, "Which plane?", "Axial", "Coronal", "Sagittal", "Oblique", "Axial", "A"])
        writer.writerow(["M3D_Cap/ct_case/9/Axial.npy", "", 1, "Which plane?", "Axial", "Coronal", "Sagittal", "Oblique", "Axial", "A"])
    (tmp_path / "labels.csv").unlink()
    studies, questions = m3d.read(tmp_path, "test1k")
    assert [(found.id, found.patient, found.labels, found.split) for found in studies] == [(one.id, "000001", {}, "test1k")]
    assert [(question.study, question.kind, question.letter) for question in questions] == [(one.id, "plane", "A")]


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"M3D_Cap\.json is missing; an M3D root holds"):
        m3d.read(tmp_path, "train")
    one = study(1)
    m3d.write(tmp_path, [one], [])
    with pytest.raises(ValueError, match="has no split 'val'; it has: train, validation, test"):
        m3d.read(tmp_path, "val")
    vqa = tmp_path / "M3D_VQA" / "M3D_VQA_train.csv"
    vqa.write_text(vqa.read_text().replace("Answer Choice", "Letter"))
    with pytest.raises(ValueError, match=r"M3D_VQA_train\.csv lacks the columns \['Answer Choice'\]; it has .*'Letter'"):
        m3d.read(tmp_path, "train")
    vqa.unlink()
    assert m3d.read(tmp_path, "train")[1] == []
    (tmp_path / "M3D_Cap" / f"{one.id}.txt").unlink()
    with pytest.raises(FileNotFoundError, match=f"{one.id}.txt, the report of {one.image}.*is missing"):
        m3d.read(tmp_path, "train")

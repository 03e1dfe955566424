"""The layout of M3D-Cap and M3D-VQA: a round trip, quirks of the published files, and missing files."""

import csv
import dataclasses
import json
import re
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from med3dvlm import read_volume
from med3dvlm.datasets import m3d
from med3dvlm.datasets.phantom import plan_phantoms
from med3dvlm.records import Question, Study
from med3dvlm.volume import READERS


def study(number: int, split: str = "train", **changes: object) -> Study:
    name = f"ct_case/{number:06d}/Axial_C__portal_venous_phase"
    values = {"report": f"Scan {number}: a mass,\n  of 3 cm.", "labels": {"mass": 1, "stone": 0}, **changes}
    return Study(name, f"ct_case/{number:06d}", f"M3D_Cap/{name}.nii.gz", split=split, source="m3d", **values)


def test_a_written_data_set_is_read_back(tmp_path: Path) -> None:
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
    """Column names, split names, question types and answer letters are read without the package."""
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
    assert [(found.id, found.patient, found.labels, found.split) for found in studies] == [(one.id, "ct_case/000001", {}, "test1k")]
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


OWN = [
    Study("case/0001/chest", "P1", "scans/0001.mha", "An effusion.", {"effusion": 1}, "train", "m3d"),
    Study("b", "P1", "scans/0002.NRRD", "A mass.", {"mass": 0, "effusion": 0}, "train", "m3d"),
    Study("series", "series", "series", "A stone.", {}, "train", "m3d"),  # a DICOM folder at the root
    Study("x.y", "P3", "scans/0001.nii.gz", "A cyst.", {}, "train", "m3d"),  # the first one's path but for the ending
]


def test_own_ids_patients_and_labels_come_back(tmp_path: Path) -> None:
    """Images lie in any folder and format; the listing holds what does not follow from their paths."""
    questions = [Question(one.id, "plane", "Plane?", ("Axial", "Coronal", "Sagittal", "Oblique"), "Axial") for one in OWN]
    m3d.write(tmp_path, OWN, questions)
    assert m3d.read(tmp_path, "train") == (OWN, questions)
    listing = json.loads((tmp_path / "M3D_Cap/M3D_Cap.json").read_text())["train"]
    assert listing[0]["id"] == "case/0001/chest" and listing[0]["patient"] == "P1"
    assert listing[2] == {"image": "series", "text": "M3D_Cap/series.txt"}


@pytest.mark.parametrize("ending", list(READERS))
def test_a_path_with_any_ending_gives_the_same_id(ending: str, tmp_path: Path) -> None:
    one = dataclasses.replace(study(1), image=f"M3D_Cap/{study(1).id}{ending.upper()}", report="A mass.")
    m3d.write(tmp_path, [one], [])
    assert set(json.loads((tmp_path / "M3D_Cap/M3D_Cap.json").read_text())["train"][0]) == {"image", "text"}
    assert m3d.read(tmp_path, "train") == ([one], [])


def test_an_unknown_label_is_an_empty_cell(tmp_path: Path) -> None:
    m3d.write(tmp_path, OWN, [])
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = {row["study"]: row for row in csv.DictReader(file)}
    assert rows["case/0001/chest"] == {"study": "case/0001/chest", "effusion": "1", "mass": ""}
    assert rows["x.y"] == {"study": "x.y", "effusion": "", "mass": ""}


@pytest.mark.parametrize("path", ["/etc/scan", "../scan", "scans/../../scan", "", "."])
def test_a_path_that_leaves_the_data_is_refused(path: str, tmp_path: Path) -> None:
    for name in ("id", "image"):
        with pytest.raises(ValueError, match=f"{name} of study .* is '{re.escape(path)}', but it must be a path relative to"):
            dataclasses.replace(OWN[0], **{name: path})
    m3d.write(tmp_path, OWN[:1], [])
    listing = tmp_path / "M3D_Cap" / "M3D_Cap.json"
    for name in ("image", "text", "id"):
        (entry,) = json.loads(listing.read_text())["train"]
        (tmp_path / "bad.json").write_text(json.dumps({"train": [entry, {**entry, name: path}]}))
        content = listing.read_text()
        (tmp_path / "bad.json").replace(listing)
        with pytest.raises(ValueError, match=f"M3D_Cap.json, entry 2 of 'train': {name}.* is '{re.escape(path)}', but it must be a path"):
            m3d.read(tmp_path, "train")
        listing.write_text(content)


def test_records_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two studies have the id './b'"):
        m3d.write(tmp_path, [OWN[1], dataclasses.replace(OWN[0], id="./b")], [])
    with pytest.raises(ValueError, match="split 'val' of study b is unknown; known: train, validation, test"):
        m3d.write(tmp_path, [dataclasses.replace(OWN[1], split="val")], [])
    with pytest.raises(ValueError, match="of study c is about none of the studies"):
        m3d.write(tmp_path, OWN, [Question("c", "plane", "Plane?", ("Yes", "No"), "Yes")])
    with pytest.raises(ValueError, match="of study b has 0 choices; M3D-VQA takes four"):
        m3d.write(tmp_path, OWN, [Question("b", "plane", "Plane?", (), "Axial")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("M3D_VQA_train.csv", "M3D_Cap/{one}.npy,,6,Q?,a,b,c,d,a,A", "Question Type is '6' but must be 1 to 5"),
        ("M3D_VQA_train.csv", "M3D_Cap/{one}.npy,,organ,Q?,a,b,c,d,a,A", "Question Type is 'organ' but must be 1 to 5"),
        ("M3D_VQA_train.csv", "M3D_Cap/{one}.npy,,1,Q?,a,b,c,d,e,A", "answer 'e' of study .* is not among its choices"),
        ("M3D_VQA_train.csv", "M3D_Cap/{one}.npy,,1,Q?,a,b,c", "the row ends before Choice D"),
        ("M3D_VQA_train.csv", "M3D_Cap/{one}.npy,,1,Where, please?,a,b,c,d,a,A", "the row has more values than there are columns"),
        ("labels.csv", "{one},1,0,1", "the row has more values than there are columns"),
        ("M3D_VQA_train.csv", ",,1,Q?,a,b,c,d,a,A", "Image Path is '', but it must be a path"),
        ("M3D_VQA_yn_train.csv", "M3D_Cap/{one}.npy,,4,Q?,maybe", "answer 'Maybe' of study .* is not among its choices"),
        ("labels.csv", "{one},perhaps,0", "mass is 'perhaps' but must be 0, 1 or empty"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(file: str, row: str, message: str, tmp_path: Path) -> None:
    one = study(1)
    questions = [
        Question(one.id, "plane", "Plane?", ("Axial", "Coronal", "Sagittal", "Oblique"), "Axial"),
        Question(one.id, "abnormality", "Is there a mass?", ("Yes", "No"), "Yes"),
    ]
    m3d.write(tmp_path, [one], questions)
    path = next(tmp_path.rglob(file))
    path.write_text(path.read_text() + row.format(one=one.id) + "\n")
    with pytest.raises(ValueError, match=f"{file} line 3: {message}"):
        m3d.read(tmp_path, "train")


def test_a_bad_listing_is_named(tmp_path: Path) -> None:
    m3d.write(tmp_path, OWN, [])
    listing = tmp_path / "M3D_Cap" / "M3D_Cap.json"
    whole = json.loads(listing.read_text())
    del whole["train"][1]["text"]
    listing.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"M3D_Cap\.json, entry 2 of 'train' lacks text"):
        m3d.read(tmp_path, "train")
    listing.write_text('{"train": [')
    with pytest.raises(ValueError, match=r"M3D_Cap\.json is not valid JSON: .*line 1 column"):
        m3d.read(tmp_path, "train")


@pytest.mark.parametrize(("entry", "sentence"), [
    ("M3D_Cap/a.npy", 'must be {"image": path, "text": path} but is a str'),
    ({"image": "M3D_Cap/a.npy", "text": "M3D_Cap/a.txt", "id": 5}, "id must be a text"),
    ({"image": "M3D_Cap/a.npy", "text": "M3D_Cap/a.txt", "id": "a", "patient": ["b"]}, "patient must be a text"),
])  # fmt: skip
def test_an_entry_of_a_wrong_type_is_named(tmp_path: Path, entry: object, sentence: str) -> None:
    (tmp_path / "M3D_Cap").mkdir()
    (tmp_path / "M3D_Cap/M3D_Cap.json").write_text(json.dumps({"train": [entry]}))
    with pytest.raises(ValueError, match=r"M3D_Cap\.json, entry 1 of 'train'.*" + re.escape(sentence)):
        m3d.read(tmp_path, "train")


def test_questions_about_unknown_images_are_counted_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = study(1)
    m3d.write(tmp_path, [one], [Question(one.id, "plane", "Plane?", ("Axial", "Coronal", "Sagittal", "Oblique"), "Axial")])
    path = tmp_path / "M3D_VQA" / "M3D_VQA_train.csv"
    header, row = path.read_text().splitlines()
    path.write_text("\n".join([header, row, *[row.replace(one.image, f"elsewhere/{number}.npy") for number in range(3)], ""]))
    assert len(m3d.read(tmp_path, "train")[1]) == 1
    assert "M3D_VQA_train.csv: left out 3 of 4 questions" in caplog.text
    path.write_text("\n".join([header, row.replace(one.image, "elsewhere/0.npy"), ""]))
    with pytest.raises(ValueError, match=r"M3D_VQA_train\.csv: none of its 1 questions is about an image of this split"):
        m3d.read(tmp_path, "train")


def test_a_report_that_cannot_be_read_is_one_studys_failure(tmp_path: Path) -> None:
    questions = [Question(one.id, "plane", "Plane?", ("Axial", "Coronal", "Sagittal", "Oblique"), "Axial") for one in OWN]
    m3d.write(tmp_path, OWN, questions)
    texts = [tmp_path / "M3D_Cap" / f"{one.id}.txt" for one in OWN]
    texts[0].unlink()
    texts[1].write_text("title: x study_findings: \n")
    texts[2].write_bytes(b"study_findings: M\xfcller\n")
    failures: list[dict[str, str]] = []
    assert m3d.read(tmp_path, "train", failures) == (OWN[3:], questions[3:])
    assert [failure["study"] for failure in failures] == [one.id for one in OWN[:3]]
    for failure, text, reason in zip(failures, texts, ("is missing", "is empty", "is not UTF-8 text"), strict=False):
        assert str(text) in failure["reason"] and reason in failure["reason"]
    with pytest.raises(ValueError, match="b.txt, the report of scans/0002.NRRD by .* is empty"):
        texts[0].write_text("A cyst.")
        m3d.read(tmp_path, "train")
    texts[1].write_text("nan")
    with pytest.raises(ValueError, match="b.txt, the report of scans/0002.NRRD by .* is 'nan'"):
        m3d.read(tmp_path, "train")
    for text in texts[:3]:
        text.write_bytes(b"\xef\xbb\xbfA cyst.")  # as editors of Windows begin a file
    assert [study.report for study in m3d.read(tmp_path, "train")[0][:3]] == ["A cyst."] * 3


PICTURES = "M3D_Cap/ct_case/000006/Axial_C__portal_venous_phase"


def released(root: Path, image: str, split: str = "train") -> None:
    """One case as released: a report and a folder of numbered slices, while listing and questions name a prepared file."""
    (root / PICTURES).mkdir(parents=True)
    (root / "M3D_Cap/ct_case/000006/text.txt").write_text("Title: x\nstudy_findings: A cyst.\n")
    for number, seed in enumerate((0, 10, 20, 30)):
        grey = (np.arange(20 * 30).reshape(20, 30) + seed).astype(np.uint8)
        Image.fromarray(grey).save(root / PICTURES / f"{number * 4}.png")  # 0, 4, 8, 12: by name 12 comes before 4
    top = PurePosixPath(image).parts[0]
    (root / top).mkdir(exist_ok=True)
    entry = {"image": image, "text": f"{top}/ct_case/000006/text.txt"}
    (root / top / "M3D_Cap.json").write_text(json.dumps({"train": [], split: [entry]}))
    (root / "M3D_VQA").mkdir()


@pytest.mark.parametrize("top", ["M3D_Cap", "M3D_Cap_npy", "./M3D_Cap_nii"])
@pytest.mark.parametrize("ending", [".npy", ".nii.gz", ""])
def test_released_slices_are_read_where_the_prepared_file_is_missing(tmp_path: Path, top: str, ending: str) -> None:
    image = PICTURES.replace("M3D_Cap", top, 1) + ending
    released(tmp_path, image)
    with (tmp_path / "M3D_VQA/M3D_VQA_train.csv").open("w", newline="") as file:
        csv.writer(file).writerow(m3d.COLUMNS)
        csv.writer(file).writerow([f"M3D_Cap_npy/{PICTURES[8:]}.npy", "", 2, "Phase?", "Arterial", "Portal", "Late", "None", "Portal", "B"])
    with (tmp_path / "M3D_VQA/M3D_VQA_yn_train.csv").open("w", newline="") as file:
        csv.writer(file).writerow(m3d.YES_NO_COLUMNS)
        csv.writer(file).writerow([f"M3D_Cap_nii/{PICTURES[8:]}.nii.gz", "", 4, "Is there a cyst?", "yes"])
    (one,), questions = m3d.read(tmp_path, "train")
    assert (one.id, one.patient, one.image, one.report) == (PICTURES[8:], "ct_case/000006", PICTURES, "A cyst.")
    assert [(question.study, question.kind, question.answer) for question in questions] == [
        (one.id, "phase", "Portal"), (one.id, "abnormality", "Yes"),
    ]  # fmt: skip
    volume = read_volume(tmp_path / one.image, **one.reading)
    assert volume.shape == (4, 20, 30) and volume.array[:, 0, 0].tolist() == [0, 10, 20, 30]


def test_a_prepared_file_is_preferred_to_the_slices(tmp_path: Path) -> None:
    released(tmp_path, f"{PICTURES.replace('M3D_Cap', 'M3D_Cap_npy')}.npy")
    prepared = tmp_path / f"{PICTURES.replace('M3D_Cap', 'M3D_Cap_npy')}.nii.gz"
    prepared.parent.mkdir(parents=True)
    prepared.write_bytes(b"")
    assert m3d.read(tmp_path, "train")[0][0].image == prepared.relative_to(tmp_path).as_posix()
    prepared.with_name("Axial_C__portal_venous_phase.npy").write_bytes(b"")  # what the list names
    assert m3d.read(tmp_path, "train")[0][0].image.endswith("_npy/ct_case/000006/Axial_C__portal_venous_phase.npy")


def test_a_missing_image_keeps_its_path(tmp_path: Path) -> None:
    one = study(1)
    m3d.write(tmp_path, [one], [])
    assert m3d.read(tmp_path, "train")[0][0].image == one.image


@pytest.mark.parametrize(("split", "files", "chosen"), [
    ("test1k", ["test"], "test"), ("test1k", ["test", "test1k"], "test1k"), ("test", ["test5k"], "test5k"), ("train", ["train"], "train"),
])  # fmt: skip
def test_all_splits_are_listed_and_find_their_questions(tmp_path: Path, split: str, files: list[str], chosen: str) -> None:
    released(tmp_path, PICTURES, split)
    for name in files:
        with (tmp_path / f"M3D_VQA/M3D_VQA_{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerow(m3d.COLUMNS)
            csv.writer(file).writerow([f"{PICTURES}.npy", "", 1, name, "Axial", "Coronal", "Sagittal", "Oblique", "Axial", "A"])
    assert m3d.splits(tmp_path) == list(dict.fromkeys(["train", split]))
    assert [question.text for question in m3d.read(tmp_path, split)[1]] == [chosen]

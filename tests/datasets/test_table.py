"""A user's own table: the example of the docstring, checked columns, and splits by patient."""

import json
import re
import textwrap
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from med3dvlm import read_volume
from med3dvlm.datasets import DATASETS, m3d, table
from med3dvlm.records import Question, Study


def write(root: Path, text: str, name: str = "table.csv") -> Path:
    root.mkdir(exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")
    return root


def test_the_example_of_the_text_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in "ab":
        scan = np.random.default_rng(0).integers(-1000, 400, (30, 20, 10)).astype(np.int16)
        nib.save(nib.Nifti1Image(scan, np.diag([0.8, 0.8, 2.5, 1])), tmp_path / "mine" / f"{name}.nii.gz")
    assert table.__doc__ is not None
    (example,) = re.findall(r"\n((?:    .*\n|\n)*    from pathlib.*(?:\n    .*|\n)*)", table.__doc__)
    code = textwrap.dedent(example).strip()
    assert len([line for line in code.splitlines() if line]) <= 10
    exec(code, {})
    assert capsys.readouterr().out == "Right pleural effusion. ['Yes', 'Right']\n"

    assert table.splits("mine") == ["train", "test"] and DATASETS["table"] is table
    assert table.read("mine", "train") == (
        [Study("a", "p1", "a.nii.gz", "Right pleural effusion.", {"effusion": 1}, "train", "table")],
        [
            Question("a", "other", "Is there an effusion?", ("Yes", "No"), "Yes"),
            Question("a", "other", "Where is the effusion?", ("Right", "Left", "Both sides", "Nowhere"), "Right"),
        ],
    )
    (study,), _ = table.read("mine", "test")
    assert read_volume(Path("mine") / study.image, **study.reading).shape == (10, 20, 30)


def test_image_and_report_are_enough(tmp_path: Path) -> None:
    root = write(tmp_path / "mine", "\ufeffimage,report\nscans/1.NRRD,A mass.\nscans/2,No mass.\n")
    studies = [study for split in table.splits(root) for study in table.read(root, split)[0]]
    assert {(study.id, study.patient, study.image, study.report) for study in studies} == {
        ("scans/1", "scans/1", "scans/1.NRRD", "A mass."),
        ("scans/2", "scans/2", "scans/2", "No mass."),
    }
    assert all(study.labels == {} and study.reading == {} for study in studies)


def test_json_lines_say_the_same_as_csv(tmp_path: Path) -> None:
    csv = "image,report,id,patient,split,question,answer,choices,kind,label:mass,label:stone\n"
    csv += 'a.mha,"Mass, 3 cm",s1,7,train,Plane?,Axial,Axial|Coronal|Sagittal|Oblique,plane,1,\nb.mha,Stone,s2,8,val,,,,,,1\n'
    rows = [
        {"image": "a.mha", "report": "Mass, 3 cm", "id": "s1", "patient": 7, "split": "train", "question": "Plane?", "answer": "Axial"},
        {"image": "b.mha", "report": "Stone", "id": "s2", "patient": "8", "split": "val", "label:stone": 1, "label:mass": None},
    ]
    rows[0] |= {"choices": ["Axial", "Coronal", "Sagittal", "Oblique"], "kind": "plane", "label:mass": 1}
    first = write(tmp_path / "csv", csv)
    second = write(tmp_path / "json", "\n\n".join(map(json.dumps, rows)), "scans.jsonl")  # no line end at the end
    assert table.splits(first) == table.splits(second) == ["train", "validation"]
    for split in ("train", "validation"):
        assert table.read(first, split) == table.read(second, split)
    (study,), (question,) = table.read(first, "train")
    assert (study.patient, study.labels, question.kind, question.letter) == ("7", {"mass": 1}, "plane", "A")


def test_patients_are_split_by_their_names(tmp_path: Path) -> None:
    """Shares are right, a patient's scans stay together, and new patients do not move others."""
    lines = [f"{patient}_{scan}.nii.gz,Report.,p{patient}\n" for patient in range(400) for scan in range(2)]
    small, large = (write(tmp_path / name, "image,report,patient\n" + "".join(part)) for name, part in (("s", lines[:200]), ("l", lines)))
    where = {}
    for root in (small, large):
        found = {study.image: (study.patient, split) for split in table.splits(root) for study in table.read(root, split)[0]}
        assert where.items() <= found.items()
        where = found
    assert len(where) == 800 and len(set(where.values())) == 400
    counts = Counter(split for _, split in set(where.values()))
    assert 290 <= counts["train"] <= 350 and 22 <= counts["validation"] <= 60 and 22 <= counts["test"] <= 60
    # written down once: whoever prepares the same table next year gets the same split
    assert [table.default_split(name) for name in ("p1", "p2", "p11", "p26")] == ["validation", "train", "test", "train"]


def test_a_study_without_report_is_a_failure(tmp_path: Path) -> None:
    root = write(tmp_path / "mine", "image,report,split,question,answer\na.nii,,train,What?,That\nb.nii,Stone,train,What?,This\n")
    with pytest.raises(ValueError, match=r"table.csv line 2: the report of a.nii is empty"):
        table.read(root, "train")
    failures: list[dict[str, str]] = []
    studies, questions = table.read(root, "train", failures)
    assert [study.id for study in studies] == ["b"] and [question.answer for question in questions] == ["This"]
    assert [failure["study"] for failure in failures] == ["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,text\na.nii,x\n", r"table.csv lacks the columns \['report'\]; it has \['image', 'text'\]"),
        ("image,report,age,mass\na.nii,x,4,1\n", r"table.csv has the unknown columns \['age', 'mass'\]; known are image, report, .*label:"),
        ("image,report,label:\na.nii,x,1\n", r"unknown columns \['label:'\]"),
        ("image,report,report\na.nii,x,y\n", r"table.csv has the columns \['report'\] twice"),
        ("image,report\n", "table.csv has no rows"),
        ("image,report\na.nii\n", "table.csv line 2: the row ends before report"),
        ("image,report\na.nii,A mass, 3 cm\n", "table.csv line 2: the row has more values than there are columns"),
        ("image,report\n../a.nii,x\n", "table.csv line 2: image is '../a.nii', but it must be a path relative to"),
        ("image,report\n,x\n", "table.csv line 2: image is empty; name the scan's file or folder"),
        ("image,report,id\na.nii,x,/etc\n", "table.csv line 2: id of study '/etc' is '/etc'"),
        ("image,report\na.nii,x\na.nii,y\n", "table.csv line 3: report is 'y' but table.csv line 2 states 'x' of the same image"),
        ("image,report,label:mass\na.nii,x,1\na.nii,,0\n", "line 3: label:mass is 0 but .*line 2 states 1 of the same image"),
        ("image,report,label:mass\na.nii,x,yes\n", "line 2: label:mass is 'yes' but must be 0, 1 or empty"),
        ("image,report\na.nii,x\na.mha,y\n", "table.csv: two studies have the id 'a'; give each its own"),
        ("image,report,split\na.nii,x,\n", "line 2: split is empty; name one, or delete the column"),
        ("image,report,question,answer\na.nii,x,What?,\n", "line 2: answer is empty but other columns of a question are not"),
        (
            "image,report,question,answer,choices\na.nii,x,What?,c,a|b\n",
            r"line 2: answer 'c' of study a is not among its choices \['a', 'b'\]",
        ),
        (
            "image,report,question,answer,kind\na.nii,x,What?,c,organs\n",
            "line 2: question kind 'organs' of study a is unknown; known: .* other",
        ),
    ],
)
def test_a_wrong_table_is_named_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    message = message.replace("but table.csv", "but .*table.csv")
    with pytest.raises(ValueError, match=message):
        table.read(write(tmp_path / "mine", text), "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.nii"}', r"table.jsonl line 2 lacks the columns \['report'\]"),
        ('{"image": "a.nii", "report": "x", "age": 4}', r"table.jsonl line 2 has the unknown columns \['age'\]"),
        ('{"image": "a.nii", "report": ["x"]}', r"table.jsonl line 2: report is \['x'\] but must be a text"),
        ('{"image": "a.nii", ', "table.jsonl line 2 is not valid JSON: "),
        pytest.param('{"image": "a.nii", "report": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2 has lists too deep", id="deep"),
        (
            '{"image": "a.nii", "report": "a\\u0000b"}',
            r"table.jsonl line 2: report holds the character U\+0000, which is not part of a text; delete it",
        ),
        (
            '{"image": "a.nii", "report": "x", "patient": "\\ud800"}',
            r"line 2: patient holds the character U\+D800, which is not part of a text",
        ),
        pytest.param('{"image": "a.nii", "report": "x", "series": 1' + "0" * 400 + "}", "line 2: series is '10+' but must be", id="huge"),
        ("[1]", "table.jsonl line 2: it must hold a JSON object, not a list"),
    ],
)
def test_a_wrong_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    root = write(tmp_path / "mine", '{"image": "b.nii", "report": "x", "split": "train"}\n' + line, "table.jsonl")
    with pytest.raises(ValueError, match=message):
        table.read(root, "train")


def test_a_long_report_is_read_whole(tmp_path: Path) -> None:
    report = "A nodule, 4 mm. " * 20_000
    root = write(tmp_path / "mine", f'image,report,split\na.nii,"{report}",train\nb.nii,x,train\n')
    assert [study.report for study in table.read(root, "train")[0]] == [report.strip(), "x"]
    root = write(tmp_path / "huge", json.dumps({"image": "a.nii", "report": "x", "id": 10**400, "split": "train"}), "table.jsonl")
    assert table.read(root, "train")[0][0].id == str(10**400)


def test_the_table_is_found_in_the_folder(tmp_path: Path) -> None:
    root = write(tmp_path / "mine", "image,report,split\na.nii,x,train\n", "scans.csv")
    assert table.splits(root) == ["train"]
    with pytest.raises(ValueError, match="scans.csv has no split 'test'; it has: train"):
        table.read(root, "test")
    write(root, "anything\n", "notes.csv")
    with pytest.raises(ValueError, match=r"has several tables \(notes.csv, scans.csv\); name the one"):
        table.splits(root)
    (root / "scans.csv").rename(root / "table.csv")
    assert table.splits(root) == ["train"]
    with pytest.raises(
        FileNotFoundError, match=r"has no table \(.csv, .tsv, .jsonl\); put one there, say table.csv with the columns image and report"
    ):
        table.splits(tmp_path)
    (root / "table.csv").write_bytes(b"image,report\na.nii,M\xfcller\n")
    with pytest.raises(ValueError, match="table.csv line 2 is not UTF-8 text"):
        table.splits(root)


def test_m3d_refuses_questions_of_other_kinds(tmp_path: Path) -> None:
    study = Study("a", "a", "a.nii", "x", {}, "train", "table")
    with pytest.raises(ValueError, match="is of kind 'other'; M3D-VQA knows plane, phase"):
        m3d.write(tmp_path, [study], [Question("a", "other", "Why?", ("Yes", "No"), "Yes")])


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "NULL", "null", "NA", "N/A", "<NA>", "#N/A"])
def test_na_values_are_missing_values(word: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "image,report,id,patient,question,answer,label:mass,series\n" + f"a.nii,x,{word},{word},{word},{word},{word},{word}\n"
    missing = f"b.nii,{word},,p1,,,,\n"
    root = write(tmp_path / "mine", text + missing)
    failures: list[dict[str, str]] = []
    found = [table.read(root, split, failures) for split in table.splits(root)]
    assert [study for studies, _ in found for study in studies] == [Study("a", "a", "a.nii", "x", {}, table.default_split("a"), "table")]
    assert not any(questions for _, questions in found) and [failure["study"] for failure in failures] == ["b"]
    assert f"table.csv: patient is '{word}' in 1 rows, the first in line 2; it counts as empty." in caplog.text


def test_none_may_be_an_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path / "mine", "image,report,split,question,answer,choices\na.nii,x,train,Which organ has a lesion?,None,Liver|None\n")
    assert [question.answer for question in table.read(root, "train")[1]] == ["None"] and not caplog.text


def test_nan_and_floats_in_json_are_no_names(tmp_path: Path) -> None:
    """pandas writes NaN, and whole numbers of a column with gaps as floats; 7 and 7.0 are one patient in one split."""
    nan = float("nan")
    lines = [{"image": f"{n}.nii", "report": "x", "patient": nan, "id": None, "split": nan} for n in range(20)]
    lines += [{"image": "a.nii", "report": "x", "patient": 7, "id": "s7"}, {"image": "b.nii", "report": "x", "patient": 7.0, "id": 88.0}]
    for line in lines:
        line.pop("split", None)
    root = write(tmp_path / "mine", "\n".join(map(json.dumps, lines)), "table.JSONL")
    studies = [study for split in table.splits(root) for study in table.read(root, split)[0]]
    assert {study.patient for study in studies} == {*map(str, range(20)), "7"} and len({study.split for study in studies}) > 1
    assert {study.id: study.split for study in studies if study.patient == "7"} == dict.fromkeys(
        ("7", "s7", "88"), table.default_split("7")
    )
    csv = write(tmp_path / "csv", "image,report,patient\na.nii,x,7\nb.nii,x,7.0\nc.nii,x,007\n")
    patients = {study.id: study.patient for split in table.splits(csv) for study in table.read(csv, split)[0]}
    assert patients == {"a": "7", "b": "7", "c": "007"}


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"report": 7}, "report is 7 but must be a text"),
        ({"report": True}, "report is True but must be a text"),
        ({"question": 1.0, "answer": "x"}, "question is 1.0 but must be a text"),
        ({"patient": True}, "patient is True but must be a text"),
        ({"patient": 2.5}, "patient is 2.5 but must be a text or a whole number"),
        ({"patient": 1e17}, r"patient is 1e\+17 but must be a text or a whole number"),
        ({"patient": "1.23E+17"}, r"patient is '1.23E\+17', which a spreadsheet has rounded"),
        ({"patient": ["p1"]}, r"patient is \['p1'\] but must be a text"),
        ({"id": {"a": 1}}, "id is {'a': 1} but must be a text"),
        ({"split": float("inf")}, "split is inf but must be a text or a whole number"),
        ({"label:mass": 0.5}, "label:mass is '0.5' but must be 0, 1 or empty"),
        ({"choices": ["a", None]}, r"choices is \['a', None\] but must be a list of texts or numbers, none of them empty"),
        ({"series": 0}, "series is '0' but must be the number of a series in the list"),
        ({"series": 1.5}, "series is '1.5' but must be the number of a series"),
        ({"hu": "yes"}, "hu is 'yes' but must be one of auto, header, csv, already_hu"),
        ({"unit": "HE"}, "unit is 'HE' but must be one of HU, unit, arbitrary"),
        ({"spacing": [1, 1]}, "spacing is '1,1' but must be mm between slices, rows and columns, as 2.5,0.8,0.8"),
        ({"spacing": "2.5,0,0.8"}, "spacing is '2.5,0,0.8' but must be above 0"),
        ({"orientation": "SPI"}, "orientation is 'SPI' but must be one letter each of L/R, A/P and I/S"),
        ({"transpose": "xyz"}, "transpose is 'xyz' but must be 0, 1 or empty"),
        ({"rescale": "1"}, "rescale is '1' but must be slope and intercept, as 1,-1024"),
        ({"slope": 1}, "of slope and intercept one is empty; state both or neither"),
        ({"slope": "one", "intercept": 0}, "slope is 'one' but must be a number"),
        ({"slope": 1, "intercept": -1024, "rescale": "1,0"}, "state them once"),
        ({"Image": "b.nii"}, r"has the columns \['image'\] twice"),
    ],
)
def test_a_value_of_another_kind_is_refused(cells: dict[str, object], message: str, tmp_path: Path) -> None:
    good = {"image": "a.nii", "report": "x", "split": "train"}
    root = write(tmp_path / "mine", json.dumps(good | {"image": "b.nii"}) + "\n" + json.dumps(good | cells) + "\n", "table.jsonl")
    with pytest.raises(ValueError, match=rf"table.jsonl line 2.*{message}"):
        table.read(root, "train")


def test_settings_of_a_scan_reach_its_reader(tmp_path: Path) -> None:
    head = "image,report,split,Series,HU,rescale,slope,intercept,spacing,unit,Orientation,transpose\n"
    body = "a,x,train,2.0,Auto,,1,-1024,,,,\nb.npy,x,train,,csv,[1; -8192.5],,,2.5 x 0.8 x 0.8,,ipr,1\nc.nii,x,train,,,,,,,hu,,0\n"
    expected = [
        {"series": 2, "hu": "auto", "rescale": [1.0, -1024.0]},
        {"hu": "csv", "rescale": [1.0, -8192.5], "spacing": [2.5, 0.8, 0.8], "orientation": "IPR", "transpose": True},
        {"unit": "HU", "transpose": False},
    ]
    root = write(tmp_path / "mine", head + body)
    assert [study.reading for study in table.read(root, "train")[0]] == expected
    lines = [
        {"image": "a", "report": "x", "split": "train", "series": 2, "hu": "auto", "rescale": [1, -1024]},
        {"image": "b.npy", "report": "x", "split": "train", "hu": "csv", "slope": 1, "intercept": -8192.5, "spacing": [2.5, 0.8, 0.8],
         "orientation": "IPR", "transpose": True},
        {"image": "c.nii", "report": "x", "split": "train", "unit": "HU", "series": None, "transpose": False},
    ]  # fmt: skip
    other = write(tmp_path / "json", "\n".join(map(json.dumps, lines)), "table.jsonl")
    assert [study.reading for study in table.read(other, "train")[0]] == expected
    scan = np.random.default_rng(0).integers(7200, 9000, (10, 20, 30)).astype(np.int16)
    np.save(root / "b.npy", scan)
    volume = read_volume(root / "b.npy", **expected[1])
    assert (volume.spacing, volume.orientation) == ((2.5, 0.8, 0.8), "IPR")
    assert np.array_equal(volume.array, scan.transpose(2, 1, 0) - np.float32(8192.5))


def test_a_split_has_one_name(tmp_path: Path) -> None:
    spellings = {
        "train": ["Train", " TRAIN ", "training"],
        "validation": ["val", "Valid", "validation", "DEV"],
        "test": ["test", "Testing"],
    }
    written = [(name, spelling) for name, group in spellings.items() for spelling in [*group, "external site"]]
    root = write(
        tmp_path / "mine", "IMAGE,Report,SPLIT\n" + "".join(f"{n}.nii,x,{text}\n" for n, (_, text) in enumerate(written)), "My.CSV"
    )
    assert sorted(table.splits(root)) == ["external site", "test", "train", "validation"]
    for name, group in spellings.items():
        assert len(table.read(root, name)[0]) == len(group)
    write(root, "image,report,split\na.nii,x,fold 1\nb.nii,x,Fold 1\n", "My.CSV")
    with pytest.raises(ValueError, match="My.CSV line 3: split is 'Fold 1' but other rows write 'fold 1'; write it in one way"):
        table.splits(root)


def test_special_tokens_in_a_text_are_refused_with_file_and_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = ["<image>", "<|im_end|>", "<|endoftext|>", "</s>", "<s>", "[SEP]", "[INST]", "<|vision_start|>", "<start_of_turn>", "<<SYS>>"]
    body = "".join(f"{n}.nii,x,train,{token} Mass?,Yes\n" for n, token in enumerate(tokens))
    root = write(tmp_path / "mine", "image,report,split,question,answer\n" + body + "a.nii,x </s>,train,Is it <3 cm or >2?,[left]\n")
    studies, questions = table.read(root, "train")
    assert len(studies) == 11 and questions[0].text == "<image> Mass?"
    (told,) = (record.getMessage() for record in caplog.records)
    assert "table.csv: the text of a special token stands in 11 cells (line 2, question: <image>; line 3, question: <|im_end|>; " in told
    assert "line 11, question: <<SYS>>; and 1 more). Models read it as words; delete it if it was left in by mistake." in told

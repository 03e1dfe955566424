"""The audit finds the planted duplicates, leaks and questions that reveal their answer, and nothing else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from med3dvlm import VolumeProcessor
from med3dvlm.cli import main
from med3dvlm.datasets import duplicates, m3d
from med3dvlm.datasets.audit import (
    audit,
    choice_habits,
    deduplicate,
    question_facts,
    report_lengths,
    split_order,
    tells_answer,
    text_only_baselines,
)
from med3dvlm.datasets.phantom import write_phantoms
from med3dvlm.datasets.preparation import prepare
from med3dvlm.datasets.store import PreparedData
from med3dvlm.records import Question, Records, Study

CHOICES = ("Axial", "Coronal", "Sagittal", "Oblique")


def noised(array: np.ndarray) -> np.ndarray:
    return array + np.random.default_rng(0).normal(0, 8, array.shape)


def shifted(array: np.ndarray) -> np.ndarray:
    return np.pad(array, ((1, 0), (1, 0), (1, 0)), mode="edge")[:-1, :-1, :-1]


def brightened(array: np.ndarray) -> np.ndarray:
    low, high = array.min(), array.max()
    return low + (high - low) * ((array - low) / (high - low)) ** 1.2


def cropped(array: np.ndarray) -> np.ndarray:
    return array[1:-1, 1:-1, 1:-1]


# name: (split of the copy, split and place of its original, change)
PLANTED: dict[str, tuple[str, str, int, Callable[[np.ndarray], np.ndarray]]] = {
    "exact": ("test", "train", 0, lambda array: array),
    "noise": ("test", "train", 1, noised),
    "shift": ("validation", "train", 3, shifted),
    "bright": ("test", "train", 4, brightened),
    "crop": ("test", "train", 6, cropped),
    "within": ("train", "train", 8, noised),
    "twice": ("test", "test", 0, noised),
}


def reworded(report: str) -> str:
    """Returns the report with its sentences in another order, one word replaced and one left out."""
    first, *others = report.split(". ")
    words = ". ".join([*others, first]).split(" ")
    return " ".join(["seen" if place == 3 else word for place, word in enumerate(words) if place != 12])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Twelve phantoms and seven copies as other patients, prepared; one test report is a training report in other words."""
    root = tmp_path_factory.mktemp("planted")
    phantoms = root / "phantoms"
    write_phantoms(phantoms, studies=12, seed=6, workers=2)
    records = {split: m3d.read(phantoms, split) for split in m3d.SPLITS}
    studies = [replace(study, masks={}) for split in records for study in records[split][0]]
    of = {split: records[split][0] for split in records}
    originals: dict[str, str] = {}
    source = root / "scans"
    for study in studies:
        (source / study.image).parent.mkdir(parents=True, exist_ok=True)
        (source / study.image).symlink_to(phantoms / study.image)
    for name, (split, from_split, place, change) in PLANTED.items():
        original = of[from_split][place]
        scan = nib.load(phantoms / original.image)
        path = source / f"copies/{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(change(np.asarray(scan.dataobj).astype(np.float32)), scan.affine), path)
        report = f"Scan {name} of its own kind, {name} words that no other says, and {name} again."
        studies.append(Study(f"copies/{name}", f"copy {name}", f"copies/{name}.nii.gz", report, {}, split, "test"))
        originals[f"copies/{name}"] = original.id
    said = next(place for place, study in enumerate(studies) if study.id == of["test"][1].id)
    studies[said] = replace(studies[said], report=reworded(of["train"][2].report))
    questions = [question for split in records for question in records[split][1]]
    data = root / "prepared"
    prepare(source, Records(studies, questions), VolumeProcessor("m3d", size=(32, 64, 64)), data, workers=2)
    result = audit(data, workers=2)
    return SimpleNamespace(data=data, result=result, originals=originals, studies={study.id: study for study in studies}, of=of)


def test_planted_volumes_are_found_and_no_others(planted: SimpleNamespace) -> None:
    found = planted.result["duplicates"]
    exact = [set(group) for group in found["volumes, exact"]["members"]]
    assert exact == [{"copies/exact", planted.originals["copies/exact"]}]
    pairs = {frozenset(pair[:2]) for pair in found["volumes, near"]["pairs"]}
    expected = {frozenset(pair) for pair in planted.originals.items()} - {frozenset(group) for group in exact}
    assert expected <= pairs, f"missed {expected - pairs}"
    for pair in pairs - expected:  # two series of one body may be alike, other bodies not
        assert len({planted.studies[planted.originals.get(study, study)].patient for study in pair}) == 1
    groups = {frozenset(group) for group in found["volumes, near"]["members"]}
    assert all(any({copy, original} <= group for group in groups) for copy, original in planted.originals.items())


def test_a_report_in_other_words_is_found(planted: SimpleNamespace) -> None:
    pairs = {frozenset(pair[:2]) for pair in planted.result["duplicates"]["reports, near"]["pairs"]}
    assert {planted.of["train"][2].id, planted.of["test"][1].id} in pairs


def test_the_cleaned_splits_can_be_evaluated(planted: SimpleNamespace) -> None:
    kept = json.loads((planted.data / "audit" / "deduplicated.json").read_text())
    assert len(kept["train"]) == 10 and "copies/within" in kept["train"]  # training stays whole
    left = {study for study in planted.studies if study not in sum(kept.values(), [])}
    assert left == {"copies/exact", "copies/noise", "copies/shift", "copies/bright", "copies/crop", "copies/twice"}
    assert planted.result["deduplicated"]["test"]["left_out"] == {"patient": 0, "volume": 5, "report": 0}
    data = PreparedData(planted.data, split_file=planted.data / "audit" / "deduplicated.json")
    assert [study.id for study in data.studies("test")] == kept["test"] and len(kept["test"]) == 2


def test_equal_reports_count_as_duplicates_where_requested(
    planted: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "similar_volumes", lambda *_: [])  # which takes seconds
    result = audit(planted.data, tmp_path, workers=1, by_reports=True)
    kept = json.loads((tmp_path / "deduplicated.json").read_text())
    assert planted.of["test"][1].id not in kept["test"] and planted.of["test"][0].id in kept["test"] and len(kept["train"]) == 10
    assert result["deduplicated"]["test"]["left_out"] == {"patient": 0, "volume": 1, "report": 1}


def test_a_second_audit_is_equal_and_reads_no_volume_again(
    planted: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = planted.data / "audit"
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    monkeypatch.setattr(duplicates, "_thumbnail", None)
    assert audit(planted.data, workers=1) == planted.result
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before


def test_the_tables_hold_no_report(planted: SimpleNamespace) -> None:
    text = (planted.data / "audit" / "audit.md").read_text()
    assert "| volumes, near" in text and "copies/shift" in text and "## Answers without the scan: test" in text and "## Labels" in text
    assert not any(study.report[:40] in text for study in planted.studies.values())


def test_the_command(planted: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "similar_volumes", lambda *_: [])
    assert main(["audit", str(planted.data), "--workers", "1", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "volumes, exact: 1 groups of 2 studies, 1 of them across splits" in said and "test: 6 kept, 1 left out" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.json", "audit.md", "deduplicated.json", "thumbnails"]
    assert main(["audit", str(tmp_path / "nowhere")]) == 2
    assert "holds no finished preparation" in capsys.readouterr().err and not (tmp_path / "nowhere").exists()


def test_alignment_finds_a_known_stretch_and_shift() -> None:
    """A smooth volume is aligned with itself resampled by scipy; the transform is recovered with a correlation near 1."""
    shape, random = (16, 32, 32), np.random.default_rng(0)
    volume = ndimage.gaussian_filter(random.random(shape), 2) * 1000
    stretch, shift = np.array([0.94, 1.05, 1.03]), np.array([0.05, -0.06, 0.04])  # from -1 to 1
    half = (np.array(shape) - 1) / 2
    moved = ndimage.affine_transform(volume, np.diag(stretch), half + shift * half - stretch * half, order=3, mode="nearest")
    best, moves = duplicates.align(torch.tensor(moved)[None].float(), torch.tensor(volume)[None].float(), torch.zeros(1, 2, 3), 10)
    assert best.item() > 0.99
    np.testing.assert_allclose(moves[0].numpy(), [stretch - 1, shift], atol=0.02)


def test_reports_by_plain_loops() -> None:
    """The Jaccard index of word pairs is computed without hashing."""
    reports = ["The liver is normal in size and shape today", "the liver is normal in size, and shape.", "Fracture of the left rib", "", ""]

    def phrases(text: str) -> set[tuple[str, str]]:
        words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
        return {(words[place], words[place + 1]) for place in range(len(words) - 1)}

    one, two = phrases(reports[0]), phrases(reports[1])
    assert duplicates.similar_reports(reports) == [(0, 1, round(len(one & two) / len(one | two), 4))]
    assert duplicates.similar_reports(reports, threshold=0.95) == []


def test_groups_by_hand() -> None:
    assert duplicates.groups(7, [(5, 1), (1, 3), (6, 4)]) == [0, 1, 2, 1, 4, 1, 4]
    assert duplicates.equal_groups("abcab") == [[0, 3], [1, 4]]


def test_duplicates_are_removed_from_later_splits() -> None:
    table = [("a", "train", "p1", 0, 0), ("b", "train", "p1", 0, 1), ("c", "test", "p1", 2, 2), ("d", "test", "p2", 0, 3)]
    table += [
        ("e", "test", "p3", 4, 1),
        ("f", "test", "p3", 4, 5),
        ("g", "val", "p4", 4, 6),
        ("h", "val", "p3", 7, 7),
        ("i", "val", "p5", 8, 8),
    ]
    studies = [Study(name, patient, f"{name}.nii", "", {}, split, "x") for name, split, patient, _, _ in table]
    volumes, reports = [row[3] for row in table], [row[4] for row in table]
    splits = split_order(["val", "test", "train"])
    assert splits == ["train", "test", "val"]
    kept, left = deduplicate(studies, splits, volumes)
    assert kept == {"train": ["a", "b"], "test": ["e"], "val": ["i"]}
    assert left["test"] == {"patient": 1, "volume": 2, "report": 0} and left["val"] == {"patient": 1, "volume": 1, "report": 0}
    kept, left = deduplicate(studies, splits, volumes, reports)
    assert kept["test"] == [] and left["test"]["report"] == 1


def question(text: str, answer: str, choices: tuple[str, ...] = (), kind: str = "plane", study: str = "s") -> Question:
    return Question(study, kind, text, choices, answer)


def test_the_split_used_instead_of_train_is_named(caplog: pytest.LogCaptureFixture) -> None:
    assert split_order(["test", "train_fixed"]) == ["train_fixed", "test"] and not caplog.messages
    assert split_order(["valid", "test"]) == ["test", "valid"]
    assert "no split begins with 'train'; 'test' counts as the training split" in caplog.text


def test_questions_that_reveal_their_answer_are_found() -> None:
    assert tells_answer(question("Is this axial CT axial or not?", "Axial", CHOICES))
    assert not tells_answer(question("Axial or coronal?", "Axial", CHOICES))  # another choice stands there too
    assert not tells_answer(question("Is it biaxial?", "Axial", CHOICES))  # whole words
    assert tells_answer(question("Where is the left-kidney cyst?", "left kidney"))
    assert not tells_answer(question("Is it so, yes?", "Yes", ("Yes", "No")))
    facts = question_facts([question("Axial?", "Axial", CHOICES, study=str(n)) for n in range(3)] + [question("Q", "Coronal", CHOICES)])
    assert facts["plane"] == {
        "questions": 4, "tell_their_answer": 3, "examples": ["0", "1", "2"], "different_answers": 2,
        "answers": {"Axial": 3, "Coronal": 1}, "letters": {"A": 3, "B": 1},
    }  # fmt: skip


def test_answers_without_the_scan_by_hand() -> None:
    train = (
        [question("Plane?", "Axial", CHOICES)] * 3 + [question("Plane?", "Coronal", CHOICES)] + [question("Organ?", "Liver", kind="organ")]
    )
    test = [question("Plane?", "Axial", CHOICES), question("Plane?", "Coronal", CHOICES), question("Another?", "Oblique", CHOICES)]
    test += [question("Organ?", "Liver", kind="organ"), question("New?", "Spleen", kind="organ")]
    assert text_only_baselines(train, test) == {"plane": 1 / 3, "organ": 0.5}
    habits = choice_habits(train, test)
    assert habits["chance"] == {"plane": 0.25} and habits["letter"] == {"plane": 1 / 3}
    assert habits["longest"] == {"plane": 0.0}  # "Sagittal" is the longest


def test_lengths_of_reports_by_hand() -> None:
    studies = [Study(str(n), "p", "a.nii", "word " * n, {}, "train", "test") for n in range(1, 101)]
    assert report_lengths(studies) == {"least": 1, "median": 50, "95 %": 95, "most": 100}


def test_a_question_of_more_choices_than_letters_has_no_letter() -> None:
    many = question("Which?", "organ 8", tuple(f"organ {number}" for number in range(9)))
    assert question_facts([many])["plane"]["letters"] == {}
    habits = choice_habits([many], [many])
    assert habits["letter"] == {"plane": 0.0} and habits["chance"] == {"plane": 1 / 9}

"""The phantom data set: fixed by its seed, split by patient, distinct reports, and answers that cannot be guessed from the text."""

import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from med3dvlm.datasets import m3d
from med3dvlm.datasets.audit import text_only_baselines
from med3dvlm.datasets.phantom import Plan, draw, plan_phantoms, write_phantoms
from med3dvlm.datasets.phantom.body import PHASES
from med3dvlm.datasets.phantom.wording import KINDS, kinds_of
from med3dvlm.records import LETTERS, QUESTION_KINDS, Question


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return plan_phantoms(2000, seed=0)


def of_split(plans: list[Plan], split: str) -> list[Plan]:
    return [plan for plan in plans if plan.study.split == split]


def questions(plans: list[Plan]) -> list[Question]:
    return [question for plan in plans for question in plan.questions]


def test_a_seed_fixes_everything() -> None:
    one, same, other = plan_phantoms(40, seed=3), plan_phantoms(40, seed=3), plan_phantoms(40, seed=4)
    assert one == same and one != other
    volumes = [draw(plan.body, plan.acquisition).array for plan in (one[0], same[0], one[1])]
    assert np.array_equal(volumes[0], volumes[1])
    assert volumes[0].shape != volumes[2].shape or not np.array_equal(volumes[0], volumes[2])


def test_splits_have_their_sizes_and_share_no_patient(plans: list[Plan]) -> None:
    assert Counter(plan.study.split for plan in plans) == {"train": 1800, "validation": 100, "test": 100}
    patients = {split: {plan.study.patient for plan in of_split(plans, split)} for split in m3d.SPLITS}
    assert sum(map(len, patients.values())) == len(set.union(*patients.values()))
    series = Counter(plan.study.patient for plan in plans)
    assert set(series.values()) == {1, 2}
    assert len({plan.study.id for plan in plans}) == len(plans)
    bodies = {patient: {plan.body for plan in plans if plan.study.patient == patient} for patient in list(series)[:50]}
    assert all(len(body) == 1 for body in bodies.values())


def test_no_report_occurs_twice_in_a_split(plans: list[Plan]) -> None:
    for split in m3d.SPLITS:
        reports = [plan.study.report for plan in of_split(plans, split)]
        assert len(set(reports)) == len(reports)


def test_a_report_states_what_is_present_and_what_is_absent(plans: list[Plan]) -> None:
    """It states every finding with its location, and denies only absent ones."""
    for plan in plans[:400]:
        present = [finding.kind for finding in plan.body.findings]
        assert plan.study.labels == {kind: int(kind in present) for kind in KINDS}
        report = plan.study.report
        for finding in plan.body.findings:
            assert finding.place in report or len(KINDS[finding.kind]["places"]) != 4, (finding, report)
        denied = re.search(r"(?:No|There is no|Without) ([^.]*)\.$", report)
        assert denied, report
        names = {KINDS[kind]["name"] for kind in kinds_of(plan.body.region)} - {KINDS[kind]["name"] for kind in present}
        assert set(re.split(", | or ", denied[1])) <= names


def test_every_kind_of_finding_is_common_enough_to_learn(plans: list[Plan]) -> None:
    train = of_split(plans, "train")
    assert len(KINDS) >= 10
    for kind in KINDS:
        assert sum(plan.study.labels[kind] for plan in train) > 100, kind


def test_questions_fit_their_study(plans: list[Plan]) -> None:
    for plan in plans[:400]:
        present = {KINDS[finding.kind]["name"].capitalize() for finding in plan.body.findings}
        organs = {KINDS[finding.kind]["organ"].capitalize() for finding in plan.body.findings}
        for question in plan.questions:
            assert question.study == plan.study.id
            if question.yes_no:
                asked = [name for name in (facts["name"] for facts in KINDS.values()) if re.search(rf"\b{name}\?", question.text)]
                assert (question.answer == "Yes") == (max(asked, key=len).capitalize() in present), question
                continue
            assert len(set(question.choices)) == 4
            right = {
                "plane": {plan.acquisition.plane.capitalize()},
                "phase": {plan.acquisition.phase.capitalize()},
                "organ": organs,
                "abnormality": present,
                "location": {finding.place.capitalize() for finding in plan.body.findings},
            }[question.kind]
            assert set(question.choices) & right == {question.answer} or question.kind == "location", question
            assert question.answer in right


def within(share: float, expected: float, count: int, deviations: float = 4.0) -> bool:
    """Returns whether a share of `count` draws lies within the binomial error of the expected share."""
    return abs(share - expected) < deviations * (expected * (1 - expected) / count) ** 0.5


def test_answers_cannot_be_guessed_from_the_text(plans: list[Plan]) -> None:
    """The text-only baseline is fitted to half of 900 training studies and tested on the other half."""
    train = of_split(plans, "train")
    test = questions(train[900:])
    scores = text_only_baselines(questions(train[:900]), test)
    counts = Counter("yes/no" if question.yes_no else question.kind for question in test)
    assert scores.keys() == {*QUESTION_KINDS, "yes/no"}
    for kind, score in scores.items():
        assert within(score, 0.5 if kind == "yes/no" else 0.25, counts[kind]), (kind, score, counts[kind])


@pytest.mark.parametrize("split", ["train", "test"])
def test_letters_answers_and_yes_and_no_are_balanced(split: str, plans: list[Plan]) -> None:
    asked = questions(of_split(plans, split))
    for kind in QUESTION_KINDS:
        closed = [question for question in asked if question.kind == kind and not question.yes_no]
        letters = Counter(question.letter for question in closed)
        assert all(within(letters[letter] / len(closed), 0.25, len(closed)) for letter in LETTERS[:4]), (kind, letters)
    answers = Counter(question.answer for question in asked if question.yes_no)
    assert answers["Yes"] == answers["No"]
    phases = Counter(question.answer for question in asked if question.kind == "phase")
    assert max(phases.values()) - min(phases.values()) <= 1 and len(phases) == len(PHASES)
    for text in {question.text for question in asked if question.yes_no}:
        said = Counter(question.answer for question in asked if question.text == text)
        assert within(said["Yes"] / said.total(), 0.5, said.total()), (text, said)


def test_no_choice_is_right_more_often_than_another(plans: list[Plan]) -> None:
    """Every choice is right in about a quarter of the questions that offer it."""
    asked = questions(of_split(plans, "train"))
    for kind in ("organ", "abnormality", "plane", "phase"):
        closed = [question for question in asked if question.kind == kind and not question.yes_no]
        offered = Counter(choice for question in closed for choice in question.choices)
        right = Counter(question.answer for question in closed)
        for choice, count in offered.items():
            assert abs(right[choice] / count - 0.25) < 0.08, (kind, choice, right[choice], count)


def test_a_small_data_set_has_three_splits() -> None:
    assert {plan.study.split for plan in plan_phantoms(10)} == set(m3d.SPLITS)
    with pytest.raises(ValueError, match="at least 10 studies, not 9"):
        plan_phantoms(9)


def test_another_plan_needs_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version may plan other studies for the same settings; its reports must not be mixed with older volumes."""
    write_phantoms(tmp_path, studies=10, detail=0.2, workers=1)
    write_phantoms(tmp_path, studies=10, detail=0.2, workers=1)
    monkeypatch.setattr("med3dvlm.datasets.phantom.PLANE_SHARES", {"axial": 1.0})
    with pytest.raises(ValueError, match="phantoms of other settings or of another version .*; choose another folder or delete it"):
        write_phantoms(tmp_path, studies=10, detail=0.2, workers=1)


def test_written_volumes_are_what_was_drawn(phantoms: Path) -> None:
    """Values are whole HU, the affine is the planned one, and the file's first axis is the last of (D, H, W)."""
    plan = plan_phantoms(28, seed=0, detail=0.5)[0]
    image = nib.load(phantoms / plan.study.image)
    canvas = draw(plan.body, plan.acquisition)
    assert np.array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), canvas.array.astype(np.int16))
    depth, height, width = (2, 3, 5)
    at = image.affine @ [width, height, depth, 1]
    np.testing.assert_allclose(at[:3], canvas.corner + canvas.directions @ [depth, height, width], atol=1e-3)
    assert canvas.array.min() < -900 and canvas.array.max() > 200  # air and bone


def volumes(root: Path) -> dict[str, np.ndarray]:
    return {path.relative_to(root).as_posix(): np.asarray(nib.load(path).dataobj) for path in sorted(root.rglob("[!p]*.nii.gz"))}


def test_a_killed_writing_continues(tmp_path: Path) -> None:
    """It is killed after the third volume; complete files stay, and the result equals an uninterrupted run."""

    def write() -> None:
        os.setsid()
        write_phantoms(tmp_path / "killed", studies=12, seed=5, detail=0.5, workers=1)

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    deadline = time.monotonic() + 120
    while len(volumes(tmp_path / "killed")) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(FileNotFoundError, match="M3D_Cap.json is missing"):
        m3d.read(tmp_path / "killed", "train")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("[!p]*.nii.gz")}
    assert 3 <= len(done)
    write_phantoms(tmp_path / "killed", studies=12, seed=5, detail=0.5, workers=1)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    write_phantoms(tmp_path / "whole", studies=12, seed=5, detail=0.5, workers=2)
    killed, whole = volumes(tmp_path / "killed"), volumes(tmp_path / "whole")
    assert killed.keys() == whole.keys() and len(whole) == 12
    assert all(np.array_equal(killed[name], whole[name]) for name in whole)
    for split in m3d.SPLITS:
        assert m3d.read(tmp_path / "killed", split) == m3d.read(tmp_path / "whole", split)
    assert not list(tmp_path.rglob("part-*"))

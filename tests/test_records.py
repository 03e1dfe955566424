"""Records on disk: round trips, and wrong fields named by file and line."""

import json
from pathlib import Path

import pytest

from med3dvlm.files import write_lines
from med3dvlm.records import ALL_KINDS, QUESTION_KINDS, Question, Study, fields_of, read_questions, read_studies

READING = {"hu": "auto", "rescale": [1.0, -8192.0], "spacing": [1.5, 0.8, 0.8], "orientation": "SPL"}


def test_reading_settings_round_trip(tmp_path: Path) -> None:
    studies = [
        Study("a", "p", "a.nii", "A mass.", {"mass": 1}, "train", "ct_rate", READING),
        Study("b", "p", "b.nii", "", {}, "test", "m3d"),
    ]
    write_lines(tmp_path / "studies.jsonl", map(fields_of, studies))
    assert read_studies(tmp_path / "studies.jsonl") == studies
    assert studies[1].reading == {} and studies[1].reading is not Study("c", "p", "c.nii", "", {}, "test", "m3d").reading
    line = json.loads((tmp_path / "studies.jsonl").read_text().splitlines()[0])
    for change in ({"reading": None}, {"age": 4}):
        wrong = {name: value for name, value in (line | change).items() if value is not None}
        (tmp_path / "studies.jsonl").write_text(json.dumps(wrong) + "\n")
        with pytest.raises(ValueError, match="studies.jsonl line 1: missing fields .*, unknown fields .*; a Study has"):
            read_studies(tmp_path / "studies.jsonl")


def test_questions_of_other_kinds_round_trip(tmp_path: Path) -> None:
    questions = [Question("a", kind, "What?", (), "That") for kind in ALL_KINDS]
    write_lines(tmp_path / "questions.jsonl", map(fields_of, questions))
    assert read_questions(tmp_path / "questions.jsonl") == questions
    assert QUESTION_KINDS == ("plane", "phase", "organ", "abnormality", "location") and ALL_KINDS[5:] == ("other",)
    with pytest.raises(ValueError, match="question kind 'colour' of study a is unknown; known: plane, .*, other"):
        Question("a", "colour", "What?", (), "That")

"""Question answering: ranking of choices one conversation at a time, independence of batch size, continuation, scores by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from med3dvlm.checkpoints import load_vlm
from med3dvlm.datasets.audit import text_only_baselines
from med3dvlm.datasets.store import PreparedData
from med3dvlm.encoders.base import Encoder
from med3dvlm.evaluation import other_patients
from med3dvlm.evaluation.question_scores import question_scores, question_tables
from med3dvlm.models.vlm_processor import exchange
from med3dvlm.prompts import closed_prompt
from med3dvlm.records import Question
from tests.launching import launch

Run = Callable[..., None]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def arguments(demo: SimpleNamespace) -> list[object]:
    return ["--model", demo.model, "--data", demo.root / "prepared", "--max-new-tokens", 8]


@pytest.fixture
def whole(evaluated: Path) -> Path:
    return evaluated / "eval" / "vqa"


def test_every_question_has_a_prediction(demo: SimpleNamespace, whole: Path) -> None:
    asked = [question for study in demo.data.studies("test") for question in demo.data.questions("test") if question.study == study.id]
    assert len(asked) == len(demo.data.questions("test"))
    assert [(row["id"], row["question"], tuple(row["choices"])) for row in rows_of(whole)] == [(q.study, q.text, q.choices) for q in asked]
    assert {row["kind"] for row in rows_of(whole)} == {"plane", "phase", "organ", "abnormality", "location"}


def test_ranking_equals_plain_likelihoods(demo: SimpleNamespace, whole: Path) -> None:
    """Each choice is scored by itself, without branches and padding, from all logits in a loop over the answer's tokens."""
    model, processor = load_vlm(demo.model)
    listed = demo.data.studies("test")
    studies = {study.id: study for study in listed}
    stranger = {study.id: listed[place] for study, place in zip(listed, other_patients(listed), strict=True)}
    worst = 0.0
    rows = rows_of(whole)
    for row in rows:
        volume = demo.data.volume(studies[row["id"]])[None].float() / 255
        other = demo.data.volume(stranger[row["id"]])[None].float() / 255
        for column, pixels in (("closed", volume), ("blind", torch.zeros_like(volume)), ("shuffled", other)):
            for choice, found in zip(row["choices"], row[column], strict=True):
                coded = processor.encode(exchange(row["question"], choice))
                with torch.no_grad():
                    logits = model(torch.tensor([coded["input_ids"]]), pixel_values=pixels).logits[0]
                terms = [float(logits[place - 1].log_softmax(-1)[label]) for place, label in enumerate(coded["labels"]) if label != -100]
                assert len(terms) > 1  # at least a word and the end of the turn
                worst = max(worst, abs(math.fsum(terms) / len(terms) - found))
    assert worst < 1.5e-4  # they are written with four decimals; 5e-5 measured
    assert any(row["closed"] != row["blind"] for row in rows) and any(row["closed"] != row["shuffled"] for row in rows)


def test_texts_equal_plain_greedy_decoding(demo: SimpleNamespace, whole: Path) -> None:
    """The reference decodes token by token from the full logits, without cache and padding."""
    model, processor = load_vlm(demo.model)
    studies = {study.id: study for study in demo.data.studies("test")}
    row = next(row for row in rows_of(whole) if row["letter"] is not None)
    volume = demo.data.volume(studies[row["id"]])[None].float() / 255
    for column, prompt, length in (("letter", closed_prompt(row["question"], row["choices"]), 8), ("open", row["question"], 8)):
        tokens = processor.encode([{"role": "user", "content": prompt}], generate=True)["input_ids"]
        start = len(tokens)
        while len(tokens) < start + length and tokens[-1] != processor.tokenizer.eos_token_id:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]), pixel_values=volume).logits[0, -1].argmax()))
        assert row[column] == processor.tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_matter(whole: Path, run: Run, arguments: list[object], tmp_path: Path, batch_size: int) -> None:
    run("vqa", *arguments, "--output", tmp_path, "--batch-size", batch_size)
    assert (tmp_path / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
    for one, other in zip(rows_of(tmp_path), rows_of(whole), strict=True):
        for column in ("closed", "blind", "shuffled"):
            assert one.pop(column) == pytest.approx(other.pop(column), abs=1.01e-4)  # rounded to four decimals
        assert one == other


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.77])
def test_an_interrupted_run_continues_to_the_same_bytes(
    whole: Path, run: Run, arguments: list[object], tmp_path: Path, kept: float
) -> None:
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    content = (whole / "predictions.jsonl").read_bytes()
    (tmp_path / "predictions.jsonl").write_bytes(content[: int(kept * len(content))])
    run("vqa", *arguments, "--output", tmp_path, "--batch-size", 2)
    assert (tmp_path / "predictions.jsonl").read_bytes() == content
    assert (tmp_path / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()


def test_a_killed_program_continues_to_the_same_bytes(whole: Path, run: Run, arguments: list[object], tmp_path: Path) -> None:
    output, log = tmp_path / "killed", tmp_path / "log"
    flags = (*arguments, "--output", output, "--batch-size", 2)
    assert launch("python", 1, "eval/vqa.py", *flags, log=log, kill_at=output / "predictions.jsonl") == [-9], log.read_text()
    run("vqa", *flags)
    assert (output / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert (output / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()


def test_scoring_again_needs_no_model_and_gives_the_same_bytes(
    demo: SimpleNamespace, whole: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "scores.json").read_bytes()
    (whole / "scores.json").unlink()
    run("vqa", "--data", demo.root / "prepared", "--output", whole, "--score-only")
    assert (whole / "scores.json").read_bytes() == before
    assert capsys.readouterr().out == (whole / "scores.md").read_text()


def test_scores_by_hand() -> None:
    """Three plane questions, one right; one phase question, right: the mean of the kinds is (1/3 + 1) / 2, not 2/4."""

    def row(study: str, kind: str, right: bool, blind: bool, letter: str, written: str) -> dict[str, Any]:
        likelihoods = {True: [-3.0, -1.0, -2.0], False: [-1.0, -3.0, -2.0]}
        return {
            "id": study, "kind": kind, "question": kind, "choices": ["x", "the y", "z"], "answer": "the y",
            "closed": likelihoods[right], "blind": likelihoods[blind], "letter": letter, "open": written,
        }  # fmt: skip

    rows = [
        row("a", "plane", True, False, "B.", "The Y."),
        row("b", "plane", False, False, "A", "y"),
        row("c", "plane", False, True, "", "z"),
        row("a", "phase", True, False, "B", "the y"),
        {
            "id": "a", "kind": "abnormality", "question": "?", "choices": ["Yes", "No"], "answer": "No",
            "closed": [-1.0, -2.0], "blind": [-2.0, -1.0], "letter": None, "open": None,
        },
    ]  # fmt: skip
    scores = question_scores(rows, {"a": "p", "b": "q", "c": "q"})
    assert scores["closed"]["plane"] == pytest.approx(1 / 3) and scores["closed"]["phase"] == 1
    assert scores["closed"]["accuracy"] == pytest.approx(2 / 3) and scores["closed"]["of_questions"] == 2 / 4
    assert "organ" not in scores["closed"]
    assert scores["closed"]["blind"]["accuracy"] == pytest.approx((1 / 3 + 0) / 2)
    assert scores["letter"]["accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert scores["open"]["plane"]["exact"] == pytest.approx(1 / 3)
    assert scores["open"]["plane"]["token_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert scores["open"]["exact"] == pytest.approx((1 / 3 + 1) / 2)
    assert scores["yes_no"]["accuracy"] == 0 and scores["yes_no"]["blind"]["accuracy"] == 1
    assert "shuffled" not in scores["closed"] and "modal" not in scores["closed"]
    # "B." and "B" name the right choice alone; "A" the wrong one, and nothing is said to the third.
    assert scores["strict"]["plane"] == pytest.approx(1 / 3) and scores["strict"]["phase"] == 1
    assert scores["closed"]["confusion"]["plane"] == {"right": ["the y"], "chosen": ["the y", "x"], "counts": [[1, 2]]}
    assert scores["letter"]["confusion"]["plane"] == {"right": ["B"], "chosen": ["A", "B", "none"], "counts": [[1, 1, 1]]}
    assert scores["questions"] == {"plane": 3, "phase": 1, "organ": 0, "abnormality": 0, "location": 0, "yes_no": 1}
    low, high = scores["closed"]["accuracy_interval"]
    assert low == 0 and high == 1  # patient p alone has both right, patient q alone none
    assert question_scores(rows[:4], {"a": "p", "b": "q", "c": "q"})["yes_no"]["accuracy"] is None


def test_questions_of_a_users_own_kind_are_scored() -> None:
    """The mean is over all kinds that occur, including the user's."""
    row = {
        "id": "a",
        "question": "?",
        "choices": ["Left", "Right"],
        "answer": "Left",
        "closed": [1, 0],
        "blind": [0, 1],
        "letter": "A",
        "open": "Left",
    }
    scores = question_scores([{**row, "kind": "plane"}, {**row, "kind": "other", "closed": [0, 1]}, {**row, "kind": "other"}], {"a": "p"})
    assert (scores["closed"]["plane"], scores["closed"]["other"], scores["closed"]["accuracy"]) == (1.0, 0.5, 0.75)
    assert scores["questions"] == {"plane": 1, "phase": 0, "organ": 0, "abnormality": 0, "location": 0, "other": 2, "yes_no": 0}


def closed_row(choices: list[str], answer: str, likelihoods: list[float], letter: str | None = None) -> dict[str, Any]:
    common = {"id": "a", "kind": "organ", "question": "?", "open": ""}
    return common | {"choices": choices, "answer": answer, "closed": likelihoods, "letter": letter}


@pytest.mark.parametrize(
    ("choices", "answer", "likelihoods", "letter", "right"),
    [
        # Listed twice: right at both places, by whichever of them it is chosen or named; (likeliest, letter, strict).
        (["Left", "Right", "Left"], "Left", [-1, -2, -1], "C", (1, 1, 1)),
        (["Left", "Right", "Left"], "Left", [-1, -2, -1], "A. Left", (1, 1, 1)),
        (["Left", "Right", "Left"], "Left", [-1, -2, -1], "A or C", (1, 1, 1)),
        (["Left", "Right", "left."], "left.", [-1, -2, -3], "A", (1, 1, 1)),
        (["Right", "Left", "Right"], "Left", [-1, -2, -1], "C. Right", (0, 0, 0)),
        (["Left", "Right", "Left"], "Left", [-2, -1, -2], "B or C", (0, 0, 0)),
        # As likely as a wrong one is not chosen, wherever it stands.
        (["Left", "Right"], "Left", [-1, -1], "A", (0, 1, 1)),
        (["Right", "Left"], "Left", [-1, -1], "B", (0, 1, 1)),
        (["Left", "Right", "Left"], "Left", [-1, -1, -1], "Hepatitis A", (0, 1, 0)),
    ],
)
def test_choices_listed_twice_and_ties(
    choices: list[str], answer: str, likelihoods: list[float], letter: str, right: tuple[int, int, int]
) -> None:
    scores = question_scores([closed_row(choices, answer, likelihoods, letter)], {"a": "p"})
    assert tuple(scores[way]["accuracy"] for way in ("closed", "letter", "strict")) == right
    table = scores["letter"]["confusion"]["organ"]
    assert (table["right"] == table["chosen"]) == bool(right[1])
    assert (scores["closed"]["confusion"]["organ"]["chosen"] == [answer]) == bool(right[0])


def test_the_most_frequent_choice_listed_twice() -> None:
    train = [Question("t", "organ", "?", ("left.", "Right"), "left.")]
    row = closed_row(["Right", "Left", "left."], "Left", [-1, -2, -3], "A")
    assert question_scores([row], {"a": "p"}, train)["closed"]["modal"]["accuracy"] == 1


def test_more_choices_than_letters() -> None:
    """Questions with nine choices are ranked, but have no letter for the ninth, so they are left out of scores by letter, as the table says."""
    nine = [f"organ {number}" for number in range(9)]
    rows = [
        closed_row(nine, "organ 8", [-2.0] * 8 + [-1.0]),
        closed_row(nine[:8], "organ 7", [-2.0] * 7 + [-1.0], "H."),
        closed_row(nine[:8], "organ 7", [-2.0] * 7 + [-1.0], "organ 7 or organ 6"),
    ]
    scores = question_scores(rows, {"a": "p"})
    assert scores["closed"]["accuracy"] == 1 and scores["letter"]["accuracy"] == scores["strict"]["accuracy"] == 0.5
    assert scores["letter"]["left_out"] == scores["strict"]["left_out"] == 1
    assert "\n\n1 have more than 8 choices, so no letters" in question_tables(scores)
    alone = question_scores(rows[:1], {"a": "p"})
    assert alone["letter"]["accuracy"] is None and alone["closed"]["accuracy"] == 1


@pytest.mark.parametrize("likelihoods", [[-1.0], None, [-1.0, math.nan], [-1.0, -math.inf]])
def test_a_record_must_say_how_likely_each_choice_is(likelihoods: list[float] | None) -> None:
    row = closed_row(["Left", "Right"], "Left", [-1.0, -2.0], "A")
    with pytest.raises(ValueError, match="a record about a lacks a number for each of its 2 choices as 'closed'"):
        question_scores([row, row | {"closed": likelihoods}], {"a": "p"})


def test_a_question_of_nine_choices_is_asked_without_letters(
    demo: SimpleNamespace, run: Run, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nine = tuple(f"organ {number}" for number in range(9))
    asked = [Question(demo.data.studies("test")[0].id, "organ", "Which?", choices, "organ 1") for choices in (nine, nine[:3])]
    monkeypatch.setattr(PreparedData, "questions", lambda self, split: asked)
    run("vqa", *arguments, "--output", tmp_path, "--limit", 1)
    many, few = rows_of(tmp_path)
    assert many["letter"] is None and len(many["closed"]) == 9 and isinstance(many["open"], str)
    assert isinstance(few["letter"], str) and json.loads((tmp_path / "scores.json").read_text())["letter"]["left_out"] == 1


def test_balanced_accuracy_by_hand() -> None:
    """Answering always "Yes" is right in three of four questions, and for one of two answers."""
    row = {"id": "a", "kind": "abnormality", "question": "?", "choices": ["Yes", "No"], "closed": [0.0, -1.0], "letter": None, "open": None}
    scores = question_scores([{**row, "answer": answer} for answer in ("Yes", "Yes", "Yes", "No")], {"a": "p"})["yes_no"]
    assert (scores["of_questions"], scores["balanced_accuracy"], scores["sensitivity"], scores["specificity"]) == (0.75, 0.5, 1.0, 0.0)


def test_the_most_frequent_answer_equals_the_audits(demo: SimpleNamespace, whole: Path) -> None:
    """Its accuracy equals that of the audit, which counts independently."""
    scores = json.loads((whole / "scores.json").read_text())
    expected = text_only_baselines(demo.data.questions("train"), demo.data.questions("test"))
    for kind in ("plane", "phase", "organ", "abnormality", "location"):
        assert scores["closed"]["modal"][kind] == pytest.approx(expected[kind], abs=1e-6)
    if scores["questions"]["yes_no"]:
        assert scores["yes_no"]["modal"]["of_questions"] == pytest.approx(expected["yes/no"], abs=1e-6)


def test_an_answer_that_is_no_text_is_refused(demo: SimpleNamespace, whole: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    rows = rows_of(whole)
    rows[1]["letter"] = None
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="line 2, about .*, has no text as 'letter'"):
        run("vqa", "--data", demo.root / "prepared", "--output", tmp_path, "--score-only")
    rows[1] |= {"letter": "A", "answer": next(choice for choice in rows[1]["choices"] if choice != rows[1]["answer"])}
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="line 2, about .*, has another answer than the data"):
        run("vqa", "--data", demo.root / "prepared", "--output", tmp_path, "--score-only")


def test_each_volume_is_encoded_once(demo: SimpleNamespace, run: Run, arguments: list[object], tmp_path: Path) -> None:
    """This holds for volumes with several questions, for those that replace another one, and for the empty volume."""
    seen: list[int] = []
    forward = Encoder.forward

    def counted(self: Encoder, volume: torch.Tensor, *others: Any) -> Any:
        seen.append(len(volume))
        return forward(self, volume, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "forward", counted)
        run("vqa", *arguments, "--output", tmp_path, "--batch-size", 1)
    assert sum(seen) == len(demo.data.studies("test")) + 1


def test_tables_name_every_figure(whole: Path) -> None:
    scores = json.loads((whole / "scores.json").read_text())
    text = question_tables(scores)
    assert (whole / "scores.md").read_text() == text + "\n"
    for label in ("likeliest choice, blind", "likeliest choice, shuffled", "usual answer in training", "right choice named, no other"):
        assert f"| {label} " in text
    low, high = scores["closed"]["accuracy_interval"]
    assert f"{scores['closed']['accuracy']:.3f} ({low:.3f} to {high:.3f})" in text

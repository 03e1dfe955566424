"""Sides of answers: closed questions whose choices differ in side, by hand."""

import pytest

from med3dvlm.evaluation.question_scores import question_scores, question_tables

CHOICES = ["left upper lobe", "left lower lobe", "right upper lobe", "right lower lobe"]


def row(number: int, answer: str, closed: list[float], choices: list[str] = CHOICES) -> dict[str, object]:
    blind = [1.0, 0.0, 0.0, 0.0][: len(choices)]
    common = {"id": f"study{number}", "question": "Where?", "kind": "location", "answer": answer, "choices": choices}
    return common | {"closed": closed, "blind": blind, "letter": "A", "open": answer}


def test_the_side_of_the_likeliest_choice() -> None:
    """The side is right twice, once by another lobe of it, and wrong once; two other questions name no side in choices or answer."""
    rows = [
        row(0, CHOICES[0], [-1.0, -2, -3, -4]),
        row(1, CHOICES[0], [-2.0, -1, -3, -4]),
        row(2, CHOICES[3], [-2.0, -1, -3, -4]),
        row(3, "liver", [-1.0, -2, -3], ["liver", "left kidney", "right kidney"]),
        row(4, "left kidney", [-1.0, -2], ["left kidney", "liver"]),
    ]
    scores = question_scores(rows, {f"study{number}": str(number) for number in range(5)})
    sides = scores["laterality"]
    assert sides["questions"] == 3 and sides["accuracy"] == pytest.approx(2 / 3) and sides["chance"] == 0.5
    assert sides["blind"]["accuracy"] == pytest.approx(2 / 3) and sides["interval"][0] <= 2 / 3 <= sides["interval"][1]
    assert "Of 3 questions whose choices differ in side" in question_tables(scores)
    assert question_scores(rows[3:], {"study3": "3", "study4": "4"})["laterality"]["accuracy"] is None

"""Sides of findings in hand-made sentences, and their scores by counting."""

import pytest

from med3dvlm.metrics.laterality import finding_sides, laterality_scores, side_in

SENTENCES = [
    ("Left pleural effusion.", {"pleural_effusion": "left"}),
    ("Pleural effusion on the right, 30 mm deep.", {"pleural_effusion": "right"}),
    ("Bilateral pleural effusions.", {"pleural_effusion": "both"}),
    ("Pleural effusion on both sides.", {"pleural_effusion": "both"}),
    ("Pleural effusion on the right and on the left.", {"pleural_effusion": "both"}),
    ("Pleural effusion, larger on the right.", {"pleural_effusion": "right"}),
    ("Right pleural effusion and left lower lobe consolidation.", {"pleural_effusion": "right", "consolidation": "left"}),
    ("Consolidation in the left lower lobe, effusion in the right pleural space.", {"consolidation": "left"}),
    ("Consolidation and atelectasis in the left lower lobe.", {"consolidation": "left", "atelectasis": "left"}),
    ("In the right upper lobe, a lung nodule of 9 mm.", {"lung_nodule": "right"}),
    ("Lung nodule in the right middle lobe. Lung nodule in the lingula.", {"lung_nodule": "both"}),
    ("Cardiomegaly and left-sided pleural effusion.", {"cardiomegaly": None, "pleural_effusion": "left"}),
    ("Cardiomegaly, pleural effusion on the left.", {"cardiomegaly": None, "pleural_effusion": "left"}),
    ("No pleural effusion on the right.", {}),
    ("No left pleural effusion; consolidation on the right.", {"consolidation": "right"}),
    ("No pleural effusion on the left. Pleural effusion on the right.", {"pleural_effusion": "right"}),
    ("Kidney stone of 6 mm in the LEFT kidney.", {"kidney_stone": "left"}),
    ("Emphysema in both lungs.", {"emphysema": "both"}),
    ("Consolidation.", {"consolidation": None}),
    ("Pleural effusion: left", {"pleural_effusion": "left"}),
    ("", {}),
]


@pytest.mark.parametrize(("text", "wanted"), SENTENCES)
def test_sides_of_findings(text: str, wanted: dict[str, str | None]) -> None:
    found = finding_sides(text)
    assert {name: found[name] for name in wanted} == wanted
    assert set(found) - {"pleural_effusion"} == set(wanted) - {"pleural_effusion"}


def test_a_finding_does_not_take_the_side_of_another() -> None:
    text = "Left pleural effusion, consolidation on the right."
    assert finding_sides(text, ["consolidation"]) == {"consolidation": "right"}
    assert finding_sides(text, ["pleural_effusion"]) == {"pleural_effusion": "left"}
    with pytest.raises(ValueError, match="Unknown finding 'effusion of words'"):
        finding_sides(text, ["effusion of words"])


def test_side_of_an_answer() -> None:
    answers = {
        "Left lower lobe": "left",
        "the right kidney": "right",
        "both lungs": "both",
        "left and right": "both",
        "liver": None,
        "": None,
    }
    assert {text: side_in(text) for text in answers} == answers
    assert side_in("upright, leftover and bright") is None


def test_scores_by_counting() -> None:
    """The effusion's side is right, the consolidation's opposite, the nodule has none; findings in one report only do not count."""
    references = [
        "Left pleural effusion. Right lower lobe consolidation.",
        "Lung nodule in the left upper lobe. Cardiomegaly.",
        "Kidney stone in the right kidney.",
        "",
    ]
    written = [
        "Pleural effusion on the left. Consolidation in the left lower lobe.",
        "Lung nodule. Cardiomegaly.",
        "Left pleural effusion.",
        "Left pleural effusion.",
    ]
    scores = laterality_scores(written, references, ["a", "b", "c", "d"])
    assert scores["findings"] == 3
    assert scores["accuracy"] == scores["opposite"] == scores["unnamed"] == pytest.approx(1 / 3)
    assert scores["confusion"] == {"left": {"left": 1, "none": 1}, "right": {"left": 1}}
    low, high = scores["interval"]
    assert 0 <= low <= 1 / 3 <= high <= 1
    assert laterality_scores(references, references, ["a", "b", "c", "d"])["accuracy"] == 1
    assert laterality_scores([""], [""], ["a"]) == {
        "findings": 0, "accuracy": None, "interval": None, "opposite": None, "unnamed": None, "confusion": {},
    }  # fmt: skip

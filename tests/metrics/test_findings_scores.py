"""Scores of findings in generated reports, worked out by hand, and the kinds of disagreement."""

import pytest

from med3dvlm.metrics.classification import crg, precision_recall_f1
from med3dvlm.metrics.findings import error_kind
from med3dvlm.reports.findings import find_mentions


def test_scores_of_three_reports_by_hand() -> None:
    labels = [[1, 0], [1, 1], [0, 0]]
    stated = [[1, 1], [0, 1], [0, 0]]
    scores = precision_recall_f1(labels, stated, ["effusion", "nodule"])
    assert scores["per_class"]["effusion"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2, "predicted": 1}
    assert scores["per_class"]["nodule"]["precision"] == 0.5 and scores["per_class"]["nodule"]["recall"] == 1.0
    assert scores["macro"] == pytest.approx({"precision": 0.75, "recall": 0.75, "f1": 2 / 3})
    assert scores["micro"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    # X = 6 decisions, A = 3 positives: r = 3/6, U = 3/2; TP 2, FN 1, FP 1: s = 1 - 1/2 - 1 = -1/2; CRG = 1.5 / 3.5
    assert crg(labels, stated) == pytest.approx(3 / 7)


def test_crg_of_perfect_and_of_empty_reports() -> None:
    labels = [[1, 0, 0, 0], [0, 1, 0, 0]]  # X = 8, A = 2: r = 6/4, U = 3
    assert crg(labels, labels) == pytest.approx(1.0)  # s = 3
    assert crg(labels, [[0] * 4] * 2) == pytest.approx(1 / 3)  # s = -3
    assert crg([[0, 0]], [[1, 0]]) is None  # no positive: r has no value


@pytest.mark.parametrize(
    ("label", "report", "kind"),
    [
        (1, "No nodule.", "missed: named, but taken back by a cue"),
        (1, "The lungs are abnormal.", "missed: not named in the rules' words"),
        (0, "A nodule.", "invented: stated plainly, once"),
        (0, "A nodule of 5 mm. A nodule of 6 mm.", "invented: stated plainly, in several sentences"),
        (0, "Possibly a nodule.", "invented: stated with doubt"),
        (0, "A nodule, unchanged from the previous scan.", "invented: stated beside an earlier scan"),
    ],
)
def test_error_kinds(label: int, report: str, kind: str) -> None:
    assert error_kind(label, find_mentions(report, ["lung_nodule"])) == kind


def test_agreement_has_no_kind() -> None:
    with pytest.raises(ValueError, match="only a disagreement"):
        error_kind(1, find_mentions("A nodule.", ["lung_nodule"]))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        crg([[1], [0]], [[1]])

"""Precision, recall, F1, accuracy and AUROC against loops over studies and pairs."""

import numpy as np
import pytest
from numpy.typing import NDArray

from med3dvlm.metrics.classification import accuracy, auroc, precision_recall_f1


@pytest.fixture
def decisions() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """31 studies, 5 findings; finding 3 is never present but sometimes stated, finding 4 neither."""
    generator = np.random.default_rng(1)
    labels = (generator.random((31, 5)) < (0.5, 0.3, 0.1, 0, 0)).astype(int)
    predictions = np.where(generator.random((31, 5)) < 0.2, 1 - labels, labels)
    predictions[:, 4] = 0
    return labels, predictions


def looped(labels: list[int], predictions: list[int]) -> tuple[float, float, float]:
    hits = false_alarms = misses = 0
    for label, prediction in zip(labels, predictions, strict=True):
        hits += label == 1 and prediction == 1
        false_alarms += label == 0 and prediction == 1
        misses += label == 1 and prediction == 0
    precision = hits / (hits + false_alarms) if hits + false_alarms else 0.0
    recall = hits / (hits + misses) if hits + misses else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_scores_equal_loops(decisions: tuple[NDArray[np.int64], NDArray[np.int64]]) -> None:
    labels, predictions = decisions
    scores = precision_recall_f1(labels, predictions, names="abcde")
    expected = [looped(labels[:, k].tolist(), predictions[:, k].tolist()) for k in range(4)]
    for name, values in zip("abcd", expected, strict=True):
        entry = scores["per_class"][name]
        assert (entry["precision"], entry["recall"], entry["f1"]) == pytest.approx(values)
    for index, key in enumerate(("precision", "recall", "f1")):
        values = [value[index] for value in expected]
        assert scores["macro"][key] == pytest.approx(sum(values) / 4)
        weighted = sum(value * labels[:, k].sum() for k, value in enumerate(values)) / labels.sum()
        assert scores["weighted"][key] == pytest.approx(weighted)
        flat = looped(labels.ravel().tolist(), predictions.ravel().tolist())
        assert scores["micro"][key] == pytest.approx(flat[index])
    assert scores["per_class"]["d"]["f1"] == 0  # stated, never present: wrong
    assert scores["per_class"]["e"]["f1"] is None  # says nothing, stays out of the average
    assert scores["per_class"]["a"]["support"] == labels[:, 0].sum()


def test_nothing_to_score() -> None:
    scores = precision_recall_f1(np.zeros((3, 2)), np.zeros((3, 2)))
    assert scores["macro"]["f1"] is None and scores["weighted"]["f1"] is None and scores["micro"]["f1"] == 0


def test_accuracy() -> None:
    assert accuracy(["A", "B", "C"], ["A", "B", "D"]) == pytest.approx(2 / 3)
    assert accuracy(np.eye(3), np.zeros((3, 3))) == pytest.approx(6 / 9)
    with pytest.raises(ValueError, match="equally many"):
        accuracy([], [])


def test_auroc_is_the_chance_of_the_right_order() -> None:
    generator = np.random.default_rng(2)
    labels = (generator.random((23, 3)) < 0.4).astype(int)
    labels[:, 2] = 1
    scores = generator.integers(0, 5, (23, 3)).astype(float)  # few values, so many ties
    result = auroc(labels, scores)
    expected = []
    for k in range(2):
        pairs = [(p, n) for p in scores[labels[:, k] == 1, k] for n in scores[labels[:, k] == 0, k]]
        expected.append(sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs))
    assert [result["per_class"]["0"], result["per_class"]["1"]] == pytest.approx(expected)
    assert result["per_class"]["2"] is None
    assert result["macro"] == pytest.approx(sum(expected) / 2)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and predictions \(3, 3\)"):
        precision_recall_f1(np.zeros((2, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="0 or 1"):
        precision_recall_f1([[2, 0]], [[1, 0]])
    with pytest.raises(ValueError, match="for 2 findings"):
        precision_recall_f1([[1, 0]], [[1, 0]], names=["one"])
    with pytest.raises(ValueError, match="NaN"):
        auroc([[1, 0]], [[np.nan, 0]])

"""Precision, recall, F1, accuracy and AUROC against loops over studies and pairs."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from med3dvlm.metrics.classification import (
    accuracy,
    auprc,
    auroc,
    choose_thresholds,
    crg,
    ct_clip_scores,
    dcformer_scores,
    precision_recall_f1,
    vlm3d_scores,
)


@pytest.fixture
def decisions() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return labels and predictions of 31 studies and 5 findings; finding 3 is never present but sometimes predicted, finding 4 neither."""
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


def test_auroc_is_the_probability_of_the_right_order() -> None:
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


@pytest.fixture
def believed() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return labels and scores of 53 studies and 6 findings; scores have one decimal, so that many tie; the last finding is rare."""
    generator = np.random.default_rng(3)
    labels = (generator.random((53, 6)) < (0.5, 0.4, 0.3, 0.2, 0.1, 0.04)).astype(int)
    labels[0, 5] = 1
    return labels, np.round(np.clip(0.3 * labels + 0.7 * generator.random((53, 6)), 0, 1), 1)


def test_auprc_equals_a_loop(believed: tuple[NDArray[np.int64], NDArray[np.float64]]) -> None:
    labels, scores = believed
    expected = []
    for label, score in zip(labels.T, scores.T, strict=True):
        area, found = 0.0, 0
        for threshold in sorted(set(score.tolist()), reverse=True):
            hits, said = int(label[score >= threshold].sum()), int((score >= threshold).sum())
            area, found = area + hits / said * (hits - found) / label.sum(), hits
        expected.append(area)
    assert list(auprc(labels, scores)["per_class"].values()) == pytest.approx(expected, abs=1e-12)
    assert auprc(labels, scores)["macro"] == pytest.approx(np.mean(expected))


def test_auprc_by_hand() -> None:
    # From the top: hit (precision 1), miss, hit (2/3); each hit brings half of the recall. A tie of hit and miss: 1/2 for it.
    assert auprc([[1], [0], [1], [0]], [[4], [3], [2], [1]])["macro"] == pytest.approx((1 + 2 / 3) / 2)
    assert auprc([[1], [0]], [[1], [1]])["macro"] == pytest.approx(1 / 2)
    assert auprc([[0, 1], [0, 1]], [[1, 1], [2, 2]])["per_class"] == {"0": None, "1": 1}


@pytest.mark.parametrize("rule", ["youden", "nearest", "f1"])
def test_thresholds_are_the_best_of_all(rule: str, believed: tuple[NDArray[np.int64], NDArray[np.float64]]) -> None:
    labels, scores = believed
    for positive, score, threshold in zip(labels.T, scores.T, choose_thresholds(labels, scores, rule), strict=True):
        merits = {}
        for cut in sorted(set(score.tolist())):
            hits = sum(p and s >= cut for p, s in zip(positive, score, strict=True))
            alarms = sum(not p and s >= cut for p, s in zip(positive, score, strict=True))
            recall, fallout = hits / positive.sum(), alarms / (1 - positive).sum()
            merits[cut] = {
                "youden": recall - fallout,
                "nearest": -math.sqrt((1 - recall) ** 2 + fallout**2),
                "f1": 2 * hits / (hits + alarms + positive.sum()),
            }[rule]
        assert threshold == max(cut for cut, merit in merits.items() if merit > max(merits.values()) - 1e-12)


def test_a_finding_without_both_kinds_has_no_threshold() -> None:
    thresholds = choose_thresholds([[1, 0, 1], [0, 0, 1]], [[0.7, 0.1, 0.2], [0.2, 0.9, 0.3]])
    assert thresholds[0] == 0.7 and np.isnan(thresholds[1:]).all()
    scores = ct_clip_scores([[1, 1, 0], [0, 0, 1]], [[0.9, 0.1, 0.2], [0.2, 0.9, 0.3]], thresholds)
    assert scores == {"auroc": 1, "accuracy": 1, "f1": 1, "precision": 1, "findings": 1}


def test_published_definitions_equal_loops(believed: tuple[NDArray[np.int64], NDArray[np.float64]]) -> None:
    labels, scores = believed
    columns = [(labels[:, k].tolist(), scores[:, k].tolist()) for k in range(6)]
    above = [[int(score > 0.5) for score in column] for _, column in columns]
    of_each = [looped(label, said) for (label, _), said in zip(columns, above, strict=True)]
    together = looped(sum((label for label, _ in columns), []), sum(above, []))
    weights = [sum(label) for label, _ in columns]
    expected = {
        "accuracy": sum(a == b for (label, _), said in zip(columns, above, strict=True) for a, b in zip(label, said, strict=True)) / 318,
        "f1": sum(weight * f1 for weight, (_, _, f1) in zip(weights, of_each, strict=True)) / sum(weights),
        "precision": together[0],
        "recall": together[1],
    }
    assert dcformer_scores(labels, scores) == pytest.approx(expected)

    thresholds = choose_thresholds(labels, scores, "nearest")
    stated = [[int(score >= threshold) for score in column] for (_, column), threshold in zip(columns, thresholds, strict=True)]
    rows = []
    for (label, column), said in zip(columns, stated, strict=True):
        pairs = [(p, n) for p, yes in zip(column, label, strict=True) if yes for n, other in zip(column, label, strict=True) if not other]
        present, absent = looped(label, said), looped([1 - one for one in label], [1 - one for one in said])
        share = sum(label) / len(label)
        area = sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)
        right = sum(a == b for a, b in zip(label, said, strict=True)) / len(label)
        rows.append((area, right, share * present[2] + (1 - share) * absent[2], present[0], present[1], present[2]))
    means = [sum(values) / 6 for values in zip(*rows, strict=True)]
    ct_clip = ct_clip_scores(labels, scores, thresholds)
    assert list(ct_clip.values()) == pytest.approx([*means[:4], 6])
    vlm3d = vlm3d_scores(labels, np.array(stated).T, scores)
    assert [vlm3d[name] for name in ("precision", "recall", "f1", "accuracy", "auroc")] == pytest.approx([*means[3:], means[1], means[0]])
    assert len({round(figures["f1"], 6) for figures in (expected, ct_clip, vlm3d)}) == 3  # hence the names


def test_vlm3d_counts_absent_findings_as_zero() -> None:
    labels, stated = np.array([[1, 0], [0, 0]]), np.array([[1, 0], [0, 0]])
    assert vlm3d_scores(labels, stated)["f1"] == 0.5
    assert precision_recall_f1(labels, stated)["macro"]["f1"] == 1


def test_crg_by_hand() -> None:
    """4 studies of 2 findings: X 8, A 2, so r = 6/4 = 1.5 and U = 3."""
    labels = np.array([[1, 0], [0, 1], [0, 0], [0, 0]])
    assert crg(labels, labels) == pytest.approx(3 / (6 - 3))  # s = 1.5 * 2
    assert crg(labels, np.zeros((4, 2))) == pytest.approx(3 / (6 + 3))  # s = - 1.5 * 2
    assert crg(labels, np.ones((4, 2))) == pytest.approx(3 / (6 + 3))  # s = 1.5 * 2 - 6
    assert crg(labels, np.array([[1, 1], [0, 0], [0, 0], [0, 0]])) == pytest.approx(3 / (6 + 1))  # s = 1.5 - 1.5 - 1
    assert crg(np.zeros((3, 2)), np.ones((3, 2))) is None
    assert crg(np.ones((3, 2)), np.ones((3, 2))) == 0  # 0/0, by the challenge's definition


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and predictions \(3, 3\)"):
        precision_recall_f1(np.zeros((2, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="0 or 1"):
        precision_recall_f1([[2, 0]], [[1, 0]])
    with pytest.raises(ValueError, match="for 2 findings"):
        precision_recall_f1([[1, 0]], [[1, 0]], names=["one"])
    with pytest.raises(ValueError, match="NaN"):
        auroc([[1, 0]], [[np.nan, 0]])
    with pytest.raises(ValueError, match="known are youden, nearest, f1"):
        choose_thresholds([[1], [0]], [[1], [0]], "best")
    with pytest.raises(ValueError, match="for 2 findings"):
        ct_clip_scores([[1, 0], [0, 1]], [[1, 0], [0, 1]], [0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="No finding has a threshold"):
        ct_clip_scores([[1], [0]], [[1], [0]], [np.nan])
    with pytest.raises(ValueError, match="0..1, got -2 to 3"):
        dcformer_scores([[1], [0]], [[3], [-2]])

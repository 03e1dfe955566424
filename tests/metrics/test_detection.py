"""Detection with unknown labels, against scikit-learn finding by finding and plain loops."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support, roc_auc_score

from med3dvlm.metrics.classification import choose_thresholds, ct_clip_scores, vlm3d_scores
from med3dvlm.metrics.detection import choose_known_thresholds, detection_scores, label_control, macro_auroc, permuted, reliability
from tests.metrics.bootstrap import bootstrap_interval

NAMES = ("a", "b", "c", "d", "e")
STUDIES = 60
PATIENTS = [f"p{study // 2}" for study in range(STUDIES)]


def tables(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return labels with missing values and correlated log-odds; "d" is always present, "e" is never labelled."""
    random = np.random.default_rng(seed)
    labels = (random.random((STUDIES, 5)) < (0.5, 0.2, 0.4, 1.0, 0.5)).astype(float)
    log_odds = random.normal(size=labels.shape) + labels
    labels[random.random(labels.shape) < 0.3] = np.nan
    labels[:, 4] = np.nan
    return labels, log_odds


def test_each_finding_equals_scikit_learn_on_its_labelled_studies() -> None:
    labels, log_odds = tables()
    cuts = choose_known_thresholds(*tables(1), "youden")
    assert np.isnan(cuts[3:]).all() and not np.isnan(cuts[:3]).any()
    scores = detection_scores(labels, log_odds, cuts, NAMES, PATIENTS)
    assert list(scores["per_class"]) == ["a", "b", "c", "d"]
    assert scores["one_class"] == ["d"] and scores["undecided"] == ["d"]
    areas, f1s = [], []
    for finding, name in enumerate("abc"):
        rows = ~np.isnan(labels[:, finding])
        truth, belief = labels[rows, finding], log_odds[rows, finding]
        entry = scores["per_class"][name]
        stated = belief >= cuts[finding]
        precision, recall, f1, _ = precision_recall_fscore_support(truth, stated, average="binary")
        assert (entry["studies"], entry["support"], entry["predicted"]) == (rows.sum(), truth.sum(), stated.sum())
        assert entry["auroc"] == pytest.approx(roc_auc_score(truth, belief))
        assert entry["auprc"] == pytest.approx(average_precision_score(truth, belief))
        assert [entry[key] for key in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])
        assert entry["accuracy"] == pytest.approx(np.mean(stated == truth)) and entry["threshold"] == pytest.approx(expit(cuts[finding]))
        areas.append(entry["auroc"])
        f1s.append(f1)
    assert scores["macro"]["auroc"] == pytest.approx(np.mean(areas)) == pytest.approx(macro_auroc(labels, log_odds))
    assert scores["macro"]["f1"] == pytest.approx(np.mean(f1s))
    assert scores["per_class"]["d"]["auroc"] is None and scores["per_class"]["d"]["f1"] is None


def test_thresholds_are_chosen_on_labelled_studies() -> None:
    labels, log_odds = tables(1)
    for rule in ("youden", "nearest", "f1"):
        cuts = choose_known_thresholds(labels, log_odds, rule)
        for finding in range(3):
            rows = ~np.isnan(labels[:, finding])
            assert cuts[finding] == choose_thresholds(labels[rows][:, [finding]], log_odds[rows][:, [finding]], rule)[0]


def test_published_figures_use_fully_labelled_studies() -> None:
    labels, log_odds = tables()
    labels[:20, :4] = np.random.default_rng(3).random((20, 4)) < 0.4
    cuts = np.array([0.1, 0.4, -0.2, 0.3, np.nan])
    published = detection_scores(labels, log_odds, cuts, NAMES, PATIENTS, nearest=cuts + 0.2)["published"]
    whole = ~np.isnan(labels[:, :4]).any(axis=1)
    truth, belief = labels[whole][:, :4], log_odds[whole][:, :4]
    assert published["studies"] == whole.sum() < STUDIES
    above = belief > 0
    micro = precision_recall_fscore_support(truth.ravel(), above.ravel(), average="binary")
    assert published["dcformer"] == {
        "accuracy": pytest.approx(np.mean(truth == above)),
        "f1": pytest.approx(f1_score(truth, above, average="weighted")),
        "precision": pytest.approx(micro[0]),
        "recall": pytest.approx(micro[1]),
    }
    assert published["ct_clip"] == ct_clip_scores(truth, belief, cuts[:4] + 0.2)
    assert published["vlm3d"] == vlm3d_scores(truth, belief >= cuts[:4], belief)


def test_intervals_equal_a_loop_over_resamples() -> None:
    labels, log_odds = tables()
    labels[:20, :4] = np.random.default_rng(3).random((20, 4)) < 0.4
    cuts = np.zeros(5)
    spans = detection_scores(labels, log_odds, cuts, NAMES, PATIENTS)["intervals"]

    def area(rows: np.ndarray) -> float:
        known = rows[~np.isnan(labels[rows, 1])]
        present, absent = (log_odds[known[labels[known, 1] == value], 1] for value in (1, 0))
        above = present[:, None] - absent
        return float(np.mean((above > 0) + 0.5 * (above == 0))) if above.size else np.nan

    assert spans["auroc.b"] == pytest.approx(bootstrap_interval(np.arange(STUDIES), PATIENTS, statistic=area))
    whole = np.flatnonzero(~np.isnan(labels[:, :4]).any(axis=1))
    truth, above = labels[whole][:, :4], log_odds[whole][:, :4] > 0

    def weighted_f1(rows: np.ndarray) -> float:
        support = truth[rows].sum(axis=0)
        f1 = [2 * np.sum(t * a) / max(t.sum() + a.sum(), 1) for t, a in zip(truth[rows].T, above[rows].T, strict=True)]
        return float(np.average(f1, weights=support))

    expected = bootstrap_interval(np.arange(len(whole)), [PATIENTS[row] for row in whole], statistic=weighted_f1)
    assert spans["published.dcformer.f1"] == pytest.approx(expected)


def test_without_any_threshold_there_are_areas_and_no_decisions() -> None:
    labels, log_odds = tables()
    scores = detection_scores(labels, log_odds, np.full(5, np.nan), NAMES, PATIENTS)
    assert scores["macro"]["auroc"] is not None and scores["macro"]["f1"] is None and scores["undecided"] == ["a", "b", "c", "d"]
    assert scores["published"]["ct_clip"] is None and scores["published"]["vlm3d"] is None
    assert scores["published"]["dcformer"]["accuracy"] > 0
    with pytest.raises(ValueError, match="no label of any finding is known"):
        detection_scores(np.full((2, 2), np.nan), np.zeros((2, 2)), np.zeros(2), "ab", ("p", "q"))
    with pytest.raises(ValueError, match="are of the same findings"):
        detection_scores(labels, log_odds, np.zeros(4), NAMES, PATIENTS)


def test_labels_are_permuted_between_patients() -> None:
    patients = ["p", "q", "p", "r", "r", "q", "p"]
    members = {name: [place for place, patient in enumerate(patients) if patient == name] for name in "pqr"}
    seen = set()
    for seed in range(20):
        places = permuted(patients, seed)
        givers = {name: {patients[places[place]] for place in members[name]} for name in members}
        assert all(len(giver) == 1 for giver in givers.values())  # all of a patient's from one other
        order = "".join(giver.pop() for giver in givers.values())
        assert sorted(order) == ["p", "q", "r"]
        seen.add(order)
        assert places == permuted(patients, seed)
    assert len(seen) == 6


def test_permuted_labels_are_at_chance_and_true_ones_above() -> None:
    labels, log_odds = tables()
    control = label_control(labels, log_odds + np.nan_to_num(labels), PATIENTS)
    assert control["macro_auroc"] == pytest.approx(0.5, abs=0.02)
    low, high = control["range"]
    assert low < 0.5 < high < macro_auroc(labels, log_odds + np.nan_to_num(labels)) and control["p_value"] == pytest.approx(1 / 101)
    nothing = label_control(np.ones((4, 2)), np.zeros((4, 2)), "pqrs")
    assert nothing == {"permutations": 100, "macro_auroc": None, "range": None, "p_value": None}


def test_calibration_as_scikit_learn_bins() -> None:
    labels, log_odds = tables()
    known = ~np.isnan(labels)
    truth, belief = labels[known], expit(log_odds[known])
    found = reliability(labels, log_odds)
    shares, means = calibration_curve(truth, belief, n_bins=10)
    assert [row[0] for row in found["bins"]] == pytest.approx(means.tolist())
    assert [row[1] for row in found["bins"]] == pytest.approx(shares.tolist())
    counts = [row[2] for row in found["bins"]]
    assert sum(counts) == known.sum()
    assert found["ece"] == pytest.approx(sum(abs(m - s) * n for m, s, n in zip(means, shares, counts, strict=True)) / sum(counts))
    assert found["brier"] == pytest.approx(np.mean((truth - belief) ** 2))
    assert reliability(np.array([[1.0, 0.0]]), np.array([[800.0, -800.0]]))["bins"] == [(0.0, 0.0, 1), (1.0, 1.0, 1)]

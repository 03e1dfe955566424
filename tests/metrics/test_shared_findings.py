"""Volume-to-volume retrieval: a case by hand, plain loops, ties, and the expectation of a random order."""

from itertools import permutations

import numpy as np
import pytest

from med3dvlm.metrics.shared_findings import shared_findings


def loops(embeddings: np.ndarray, labels: np.ndarray, patients: list[str], k: int) -> dict[str, list[float]]:
    """The definitions in plain loops, for embeddings without ties."""
    result: dict[str, list[float]] = {"map": [], "overlap": []}
    unit = [row / np.linalg.norm(row) for row in embeddings]
    for query in range(len(labels)):
        others = [i for i in range(len(labels)) if patients[i] != patients[query]]
        others.sort(key=lambda i: -float(unit[query] @ unit[i]))
        shares = [any(a and b for a, b in zip(labels[query], labels[i], strict=True)) for i in others]
        total, hits = 0.0, 0
        for place, right in enumerate(shares[:k], start=1):
            if right:
                hits += 1
                total += hits / place
        result["map"].append(total / min(k, sum(shares)) if any(shares) else np.nan)
        overlaps = []
        for i in [i for i in others if labels[i].any()][:k]:
            one, other = set(np.flatnonzero(labels[query])), set(np.flatnonzero(labels[i]))
            overlaps.append(len(one & other) / len(one | other))
        result["overlap"].append(sum(overlaps) / len(overlaps) if overlaps else np.nan)
    return result


def test_against_plain_loops() -> None:
    random = np.random.default_rng(0)
    labels = (random.random((40, 5)) < 0.25).astype(int)
    embeddings = random.normal(size=(40, 6)) + labels @ random.normal(size=(5, 6))
    patients = [f"p{study // 3}" for study in range(40)]
    values = shared_findings(embeddings, labels, patients, (1, 5, 39))
    for k in (1, 5, 39):
        for name, expected in loops(embeddings, labels, patients, k).items():
            np.testing.assert_allclose(values[f"{name}{k}"], expected, atol=1e-12)
    assert np.isnan(values["map5"]).any() and not np.isnan(values["overlap5"]).any()  # some show nothing
    assert np.nanmean(values["map5"]) > np.nanmean(values["chance_map5"])


def test_a_case_by_hand() -> None:
    """The first is the query; the others, from near to far, share no finding, all findings, and half of them."""
    labels = np.array([[1, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 0]])
    embeddings = np.array([[1, 0], [1, 0.1], [1, 0.2], [1, 0.3]])
    values = shared_findings(embeddings, labels, list("abcd"), (1, 2, 3))
    assert [values[f"map{k}"][0] for k in (1, 2, 3)] == pytest.approx([0, (1 / 2) / 2, (1 / 2 + 2 / 3) / 2])
    assert [values[f"overlap{k}"][0] for k in (1, 2, 3)] == pytest.approx([0, 1 / 2, (0 + 1 + 1 / 2) / 3])
    assert values["chance_overlap"][0] == pytest.approx(1 / 2)


def test_the_expectation_is_that_of_all_orders() -> None:
    """Average precision over all orders of five candidates, two of which share a finding."""
    labels = np.array([[1], [1], [1], [0], [0], [0]])
    expected = {k: [] for k in (1, 2, 4, 5)}
    for order in permutations((1, 1, 0, 0, 0)):
        for k, found in expected.items():
            found.append(sum(right * sum(order[:place]) / place for place, right in enumerate(order[:k], 1)) / min(k, 2))
    values = shared_findings(np.random.default_rng(0).normal(size=(6, 3)), labels, list("abcdef"), (1, 2, 4, 5))
    for k, found in expected.items():
        assert values[f"chance_map{k}"][0] == pytest.approx(np.mean(found))


def test_ties_are_ranked_in_the_worst_order() -> None:
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    values = shared_findings(np.ones((4, 3)), labels, list("abcd"), (1, 3))
    assert values["map1"].tolist() == [0] * 4 and values["overlap1"].tolist() == [0] * 4
    assert values["map3"] == pytest.approx([1 / 3] * 4)


def test_other_scans_of_the_patient_are_left_out() -> None:
    labels = np.array([[1], [1], [0]])
    values = shared_findings(np.eye(3), labels, ["p", "p", "q"], (1,))
    assert np.isnan(values["map1"]).all()  # nobody else shows it
    assert np.isnan(values["overlap1"][:2]).all() and values["overlap1"][2] == 0


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="one row of 0 and 1 each"):
        shared_findings(np.eye(3), np.array([[1], [2], [0]]), list("abc"))
    with pytest.raises(ValueError, match="one row of 0 and 1 each"):
        shared_findings(np.eye(3), np.array([[1], [0]]), list("ab"))
    with pytest.raises(ValueError, match="each 1 or more"):
        shared_findings(np.eye(3), np.ones((3, 1)), list("abc"), (0,))

"""The bootstrap against the analytic interval of a mean, plain loops and scipy; the paired test against all swaps and scipy."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from med3dvlm.metrics import intervals as module
from med3dvlm.metrics.classification import auprc, auroc, crg, precision_recall_f1
from med3dvlm.metrics.intervals import (
    Statistic,
    auroc_of,
    average_precision_of,
    crg_of,
    f1_of,
    intervals,
    macro_f1_of,
    mean_of,
    mean_over,
    median_of,
    micro_f1_of,
    paired_test,
    ratio_of,
)
from tests.metrics.bootstrap import bootstrap_interval


def test_interval_of_a_mean_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(10, 3, size=401)
    low, high = intervals({"mean": mean_of(values)}, range(401), samples=4000)["mean"]
    half = 1.96 * values.std() / np.sqrt(len(values))
    # Monte Carlo error of a 2.5 % quantile from 4000 resamples is about 4 % of the half width.
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    narrow = intervals({"mean": mean_of(values)}, range(401), samples=4000, level=0.5)["mean"]
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * half / 1.96, rel=0.15)


def test_groups_widen_the_interval() -> None:
    """Ten copies of each patient carry no more information than one, so the interval is that of the patients' means."""
    patients = np.random.default_rng(1).normal(size=101)
    values, groups = np.repeat(patients, 10), np.repeat([f"patient_{i}" for i in range(101)], 10)
    order = np.random.default_rng(2).permutation(len(values))
    low, high = intervals({"mean": mean_of(values[order])}, groups[order], samples=2000)["mean"]
    half = 1.96 * patients.std() / np.sqrt(101)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    alone = intervals({"mean": mean_of(values)}, range(1010), samples=2000)["mean"]
    assert (alone[1] - alone[0]) / 2 == pytest.approx(half / np.sqrt(10), rel=0.1)


def test_unequal_groups_keep_all_their_rows() -> None:
    """With two patients a resample is one of four equally likely draws; its means are known."""
    seen: set[float] = set()
    mean = mean_of([0.0, 0.0, 0.0, 1.0])

    def watched(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        seen.update(mean(weights).tolist())
        return mean(weights)

    assert intervals({"mean": watched}, ["a", "a", "a", "b"], samples=200)["mean"] == (0.0, 1.0)
    assert seen == {0.0, 0.25, 1.0}


@pytest.fixture
def table() -> dict[str, Any]:
    """Return 61 studies of 23 patients and 4 findings, with scores of one decimal and missing values."""
    generator = np.random.default_rng(5)
    labels = (generator.random((61, 4)) < (0.5, 0.3, 0.2, 0.05)).astype(int)
    labels[0, 3] = 1
    scores = np.round(0.4 * labels + 0.6 * generator.random((61, 4)), 1)
    values = generator.random(61)
    values[[3, 17]] = np.nan
    patients = [f"valid_{number}" for number in generator.integers(23, size=61)]
    return {"labels": labels, "scores": scores, "stated": (scores > 0.5).astype(int), "values": values, "patients": patients}


def undefined_as_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def by_rows(table: dict[str, Any]) -> dict[str, tuple[Statistic, Callable[[NDArray[np.int64]], float]]]:
    """Return each figure as a function of weights, and as computed from the resampled rows."""
    labels, scores, stated, values = (table[name] for name in ("labels", "scores", "stated", "values"))
    ranks = np.arange(61) % 10 + 1
    return {
        "mean": (mean_of(values), lambda rows: np.nanmean(values[rows])),
        "median": (median_of(ranks), lambda rows: float(np.median(ranks[rows]))),
        "recall@5": (mean_of(ranks <= 5), lambda rows: np.mean(ranks[rows] <= 5)),
        "macro F1": (
            macro_f1_of(labels, stated),
            lambda rows: undefined_as_nan(precision_recall_f1(labels[rows], stated[rows])["macro"]["f1"]),
        ),
        "micro F1": (micro_f1_of(labels, stated), lambda rows: precision_recall_f1(labels[rows], stated[rows])["micro"]["f1"]),
        "AUROC": (mean_over(auroc_of(labels, scores)), lambda rows: undefined_as_nan(auroc(labels[rows], scores[rows])["macro"])),
        "AUPRC": (
            mean_over(average_precision_of(labels, scores)),
            lambda rows: undefined_as_nan(auprc(labels[rows], scores[rows])["macro"]),
        ),
        "CRG": (crg_of(labels, stated), lambda rows: undefined_as_nan(crg(labels[rows], stated[rows]))),
        "precision": (
            ratio_of((labels * stated).sum(axis=1), stated.sum(axis=1)),
            lambda rows: precision_recall_f1(labels[rows], stated[rows])["micro"]["precision"],
        ),
    }


def test_weights_give_the_figures_of_the_resampled_rows(table: dict[str, Any]) -> None:
    generator = np.random.default_rng(6)
    drawn = generator.integers(61, size=(20, 61))
    weights = np.stack([np.bincount(rows, minlength=61) for rows in drawn]).astype(float)
    for name, (statistic, slow) in by_rows(table).items():
        assert statistic(weights) == pytest.approx([slow(rows) for rows in drawn], abs=1e-12), name


def test_intervals_equal_the_loop_over_resamples(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = by_rows(table)
    fast = intervals({name: statistic for name, (statistic, _) in figures.items()}, table["patients"], samples=60, seed=4)
    for name, (_, slow) in figures.items():
        expected = bootstrap_interval(np.arange(61), table["patients"], samples=60, seed=4, statistic=slow)
        assert fast[name] == pytest.approx(expected, abs=1e-12), name
        assert fast[name][0] < fast[name][1]
    monkeypatch.setattr(module, "CELLS", 61 * 7)  # seven resamples at a time
    again = intervals({name: statistic for name, (statistic, _) in figures.items()}, table["patients"], samples=60, seed=4)
    assert {name: pytest.approx(pair, abs=1e-12) for name, pair in fast.items()} == again


def test_intervals_agree_with_scipy() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(8).exponential(size=200)
    expected = bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    low, high = intervals({"mean": mean_of(values)}, range(200), samples=9999)["mean"]
    assert (low, high) == pytest.approx(tuple(expected), abs=0.03 * (high - low))


def test_figures_of_each_finding_and_too_few_studies(table: dict[str, Any]) -> None:
    pairs = intervals({"F1": f1_of(table["labels"], table["stated"])}, table["patients"], samples=200)["F1"]
    assert len(pairs) == 4 and all(low < high for low, high in pairs[:3])
    labels = np.zeros((61, 2), dtype=int)
    labels[:30, 0] = 1
    assert intervals({"AUROC": auroc_of(labels, table["scores"][:, :2])}, range(61), samples=50)["AUROC"][1] is None


def test_paired_test_equals_all_swaps_by_hand(table: dict[str, Any]) -> None:
    """5 patients of unequal size: 32 ways to swap; macro F1 by loops."""
    from itertools import product

    patients = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 1, 3, 0])
    labels, first = table["labels"][:12, :2], table["stated"][:12, :2]
    second = np.where(np.arange(12)[:, None] % 3 == 0, 1 - first, first)
    outcome = paired_test(lambda rows: macro_f1_of(np.concatenate([labels, labels]), rows), first, second, patients)
    differences = []
    for swapped in product((False, True), repeat=5):
        chosen = np.array(swapped)[patients][:, None]
        ours, theirs = np.where(chosen, second, first), np.where(chosen, first, second)
        differences.append(precision_recall_f1(labels, ours)["macro"]["f1"] - precision_recall_f1(labels, theirs)["macro"]["f1"])
    assert outcome.exact and outcome.difference == pytest.approx(differences[0])
    assert outcome.p_value == sum(abs(d) >= abs(differences[0]) - 1e-12 for d in differences) / 32


@pytest.mark.parametrize("studies", [9, 60])  # all 512 swaps, or random ones
def test_paired_test_agrees_with_scipy(studies: int) -> None:
    from scipy.stats import permutation_test

    generator = np.random.default_rng(9)
    first = generator.normal(0.25, 1, studies)
    second = 0.5 * first + generator.normal(0, 1, studies)
    outcome = paired_test(mean_of, first, second, range(studies))

    def difference(ours: NDArray[np.float64], theirs: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.mean(ours, axis=axis) - np.mean(theirs, axis=axis)

    expected = permutation_test((first, second), difference, permutation_type="samples", vectorized=True, rng=np.random.default_rng(1))
    assert outcome.difference == pytest.approx(expected.statistic)
    assert outcome.exact == (studies == 9)
    assert outcome.p_value == pytest.approx(expected.pvalue, abs=1e-12 if outcome.exact else 0.02)
    assert 0.001 < outcome.p_value < 0.999


def test_paired_test_swaps_whole_patients() -> None:
    """A thousand copies of three patients are three patients: the smallest two-sided p-value is 2 of 8."""
    values = np.repeat([0.9, 0.8, 0.7], 1000)
    outcome = paired_test(mean_of, values, values - 0.1, np.repeat([1, 2, 3], 1000))
    assert outcome.p_value == 2 / 8 and outcome.difference == pytest.approx(0.1)
    assert paired_test(mean_of, values, values, np.arange(3000)).p_value == 1
    assert paired_test(mean_of, values, values - 0.1, np.arange(3000)).p_value == 1 / 10_000


def test_paired_test_is_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = np.random.default_rng(10).normal(size=(2, 40))
    outcome = paired_test(mean_of, first, second, range(40), seed=2)
    monkeypatch.setattr(module, "CELLS", 80 * 100)
    assert outcome == paired_test(mean_of, first, second, range(40), seed=2)
    assert outcome.p_value != paired_test(mean_of, first, second, range(40), seed=3).p_value


@pytest.mark.slow
def test_two_thousand_cases_take_seconds() -> None:
    generator = np.random.default_rng(11)
    labels, scores = generator.random((2000, 18)) < 0.2, generator.random((2000, 18))
    table: dict[str, Statistic] = {f"text {index}": mean_of(generator.random(2000)) for index in range(16)}
    table |= {"AUROC": auroc_of(labels, scores), "AUPRC": average_precision_of(labels, scores), "F1": macro_f1_of(labels, scores > 0.8)}
    table["median rank"] = median_of(generator.integers(1, 2001, size=2000))
    started = time.process_time()
    intervals(table, generator.integers(1300, size=2000))
    assert time.process_time() - started < 10


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="at least one"):
        intervals({"mean": mean_of([])}, [])
    with pytest.raises(ValueError, match="level=95"):
        intervals({"mean": mean_of([1.0])}, ["a"], level=95)
    with pytest.raises(ValueError, match="one patient for each"):
        paired_test(mean_of, [1.0, 2.0], [1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        paired_test(mean_of, [1, 2, 3], [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="undefined for one of the runs"):
        paired_test(mean_of, [np.nan, np.nan], [1, 2], [1, 2])
    with pytest.raises(ValueError, match=r"\(2, 1\) and scores \(3, 1\)"):
        auroc_of([[1], [0]], [[1], [2], [3]])

"""The bootstrap against the analytic interval of a mean."""

import numpy as np
import pytest

from med3dvlm.metrics.intervals import bootstrap_interval


def test_mean_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(10, 3, size=401)
    low, high = bootstrap_interval(values, samples=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    # Monte Carlo error of a 2.5 % quantile from 4000 resamples is about 4 % of the half width.
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    narrow = bootstrap_interval(values, samples=4000, level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * half / 1.96, rel=0.15)


def test_groups_widen_the_interval() -> None:
    """Ten copies of each patient carry no more information than one: the interval is that of the patients' means."""
    patients = np.random.default_rng(1).normal(size=101)
    values, groups = np.repeat(patients, 10), np.repeat([f"patient_{i}" for i in range(101)], 10)
    order = np.random.default_rng(2).permutation(len(values))
    low, high = bootstrap_interval(values[order], groups[order], samples=2000)
    half = 1.96 * patients.std() / np.sqrt(101)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    alone = bootstrap_interval(values, samples=2000)
    assert (alone[1] - alone[0]) / 2 == pytest.approx(half / np.sqrt(10), rel=0.1)


def test_unequal_groups_keep_all_their_rows() -> None:
    """With two patients a resample is one of four equally likely draws; its means are known."""
    values, groups = [0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"]
    seen: set[float] = set()

    def mean(rows: np.ndarray) -> float:
        seen.add(float(rows.mean()))
        return float(rows.mean())

    assert bootstrap_interval(values, groups, samples=200, statistic=mean) == (0.0, 1.0)
    assert seen == {0.0, 0.25, 1.0}


def test_any_statistic_by_index_and_the_seed() -> None:
    labels, predictions = np.array([1, 0, 1, 1, 0, 1, 0]), np.array([1, 0, 0, 1, 1, 1, 0])
    rows = np.arange(7)

    def agreement(drawn: np.ndarray) -> float:
        return float((labels[drawn] == predictions[drawn]).mean())

    interval = bootstrap_interval(rows, statistic=agreement, seed=3)
    assert interval == bootstrap_interval(labels == predictions, seed=3)
    assert interval[0] < 5 / 7 < interval[1]


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="one patient for each"):
        bootstrap_interval([1.0, 2.0], groups=["a"])
    with pytest.raises(ValueError, match="level=95"):
        bootstrap_interval([1.0], level=95)
    with pytest.raises(ValueError, match="undefined in 1000 of 1000"):
        bootstrap_interval([1.0, 2.0], statistic=lambda rows: float("nan"))

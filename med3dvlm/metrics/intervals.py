"""Uncertainty of scores: bootstrap intervals and a paired randomisation test, both by patient.

Scans of one patient resemble each other, so whole patients are drawn, or swapped between two runs. A resample is a row
of weights, how often each study was drawn, and a figure is a `Statistic`, a function of such weights, so that a
thousand resamples are a few matrix products:

    table = {"BLEU-1": mean_of(values["bleu1"]), "macro F1": macro_f1_of(labels, predictions), "AUROC": auroc_of(labels, scores)}
    table["macro AUROC"] = mean_over(table["AUROC"])
    intervals(table, patients)                                            # {"BLEU-1": (low, high), ...}
    paired_test(macro_f1, predictions_of_a, predictions_of_b, patients)            # see its docstring

Shapes: N = studies, G = patients, S = resamples, K = findings or any number of figures of one kind.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]  # (S, N), how often each study counts
Statistic = Callable[[Weights], NDArray[np.float64]]  # -> (S,) or (S, K); NaN where undefined
CELLS = 2**22  # weights at a time: 32 MB, and a few times that within a statistic


def intervals(
    statistics: Mapping[str, Statistic],
    groups: Sequence[Any],
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Return percentile bootstrap intervals (Efron 1979) of all figures of a table, from the same resamples of patients.

    Args:
        statistics: figures by name.
        groups: N patient identifiers (`range(N)` where every study is its own patient).
        samples: how many resamples.
        level: the share of resamples inside the interval, between 0 and 1.
        seed: of the resampling.

    Returns:
        (low, high) of a figure that is one number, a list of K such pairs of a figure that is K. A pair is None where
        the figure is undefined in more than half of the resamples: too few studies for an interval.

    Raises:
        ValueError: if arguments do not fit.
    """
    group_of_row = _groups(groups, len(groups))
    _check_sampling(samples, level)
    patients = int(group_of_row.max()) + 1
    outcomes: dict[str, list[NDArray[np.float64]]] = {name: [] for name in statistics}
    generator = np.random.default_rng(seed)
    for start in range(0, samples, _height(len(groups))):
        drawn = generator.integers(patients, size=(min(_height(len(groups)), samples - start), patients))  # (s, G)
        cells = np.arange(len(drawn))[:, None] * patients + drawn
        times = np.bincount(cells.ravel(), minlength=len(drawn) * patients).reshape(len(drawn), patients)
        weights = times.astype(np.float64)[:, group_of_row]  # (s, N)
        for name, statistic in statistics.items():
            outcomes[name].append(statistic(weights))
    result: dict[str, Any] = {}
    for name, chunks in outcomes.items():
        values = np.concatenate(chunks)  # (S,) or (S, K)
        pairs = [_interval(column, level) for column in values.reshape(samples, -1).T]
        result[name] = pairs if values.ndim == 2 else pairs[0]
    return result


class PairedTest(NamedTuple):
    """`difference` is the first run's figure less the second's, `p_value` is two-sided, `exact` tells whether all swaps were tried."""

    difference: float
    p_value: float
    exact: bool


def paired_test(
    figure: Callable[[Any], Statistic],
    first: Any,
    second: Any,
    groups: Sequence[Any],
    samples: int = 9999,
    seed: int = 0,
) -> PairedTest:
    """Compare two runs over the same studies by a randomisation test (Fisher 1935; Noreen 1989).

    If it does not matter which run wrote what, a patient's two outcomes may be swapped, all studies of the patient at
    once. The p-value is the share of swaps after which the runs differ at least as much as they do; with few patients
    (2^G of `samples` or less) all swaps are tried, otherwise random ones, and what was observed counts as one of them.

    Args:
        figure: makes the statistic from the rows of both runs, the second's under the first's: (2N, ...). `mean_of`
            does; of what needs labels too: `lambda predictions: macro_f1_of(np.concatenate([labels, labels]), predictions)`. It
            must give one number. Scores that are ranked together (AUROC) must be on the same scale.
        first: (N, ...), what the first run gave.
        second: (N, ...), what the second run gave, row i about the same study.
        groups: N patient identifiers.
        samples: how many swaps.
        seed: of the swaps; the same seed gives the same p-value.

    Raises:
        ValueError: if arguments do not fit, or the figure is undefined for one of the runs.
    """
    ours, theirs = np.asarray(first), np.asarray(second)
    if ours.shape != theirs.shape or not ours.ndim:
        raise ValueError(f"The runs are {ours.shape} and {theirs.shape}; compare runs over the same studies, one row a study.")
    group_of_row = _groups(groups, len(ours))
    _check_sampling(samples, 0.5)
    statistic = figure(np.concatenate([ours, theirs]))

    def difference(swapped: NDArray[np.bool_]) -> NDArray[np.float64]:
        """(s, G) -> (s,)"""
        other = swapped[:, group_of_row].astype(np.float64)  # (s, N), 1 where the run takes the other's row
        return statistic(np.hstack([1 - other, other])) - statistic(np.hstack([other, 1 - other]))

    patients = int(group_of_row.max()) + 1
    observed = float(difference(np.zeros((1, patients), dtype=bool))[0])
    if np.isnan(observed):
        raise ValueError("The figure is undefined for one of the runs, so they cannot be compared by it.")
    exact = patients <= 30 and 2**patients <= samples
    count = 2**patients if exact else samples
    generator = np.random.default_rng(seed)
    as_far = 0
    for start in range(0, count, _height(2 * len(ours))):
        size = min(_height(2 * len(ours)), count - start)
        if exact:
            swapped = (np.arange(start, start + size)[:, None] >> np.arange(patients) & 1).astype(bool)
        else:
            swapped = generator.random((size, patients)) < 0.5
        as_far += int((np.abs(difference(swapped)) >= abs(observed) - 1e-12).sum())  # rounding must not tell equals apart
    return PairedTest(observed, as_far / count if exact else (as_far + 1) / (count + 1), exact)


def mean_of(values: Any) -> Statistic:
    """Return a statistic: the mean of (N,), or of each column of (N, K); NaN marks studies without a value, which do not count."""
    table = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(table)
    filled = np.where(known, table, 0)
    return lambda weights: _ratio(weights @ filled, weights @ known.astype(np.float64))


def median_of(values: Any) -> Statistic:
    """Return a statistic: the median of (N,)."""
    array = np.asarray(values, dtype=np.float64)
    order = np.argsort(array, kind="stable")
    ranked = array[order]

    def statistic(weights: Weights) -> NDArray[np.float64]:
        reached = np.cumsum(weights[:, order], axis=1)  # (S, N), how many values up to here
        total = reached[:, -1:]
        middle = [(reached > place).argmax(axis=1) for place in ((total - 1) // 2, total // 2)]
        medians: NDArray[np.float64] = (ranked[middle[0]] + ranked[middle[1]]) / 2
        return medians

    return statistic


def ratio_of(numerators: Any, denominators: Any) -> Statistic:
    """Return a statistic: the ratio of two sums over studies, (N,) or (N, K); precision is hits by predicted, recall hits by positives."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if above.shape != below.shape:
        raise ValueError(f"The numerators are {above.shape} and the denominators {below.shape}; give one of each for each study.")
    return lambda weights: _ratio(weights @ above, weights @ below)


def f1_of(labels: Any, predictions: Any) -> Statistic:
    """Return a statistic: F1 of K findings, from labels and predictions (N, K) of 0 and 1; NaN where a finding is neither present nor predicted."""
    labels, predictions = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    return ratio_of(2 * labels * predictions, labels + predictions)


def macro_f1_of(labels: Any, predictions: Any) -> Statistic:
    """Return a statistic: the mean of `f1_of` over findings present or predicted in a resample, as in `classification.precision_recall_f1`."""
    return mean_over(f1_of(labels, predictions))


def micro_f1_of(labels: Any, predictions: Any) -> Statistic:
    """Return a statistic: F1 of all decisions together, from labels and predictions (N, K) of 0 and 1."""
    labels, predictions = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    return ratio_of(2 * (labels * predictions).sum(axis=1), (labels + predictions).sum(axis=1))


def crg_of(labels: Any, predictions: Any) -> Statistic:
    """Return a statistic: CRG of the VLM3D challenge, from labels and predictions (N, K) of 0 and 1; NaN without a label that is 1.

    With X decisions of which A should be 1: r = (X - A) / (2 A), U = (X - A) / 2, s = r TP - r FN - FP and CRG = U / (2 U - s), so that
    predicting nothing gives 1/3, everything right 1, and a rare finding weighs more. Where all labels and predictions are 1 it is 0.
    """
    labels, predictions = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    present, hits, wrong = labels.sum(axis=1), (labels * predictions).sum(axis=1), ((1 - labels) * predictions).sum(axis=1)
    decisions = labels.shape[1]

    def statistic(weights: Weights) -> NDArray[np.float64]:
        every, positive, hit, false = decisions * weights.sum(axis=1), weights @ present, weights @ hits, weights @ wrong
        utmost = (every - positive) / 2
        score = _ratio(utmost, positive) * (2 * hit - positive) - false  # FN = A - TP
        below = 2 * utmost - score
        return np.where(below == 0, 0.0, utmost / np.where(below == 0, 1, below))

    return statistic


def auroc_of(labels: Any, scores: Any) -> Statistic:
    """Return a statistic: the area under the ROC curve of each of K findings, from labels and scores (N, K); a tie counts one half."""
    return _by_finding(labels, scores, _auroc)


def average_precision_of(labels: Any, scores: Any) -> Statistic:
    """Average precision (AUPRC) of each of K findings, labels and scores (N, K), as scikit-learn defines it."""
    return _by_finding(labels, scores, _average_precision)


def mean_over(statistic: Statistic) -> Statistic:
    """Return a statistic: the mean of the K figures of another one that are defined."""

    def mean(weights: Weights) -> NDArray[np.float64]:
        values = statistic(weights)  # (S, K)
        return _ratio(np.nansum(values, axis=1), (~np.isnan(values)).sum(axis=1))

    return mean


def _by_finding(labels: Any, scores: Any, area: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]) -> Statistic:
    """Make the statistic `area(positives, negatives)` of each finding; both are (S, T) counts at the T different scores, the highest first."""
    labels, scores = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 2:
        raise ValueError(f"labels are {labels.shape} and scores {scores.shape}; both must be (studies, findings).")
    prepared = []
    for positive, score in zip(labels.T, scores.T, strict=True):
        order = np.argsort(-score, kind="stable")
        first = np.flatnonzero(np.diff(score[order], prepend=np.inf))  # where another score begins
        prepared.append((order, first, positive[order]))

    def statistic(weights: Weights) -> NDArray[np.float64]:
        areas = np.empty((len(weights), len(prepared)))
        for finding, (order, first, positive) in enumerate(prepared):
            ranked = weights[:, order]
            positives, everything = np.add.reduceat(ranked * positive, first, axis=1), np.add.reduceat(ranked, first, axis=1)
            areas[:, finding] = area(positives, everything - positives)
        return areas

    return statistic


def _auroc(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> NDArray[np.float64]:
    above = np.cumsum(positives, axis=1) - positives / 2  # positives that stand above each score, half of those beside it
    return _ratio(np.einsum("st,st->s", above, negatives), positives.sum(axis=1) * negatives.sum(axis=1))


def _average_precision(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> NDArray[np.float64]:
    hits = np.cumsum(positives, axis=1)
    precision = hits / np.maximum(hits + np.cumsum(negatives, axis=1), 1)
    return _ratio(np.einsum("st,st->s", precision, positives), positives.sum(axis=1))


def _ratio(numerator: Any, denominator: Any) -> NDArray[np.float64]:
    """Divide; NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: NDArray[np.float64] = np.where(denominator == 0, np.nan, numerator / denominator)
    return quotient


def _height(width: int) -> int:
    return max(CELLS // width, 1)


def _interval(outcomes: NDArray[np.float64], level: float) -> tuple[float, float] | None:
    defined = outcomes[~np.isnan(outcomes)]
    if 2 * len(defined) < len(outcomes):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _groups(groups: Sequence[Any], count: int) -> NDArray[np.int64]:
    """Return (count,) numbers from 0, equal for rows of one patient."""
    keys = np.asarray(groups)
    if keys.shape != (count,) or not count:
        raise ValueError(f"Got {count} values but groups of shape {keys.shape}; give one patient for each value, at least one.")
    return np.unique(keys, return_inverse=True)[1]


def _check_sampling(samples: int, level: float) -> None:
    if not 0 < level < 1 or samples < 1:
        raise ValueError(f"level={level} must lie between 0 and 1 and samples={samples} be 1 or more.")

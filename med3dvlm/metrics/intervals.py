"""Confidence intervals by resampling patients."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def bootstrap_interval(
    values: Any,
    groups: Sequence[Any] | None = None,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    statistic: Callable[[Any], float] = np.mean,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic (Efron 1979).

    Scans of one patient resemble each other, so whole groups are drawn with replacement; with every value alone the
    interval would be too narrow.

    Args:
        values: (N, ...), one row a study. For a statistic of several arrays pass `np.arange(N)` and index them in
            `statistic`.
        groups: N patient identifiers; None treats each row as its own patient.
        samples: how many resamples.
        level: the share of resamples inside the interval, between 0 and 1.
        seed: of the resampling; the same seed gives the same interval.
        statistic: maps the drawn rows to a number, by default their mean. A resample where it is NaN (an AUROC without
            positives) is left out.

    Returns:
        (low, high).

    Raises:
        ValueError: if arguments do not fit or the statistic is NaN in more than half of the resamples.
    """
    rows = np.asarray(values)
    if not rows.ndim or not len(rows):
        raise ValueError(f"bootstrap_interval needs at least one value, got shape {rows.shape}.")
    if not 0 < level < 1 or samples < 1:
        raise ValueError(f"level={level} must lie between 0 and 1 and samples={samples} be 1 or more.")
    keys = np.arange(len(rows)) if groups is None else np.asarray(groups)
    if keys.shape != (len(rows),):
        raise ValueError(f"Got {len(rows)} values but groups of shape {keys.shape}; give one patient for each value.")

    _, group_of_row = np.unique(keys, return_inverse=True)
    by_group = np.argsort(group_of_row, kind="stable")
    members = np.split(by_group, np.cumsum(np.bincount(group_of_row))[:-1])  # the row indices of each group
    generator = np.random.default_rng(seed)
    outcomes = np.empty(samples)
    for sample in range(samples):
        drawn = generator.integers(len(members), size=len(members))
        outcomes[sample] = statistic(rows[np.concatenate([members[group] for group in drawn])])
    defined = outcomes[~np.isnan(outcomes)]
    if 2 * len(defined) < samples:
        raise ValueError(
            f"The statistic is undefined in {samples - len(defined)} of {samples} resamples; there are too few studies for an interval."
        )
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

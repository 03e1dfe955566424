"""The percentile bootstrap over patients in plain loops, with the resamples that `metrics.intervals` draws."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def bootstrap_interval(
    values: Any, groups: Sequence[Any] | None = None, samples: int = 1000, level: float = 0.95, seed: int = 0,
    statistic: Callable[[Any], float] = np.mean,
) -> tuple[float, float]:  # fmt: skip
    """Return the interval of a statistic of rows (N, ...) with N patient identifiers in `groups`; for several arrays pass indices."""
    rows = np.asarray(values)
    keys = np.arange(len(rows)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    patients = int(keys.max()) + 1
    outcomes = []
    for drawn in np.random.default_rng(seed).integers(patients, size=(samples, patients)):
        outcome = statistic(rows[np.concatenate([np.flatnonzero(keys == patient) for patient in drawn])])
        if not np.isnan(outcome):
            outcomes.append(outcome)
    low, high = np.quantile(outcomes, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

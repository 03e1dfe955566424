"""Scores of the detection of several findings with incomplete labels.

A finding's own figures are those of the studies whose label of it is known. The published figures (see `classification`) are defined for
whole rows only, and so are those of the studies that have a label of every finding that any study has one of.

Shapes: N studies, K findings. `labels` are (N, K) of 0, 1 and NaN, unknown; `log_odds` (N, K), of which 0 is a probability of 0.5;
`thresholds` (K,) are on the scale of the log-odds, NaN where there is none.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from med3dvlm.metrics.classification import (
    auprc,
    auroc,
    choose_thresholds,
    ct_clip_scores,
    dcformer_scores,
    precision_recall_f1,
    vlm3d_scores,
)
from med3dvlm.metrics.intervals import Statistic, auroc_of, average_precision_of, f1_of, intervals, mean_of, mean_over, ratio_of

Table = NDArray[np.float64]
NOTHING = {"precision": None, "recall": None, "f1": None, "predicted": None, "accuracy": None, "threshold": None}


def choose_known_thresholds(labels: Table, log_odds: Table, rule: str) -> Table:
    """Choose (K,) thresholds by a rule of `choose_thresholds`, each on the studies with its label; NaN where all or none of these have the
    finding.
    """
    thresholds = np.full(labels.shape[1], np.nan)
    for finding, rows in enumerate(_known(labels)):
        if len(rows):
            thresholds[finding] = choose_thresholds(labels[rows][:, [finding]], log_odds[rows][:, [finding]], rule)[0]
    return thresholds


def detection_scores(
    labels: Table, log_odds: Table, thresholds: Table, names: Sequence[str], patients: Sequence[Any], nearest: Table | None = None
) -> dict[str, Any]:
    """Return all scores of a detection, per finding and by the published definitions, with 95 % bootstrap intervals over patients.

    Args:
        nearest: (K,) thresholds by CT-CLIP's rule "nearest" for CT-CLIP's figures; `thresholds` where not given.

    Returns:
        `{"studies", "per_class": {name: {"studies", "support", "auroc", "auprc", "precision", "recall", "f1", "predicted", "accuracy",
        "threshold"}}, "macro": {"auroc", "auprc", "f1", "accuracy"}, "published": {"studies", "dcformer", "ct_clip", "vlm3d"}, "intervals"}`.
        A threshold is a probability. What is not defined is None: the areas of a finding that is nowhere or everywhere ("one_class" lists
        those), decisions without a threshold ("undecided"). A finding that no study has a label of is left out. Intervals have the name
        of the figure, as "macro.auroc", or of the finding's, as "auroc.lung_nodule".

    Raises:
        ValueError: if shapes do not fit or no label is known.
    """
    if not labels.shape == log_odds.shape == (len(patients), len(names)) or thresholds.shape != (len(names),):
        raise ValueError(
            f"labels are {labels.shape}, log-odds {log_odds.shape} and thresholds {thresholds.shape}; all are of the same findings"
        )
    looked_for = np.flatnonzero(~np.isnan(labels).all(axis=0))
    if not len(looked_for):
        raise ValueError("no label of any finding is known, so there is nothing to score")
    labels, log_odds, thresholds = labels[:, looked_for], log_odds[:, looked_for], thresholds[looked_for]
    nearest = thresholds if nearest is None else nearest[looked_for]
    names = [names[index] for index in looked_for.tolist()]
    per_class = {
        name: _finding(labels[rows, finding], log_odds[rows, finding], float(thresholds[finding]))
        for finding, (name, rows) in enumerate(zip(names, _known(labels), strict=True))
    }
    predictions = (log_odds >= thresholds).astype(np.float64)
    statistics: dict[str, Statistic] = {
        "auroc": of_known(auroc_of, labels, log_odds),
        "auprc": of_known(average_precision_of, labels, log_odds),
        "f1": of_known(f1_of, np.where(np.isnan(thresholds), np.nan, labels), predictions),
    }
    whole = np.flatnonzero(~np.isnan(labels).any(axis=1))
    published, published_statistics = _published(labels[whole], log_odds[whole], thresholds, nearest) if len(whole) else (None, {})
    spans = intervals(statistics | {f"macro.{name}": mean_over(statistic) for name, statistic in statistics.items()}, patients)
    for name in statistics:
        spans |= {f"{name}.{finding}": span for finding, span in zip(names, spans.pop(name), strict=True)}
    if published_statistics:
        spans |= intervals(published_statistics, [patients[row] for row in whole.tolist()])
    return {
        "studies": len(labels),
        "macro": {key: _mean([entry[key] for entry in per_class.values()]) for key in ("auroc", "auprc", "f1", "accuracy")},
        "published": {"studies": len(whole), **(published or {"dcformer": None, "ct_clip": None, "vlm3d": None})},
        "per_class": per_class,
        "undecided": [name for name, entry in per_class.items() if entry["threshold"] is None],
        "one_class": [name for name, entry in per_class.items() if entry["auroc"] is None],
        "intervals": spans,
    }


def macro_auroc(labels: Table, log_odds: Table) -> float:
    """Return the mean AUROC over the findings that are present in some studies and absent in others; NaN where there is none."""
    areas = of_known(auroc_of, labels, log_odds)(np.ones((1, len(labels))))[0]
    return float(np.nanmean(areas)) if np.isfinite(areas).any() else float("nan")


def permuted(patients: Sequence[Any], seed: int) -> list[int]:
    """Permute patients at random. Returns for each study the index of a study of the patient in its patient's place.

    Where the other patient has fewer studies, these are taken in turn. A patient may happen to keep its place.
    """
    members: dict[Any, list[int]] = {}
    for place, patient in enumerate(patients):
        members.setdefault(patient, []).append(place)
    groups = list(members.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    result = [0] * len(patients)
    for group, other in zip(groups, order.tolist(), strict=True):
        for turn, place in enumerate(group):
            result[place] = groups[other][turn % len(groups[other])]
    return result


def label_control(labels: Table, log_odds: Table, patients: Sequence[Any], permutations: int = 100) -> dict[str, Any]:
    """Return the macro AUROC against labels that were permuted among the patients, with seeds 0, 1, ...

    Returns:
        `{"permutations", "macro_auroc": their mean, near 0.5, "range": the middle 95 %, "p_value": how often as good as with the true
        labels, which count as one of the permutations}`; None for the last three where no AUROC is defined.
    """
    areas = np.array([macro_auroc(labels[permuted(patients, seed)], log_odds) for seed in range(permutations)])
    areas, true = areas[~np.isnan(areas)], macro_auroc(labels, log_odds)
    if not len(areas) or np.isnan(true):
        return {"permutations": permutations, "macro_auroc": None, "range": None, "p_value": None}
    share = (int((areas >= true).sum()) + 1) / (len(areas) + 1)
    return {
        "permutations": permutations,
        "macro_auroc": float(areas.mean()),
        "range": np.quantile(areas, [0.025, 0.975]).tolist(),
        "p_value": share,
    }


def reliability(labels: Table, log_odds: Table, bins: int = 10) -> dict[str, Any]:
    """Return the calibration of probabilities over all decisions with known labels.

    Returns:
        `{"bins": [(mean probability, share of present, decisions)] of the equally wide bins that are not empty, "ece": the expected
        calibration error, the mean distance of the first two over all decisions, "brier": the mean squared error}`.
    """
    known = ~np.isnan(labels)
    labels, probabilities = labels[known], expit(log_odds[known])
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    filled = np.flatnonzero(counts)
    means, shares = (np.bincount(place, values, bins)[filled] / counts[filled] for values in (probabilities, labels))
    error = float((np.abs(means - shares) * counts[filled]).sum() / counts.sum())
    rows = list(zip(means.tolist(), shares.tolist(), counts[filled].tolist(), strict=True))
    return {"bins": rows, "ece": error, "brier": float(((probabilities - labels) ** 2).mean())}


def _known(labels: Table) -> list[NDArray[np.int64]]:
    """Return the rows of each finding whose label is known."""
    return [np.flatnonzero(~np.isnan(column)) for column in labels.T]


def _finding(labels: Table, log_odds: Table, threshold: float) -> dict[str, Any]:
    """Return the figures of one finding; labels and log-odds (n,) are of the studies with its label."""
    columns = labels[:, None], log_odds[:, None]
    entry = {
        "studies": len(labels),
        "support": int(labels.sum()),
        "auroc": auroc(*columns)["macro"],
        "auprc": auprc(*columns)["macro"],
    }
    if np.isnan(threshold):
        return entry | NOTHING
    predictions = columns[1] >= threshold
    decided = precision_recall_f1(columns[0], predictions)["per_class"]["0"]
    del decided["support"]
    return entry | decided | {"accuracy": float((columns[0] == predictions).mean()), "threshold": float(expit(threshold))}


def _published(labels: Table, log_odds: Table, thresholds: Table, nearest: Table) -> tuple[dict[str, Any], Mapping[str, Statistic]]:
    """Return the published figures of studies that have all labels, and the statistics of DCFormer's."""
    decided = ~np.isnan(thresholds)
    predictions = (log_odds >= thresholds)[:, decided]
    figures = {
        "dcformer": dcformer_scores(labels, expit(log_odds)),
        "ct_clip": None if np.isnan(nearest).all() else ct_clip_scores(labels, log_odds, nearest),
        "vlm3d": vlm3d_scores(labels[:, decided], predictions, log_odds[:, decided]) if decided.any() else None,
    }
    above = (log_odds > 0).astype(np.float64)
    hits = labels * above

    def weighted_f1(weights: Table) -> Table:
        hit, predicted, support = weights @ hits, weights @ above, weights @ labels  # (S, K)
        f1 = 2 * hit / np.maximum(predicted + support, 1)
        return (f1 * support).sum(axis=1) / np.maximum(support.sum(axis=1), 1)

    return figures, {
        "published.dcformer.accuracy": mean_of((labels == above).mean(axis=1)),
        "published.dcformer.f1": weighted_f1,
        "published.dcformer.precision": ratio_of(hits.sum(axis=1), above.sum(axis=1)),
        "published.dcformer.recall": ratio_of(hits.sum(axis=1), labels.sum(axis=1)),
    }


def of_known(make: Callable[[Any, Any], Statistic], labels: Table, scores: Table) -> Statistic:
    """Make a statistic of K findings, each over the studies with its label; findings that the same studies know are one call."""
    known = ~np.isnan(labels)
    patterns, which = np.unique(known, axis=1, return_inverse=True)
    parts = []
    for number, pattern in enumerate(patterns.T):
        columns = np.flatnonzero(which.ravel() == number)
        if pattern.any():
            parts.append((pattern, columns, make(labels[pattern][:, columns], scores[pattern][:, columns])))

    def statistic(weights: Table) -> Table:
        values = np.full((len(weights), labels.shape[1]), np.nan)
        for pattern, columns, part in parts:
            values[:, columns] = part(weights if pattern.all() else weights[:, pattern])
        return values

    return statistic


def _mean(values: Sequence[Any]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None

"""Scores of yes/no decisions on several findings at once.

Shapes: N = studies, K = findings. `labels` and `predictions` are (N, K) of 0 and 1, `scores` (N, K) of real numbers
that grow with belief.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def precision_recall_f1(labels: Any, predictions: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Precision, recall and F1 per finding, and their macro, micro and support-weighted averages.

    Returns:
        `{"per_class": {name: {"precision", "recall", "f1", "support", "predicted"}}, "macro": {...}, "micro": {...},
        "weighted": {...}}`; names are "0".."K-1" unless given. A 0/0 counts as 0, as in scikit-learn, with one
        exception: a finding that neither labels nor predictions contain tells nothing, has None for all three and is
            left out of the macro average.

    Raises:
        ValueError: if the shapes differ, are not (N, K), or hold anything but 0 and 1.
    """
    truth, stated = _binary(labels, "labels"), _binary(predictions, "predictions")
    if truth.shape != stated.shape:
        raise ValueError(f"labels are {truth.shape} and predictions {stated.shape}; both must be (studies, findings).")
    names = _class_names(names, truth.shape[1])
    hits, predicted, support = (truth & stated).sum(axis=0), stated.sum(axis=0), truth.sum(axis=0)  # each (K,)
    per_class: dict[str, dict[str, float | int | None]] = {}
    for index, name in enumerate(names):
        counts = int(hits[index]), int(predicted[index]), int(support[index])
        scores: dict[str, Any] = {"precision": None, "recall": None, "f1": None}
        if counts[1] or counts[2]:
            scores = dict(_scores(*counts))
        per_class[name] = scores | {"support": counts[2], "predicted": counts[1]}
    told = [entry for entry in per_class.values() if entry["f1"] is not None]
    weights = [float(entry["support"] or 0) for entry in told]
    return {
        "per_class": per_class,
        "macro": {key: _average([entry[key] for entry in told]) for key in ("precision", "recall", "f1")},
        "micro": _scores(int(hits.sum()), int(predicted.sum()), int(support.sum())),
        "weighted": {key: _average([entry[key] for entry in told], weights) for key in ("precision", "recall", "f1")},
    }


def accuracy(references: Sequence[Any] | NDArray[Any], predictions: Sequence[Any] | NDArray[Any]) -> float:
    """Share of equal entries: of answers (N,) of any kind, or of all decisions (N, K)."""
    truth, stated = np.asarray(references), np.asarray(predictions)
    if truth.shape != stated.shape or not truth.size:
        raise ValueError(f"References are {truth.shape} and predictions {stated.shape}; pass equally many, at least one.")
    return float(np.mean(truth == stated))


def auroc(labels: Any, scores: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Area under the ROC curve: the chance that a positive study scores above a negative one, a tie counting one half.

    Returns:
        `{"per_class": {name: area or None}, "macro": mean or None}`. A finding that all studies have, or none, has no
        area and is left out of the mean.

    Raises:
        ValueError: if the shapes differ, labels are not 0 or 1, or a score is NaN.
    """
    from scipy.stats import rankdata

    truth, belief = _binary(labels, "labels"), np.asarray(scores, dtype=np.float64)
    if truth.shape != belief.shape:
        raise ValueError(f"labels are {truth.shape} and scores {belief.shape}; both must be (studies, findings).")
    if np.isnan(belief).any():
        raise ValueError(f"{int(np.isnan(belief).sum())} of {belief.size} scores are NaN; AUROC needs numbers that can be ordered.")
    areas: dict[str, float | None] = {}
    for name, positive, score in zip(_class_names(names, truth.shape[1]), truth.T, belief.T, strict=True):
        positives, negatives = int(positive.sum()), int((~positive).sum())
        if positives and negatives:
            above = rankdata(score)[positive].sum() - positives * (positives + 1) / 2  # Mann-Whitney's U
            areas[name] = float(above / (positives * negatives))
        else:
            areas[name] = None
    return {"per_class": areas, "macro": _average([area for area in areas.values() if area is not None])}


def _scores(hits: int, predicted: int, support: int) -> dict[str, float]:
    return {
        "precision": hits / predicted if predicted else 0.0,
        "recall": hits / support if support else 0.0,
        "f1": 2 * hits / (predicted + support) if predicted + support else 0.0,
    }


def _average(values: Sequence[Any], weights: Sequence[float] | None = None) -> float | None:
    """The (weighted) mean, None where there is nothing to average."""
    if not values or (weights is not None and not sum(weights)):
        return None
    return float(np.average(values, weights=weights))


def _binary(values: Any, name: str) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} must have shape (studies, findings) with at least one of each, got {array.shape}.")
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be 0 or 1 everywhere, got {sorted(set(array.ravel().tolist()) - {0, 1})[:5]}.")
    return array.astype(bool)


def _class_names(names: Sequence[str] | None, count: int) -> Sequence[str]:
    if names is None:
        return [str(index) for index in range(count)]
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"Got {len(set(names))} different names for {count} findings; give one each.")
    return names

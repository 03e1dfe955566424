"""Scores of yes/no decisions on several findings at once, each computed by scikit-learn.

Shapes: N = studies, K = findings. `labels` and `predictions` are (N, K) of 0 and 1; `scores` are (N, K) real numbers, the higher
the likelier. The published figures of CT-RATE differ in what they average and in their thresholds, so each has a function of its own
name. A threshold comes from the validation split, never from what is scored.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.metrics.intervals import crg_of

THRESHOLD_RULES = ("youden", "nearest", "f1")


def precision_recall_f1(labels: Any, predictions: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return precision, recall and F1 per finding, and their macro, micro and support-weighted averages.

    Returns:
        `{"per_class": {name: {"precision", "recall", "f1", "support", "predicted"}}, "macro": {...}, "micro": {...},
        "weighted": {...}}`; names are "0".."K-1" unless given. A 0/0 counts as 0, with one exception: a finding that neither labels nor
        predictions contain has None for all three and is left out of the averages.

    Raises:
        ValueError: if the shapes differ, are not (N, K), or hold anything but 0 and 1.
    """
    labels, predictions = _binary(labels, "labels"), _binary(predictions, "predictions")
    if labels.shape != predictions.shape:
        raise ValueError(f"labels are {labels.shape} and predictions {predictions.shape}; both must be (studies, findings).")
    per_class: dict[str, dict[str, Any]] = {}
    for name, label, prediction in zip(_class_names(names, labels.shape[1]), labels.T, predictions.T, strict=True):
        scores = _scores(label, prediction) if (label | prediction).any() else dict.fromkeys(("precision", "recall", "f1"))
        per_class[name] = {**scores, "support": int(label.sum()), "predicted": int(prediction.sum())}
    defined = [entry for entry in per_class.values() if entry["f1"] is not None]
    support = [entry["support"] for entry in defined]
    return {
        "per_class": per_class,
        "macro": {key: _average([entry[key] for entry in defined]) for key in ("precision", "recall", "f1")},
        "micro": _scores(labels.ravel(), predictions.ravel()),
        "weighted": {key: _average([entry[key] for entry in defined], support) for key in ("precision", "recall", "f1")},
    }


def accuracy(labels: Sequence[Any] | NDArray[Any], predictions: Sequence[Any] | NDArray[Any]) -> float:
    """Return the share of equal entries: of answers (N,) of any kind, or of all decisions (N, K)."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or not labels.size:
        raise ValueError(f"labels are {labels.shape} and predictions {predictions.shape}; pass equally many, at least one.")
    return float(np.mean(labels == predictions))


def auroc(labels: Any, scores: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the area under the ROC curve: the chance that a positive study scores above a negative one, a tie counting one half.

    Returns:
        `{"per_class": {name: area or None}, "macro": mean or None}`. A finding that all studies have, or none, has no
        area and is left out of the mean.

    Raises:
        ValueError: if the shapes differ, labels are not 0 or 1, or a score is NaN.
    """
    from sklearn.metrics import roc_auc_score

    return _areas(labels, scores, names, lambda label, score: None if label.all() else float(roc_auc_score(label, score)))


def auprc(labels: Any, scores: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the area under the precision-recall curve as average precision: the sum of precision times the gain in recall.

    Returns and raises as `auroc`; a finding that no study has has no area. Guessing gives the finding's frequency.
    """
    from sklearn.metrics import average_precision_score

    return _areas(labels, scores, names, lambda label, score: float(average_precision_score(label, score)))


def choose_thresholds(labels: Any, scores: Any, rule: str = "youden") -> NDArray[np.float64]:
    """Choose (K,) thresholds on the validation split: a finding is predicted where its score is the threshold or more.

    Args:
        rule: "youden" has the highest recall + specificity, "nearest" the ROC point nearest to (0, 1) (CT-CLIP's rule),
            "f1" the highest F1. Of equally good ones the highest.

    Returns:
        One of a finding's own scores, or NaN for a finding that all studies have, or none: it cannot be chosen there.

    Raises:
        ValueError: as `auroc`, or if the rule is unknown.
    """
    from sklearn.metrics import roc_curve

    if rule not in THRESHOLD_RULES:
        raise ValueError(f"Unknown threshold rule {rule!r}; known are {', '.join(THRESHOLD_RULES)}.")
    labels, scores = _scored(labels, scores)
    thresholds = np.full(labels.shape[1], np.nan)
    for finding, (label, score) in enumerate(zip(labels.T, scores.T, strict=True)):
        if label.all() or not label.any():
            continue
        false_positive_rate, recall, candidates = (values[1:] for values in roc_curve(label, score, drop_intermediate=False))
        positives, negatives = int(label.sum()), int((~label).sum())
        quality = {
            "youden": recall - false_positive_rate,
            "nearest": -np.hypot(1 - recall, false_positive_rate),
            "f1": 2 * recall * positives / (recall * positives + false_positive_rate * negatives + positives),
        }[rule]
        thresholds[finding] = candidates[quality.argmax()]  # the first and so the highest of equals
    return thresholds


def dcformer_scores(labels: Any, probabilities: Any) -> dict[str, float]:
    """Return the scores of the DCFormer paper's Tables 1 and 2: predicted above 0.5; accuracy of all N x K decisions, micro precision and
    recall, and the mean of F1 weighted by how many studies have the finding.

    Raises:
        ValueError: as `auroc`, or if a probability is not in 0..1.
    """
    labels, probabilities = _scored(labels, probabilities)
    if ((probabilities < 0) | (probabilities > 1)).any():
        low, high = probabilities.min(), probabilities.max()
        raise ValueError(f"Probabilities must lie in 0..1, got {low:g} to {high:g}; pass the softmax of the two prompts.")
    predictions = probabilities > 0.5
    scores = precision_recall_f1(labels, predictions)
    return {
        "accuracy": accuracy(labels, predictions),
        "f1": scores["weighted"]["f1"] or 0.0,  # no study has anything: 0, as in scikit-learn
        "precision": scores["micro"]["precision"],
        "recall": scores["micro"]["recall"],
    }


def ct_clip_scores(labels: Any, scores: Any, thresholds: Any) -> dict[str, Any]:
    """Return the scores of CT-CLIP's evaluation: per finding AUROC, accuracy, precision, and F1 of "present" and "absent" weighted by how
    often each is true; then means over the findings.

    `thresholds` (K,) are those of `choose_thresholds(..., "nearest")`, here from the validation split; CT-CLIP chose them
    on the test set. Findings without a threshold or an AUROC are left out; "findings" says how many are in.
    """
    labels, scores = _scored(labels, scores)
    thresholds = _thresholds(thresholds, labels.shape[1])
    areas = auroc(labels, scores)["per_class"]
    rows = []
    for finding, threshold in enumerate(thresholds):
        if np.isnan(threshold) or areas[str(finding)] is None:
            continue
        label, prediction = labels[:, finding], scores[:, finding] >= threshold
        present, absent = _scores(label, prediction), _scores(~label, ~prediction)
        f1 = label.mean() * present["f1"] + (1 - label.mean()) * absent["f1"]
        rows.append((areas[str(finding)], accuracy(label, prediction), f1, present["precision"]))
    means = np.mean(rows, axis=0).tolist() if rows else [None] * 4
    return dict(zip(("auroc", "accuracy", "f1", "precision"), means, strict=True)) | {"findings": len(rows)}


def vlm3d_scores(labels: Any, predictions: Any, scores: Any | None = None) -> dict[str, float | None]:
    """Return the scores of the VLM3D challenge: means over all K findings of precision, recall, F1 and accuracy, a 0/0 counting as 0 even
    where a finding neither occurs nor is predicted; of AUROC (None without `scores`) over those that have one; and CRG.
    """
    labels, predictions = _binary(labels, "labels"), _binary(predictions, "predictions")
    entries = precision_recall_f1(labels, predictions)["per_class"].values()
    means = {key: float(np.mean([entry[key] or 0.0 for entry in entries])) for key in ("precision", "recall", "f1")}
    area = None if scores is None else auroc(labels, scores)["macro"]
    return {**means, "accuracy": accuracy(labels, predictions), "auroc": area, "crg": crg(labels, predictions)}


def crg(labels: Any, predictions: Any) -> float | None:
    """Return the CRG of the VLM3D challenge (see `intervals.crg_of`); None where no study has any finding."""
    labels, predictions = _binary(labels, "labels"), _binary(predictions, "predictions")
    if labels.shape != predictions.shape:
        raise ValueError(f"labels are {labels.shape} and predictions {predictions.shape}; both must be (studies, findings).")
    value = float(crg_of(labels, predictions)(np.ones((1, len(labels))))[0])
    return None if np.isnan(value) else value


def _areas(labels: Any, scores: Any, names: Sequence[str] | None, area: Callable[[Any, Any], float | None]) -> dict[str, Any]:
    """Return `area(label, score)` of each finding that some study has, and their mean."""
    labels, scores = _scored(labels, scores)
    columns = zip(_class_names(names, labels.shape[1]), labels.T, scores.T, strict=True)
    areas = {name: area(label, score) if label.any() else None for name, label, score in columns}
    return {"per_class": areas, "macro": _average([value for value in areas.values() if value is not None])}


def _scores(labels: NDArray[np.bool_], predictions: NDArray[np.bool_]) -> dict[str, Any]:
    """Return precision, recall and F1 of (N,) decisions."""
    from sklearn.metrics import precision_recall_fscore_support

    values = precision_recall_fscore_support(labels, predictions, average="binary", pos_label=True, zero_division=0)[:3]
    return dict(zip(("precision", "recall", "f1"), map(float, values), strict=True))


def _thresholds(thresholds: Any, count: int) -> NDArray[np.float64]:
    array = np.asarray(thresholds, dtype=np.float64)
    if array.shape not in ((), (count,)):
        raise ValueError(f"Got thresholds of shape {array.shape} for {count} findings; give one for all or one each.")
    thresholds = np.broadcast_to(array, (count,))
    if np.isnan(thresholds).all():
        raise ValueError("No finding has a threshold; choose them on a split where some studies have the findings and some have not.")
    return thresholds


def _scored(labels: Any, scores: Any) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    labels, scores = _binary(labels, "labels"), np.asarray(scores, dtype=np.float64)
    if labels.shape != scores.shape:
        raise ValueError(f"labels are {labels.shape} and scores {scores.shape}; both must be (studies, findings).")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN; scores must be numbers that can be ordered.")
    return labels, scores


def _average(values: Sequence[Any], weights: Sequence[float] | None = None) -> float | None:
    """Return the (weighted) mean, None where there is nothing to average."""
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

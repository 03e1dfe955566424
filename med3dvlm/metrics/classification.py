"""Scores of yes/no decisions on several findings at once.

Shapes: N = studies, K = findings. `labels` and `predictions` are (N, K) of 0 and 1, `scores` (N, K) of real numbers
that grow with belief. The published figures of CT-RATE differ by what they average and where they cut, so each has a
function of its own name; a threshold comes from the validation split, never from what is scored.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.metrics.intervals import average_precision_of, crg_of

THRESHOLD_RULES = ("youden", "nearest", "f1")


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

    truth, belief = _scored(labels, scores)
    areas: dict[str, float | None] = {}
    for name, positive, score in zip(_class_names(names, truth.shape[1]), truth.T, belief.T, strict=True):
        positives, negatives = int(positive.sum()), int((~positive).sum())
        if positives and negatives:
            above = rankdata(score)[positive].sum() - positives * (positives + 1) / 2  # Mann-Whitney's U
            areas[name] = float(above / (positives * negatives))
        else:
            areas[name] = None
    return {"per_class": areas, "macro": _average([area for area in areas.values() if area is not None])}


def auprc(labels: Any, scores: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Area under the precision-recall curve as scikit-learn's average precision: sum of precision times gain in recall.

    Returns and raises as `auroc`; a finding that no study has has no area. Guessing gives the finding's frequency.
    """
    truth, belief = _scored(labels, scores)
    values = average_precision_of(truth, belief)(np.ones((1, len(truth))))[0]
    pairs = zip(_class_names(names, truth.shape[1]), values.tolist(), strict=True)
    areas = {name: None if np.isnan(value) else value for name, value in pairs}
    return {"per_class": areas, "macro": _average([area for area in areas.values() if area is not None])}


def choose_thresholds(labels: Any, scores: Any, rule: str = "youden") -> NDArray[np.float64]:
    """(K,) thresholds from the validation split: state a finding where its score is the threshold or more.

    Args:
        rule: "youden" has the highest recall + specificity, "nearest" the ROC point nearest to (0, 1) (CT-CLIP's rule),
            "f1" the highest F1. Of equally good ones the highest.

    Returns:
        One of a finding's own scores, or NaN for a finding that all studies have, or none: it cannot be chosen there.

    Raises:
        ValueError: as `auroc`, or if the rule is unknown.
    """
    if rule not in THRESHOLD_RULES:
        raise ValueError(f"Unknown threshold rule {rule!r}; known are {', '.join(THRESHOLD_RULES)}.")
    truth, belief = _scored(labels, scores)
    thresholds = np.full(truth.shape[1], np.nan)
    for finding, (positive, score) in enumerate(zip(truth.T, belief.T, strict=True)):
        if positive.all() or not positive.any():
            continue
        candidates = np.unique(score)[::-1]  # falling
        hits, alarms = _at_least(score[positive], candidates), _at_least(score[~positive], candidates)
        recall, fallout = hits / positive.sum(), alarms / (~positive).sum()
        merit = {
            "youden": recall - fallout,
            "nearest": -np.hypot(1 - recall, fallout),
            "f1": 2 * hits / (hits + alarms + positive.sum()),
        }[rule]
        thresholds[finding] = candidates[merit.argmax()]
    return thresholds


def detection_scores(labels: Any, scores: Any, thresholds: Any = 0.5, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Every score of this module by name.

    Args:
        thresholds: one for all or (K,), from `choose_thresholds` on the validation split.

    Returns:
        `precision_recall_f1` of the decisions, to each class added "auroc", "auprc", "accuracy" and "threshold", to
        "macro" the means of the first three; "published": `{"dcformer", "ct_clip", "vlm3d"}`, see the functions of these
        names ("dcformer" is None where scores are no probabilities). A finding whose threshold is NaN has None for
        what needs one and is left out of the averages; "undecided" lists these.

    Raises:
        ValueError: as `auroc`, or if there is not one threshold or K, or all are NaN.
    """
    truth, belief = _scored(labels, scores)
    names = _class_names(names, truth.shape[1])
    cuts = _thresholds(thresholds, truth.shape[1])
    decided = np.flatnonzero(~np.isnan(cuts))
    stated = belief >= cuts
    chosen = [names[index] for index in decided.tolist()]
    result = precision_recall_f1(truth[:, decided], stated[:, decided], chosen)
    areas = {"auroc": auroc(truth, belief, names), "auprc": auprc(truth, belief, names)}
    right = dict(zip(chosen, (truth == stated)[:, decided].mean(axis=0).tolist(), strict=True))
    cut_of = dict(zip(chosen, cuts[decided].tolist(), strict=True))
    nothing = {"precision": None, "recall": None, "f1": None, "predicted": None}
    per_class = {}
    for index, name in enumerate(names):
        entry = result["per_class"].get(name, {**nothing, "support": int(truth[:, index].sum())})
        per_class[name] = {
            **entry,
            **{area: values["per_class"][name] for area, values in areas.items()},
            "accuracy": right.get(name),
            "threshold": cut_of.get(name),
        }
    result["per_class"] = per_class
    result["macro"] |= {area: values["macro"] for area, values in areas.items()} | {"accuracy": _average(list(right.values()))}
    probable = bool(((belief >= 0) & (belief <= 1)).all())
    result["published"] = {
        "dcformer": dcformer_scores(truth, belief) if probable else None,
        "ct_clip": ct_clip_scores(truth, belief, cuts),
        "vlm3d": vlm3d_scores(truth[:, decided], stated[:, decided], belief[:, decided]),
    }
    return result | {"undecided": [name for name in names if name not in cut_of]}


def dcformer_scores(labels: Any, probabilities: Any) -> dict[str, float]:
    """As the DCFormer paper's Tables 1 and 2 were computed: stated above 0.5; accuracy of all N x K decisions, micro precision
    and recall, and the mean of F1 weighted by how many studies have the finding.

    Raises:
        ValueError: as `auroc`, or if a probability is not in 0..1.
    """
    truth, belief = _scored(labels, probabilities)
    if ((belief < 0) | (belief > 1)).any():
        raise ValueError(f"Probabilities must lie in 0..1, got {belief.min():g} to {belief.max():g}; pass the softmax of the two prompts.")
    stated = belief > 0.5
    scores = precision_recall_f1(truth, stated)
    return {
        "accuracy": accuracy(truth, stated),
        "f1": scores["weighted"]["f1"] or 0.0,  # no study has anything: 0, as in scikit-learn
        "precision": scores["micro"]["precision"],
        "recall": scores["micro"]["recall"],
    }


def ct_clip_scores(labels: Any, scores: Any, thresholds: Any) -> dict[str, Any]:
    """As CT-CLIP's evaluation: per finding AUROC, accuracy, precision, and F1 of "present" and "absent" weighted by how
    often each is true; then means over the findings.

    `thresholds` (K,) are those of `choose_thresholds(..., "nearest")`, here from the validation split; CT-CLIP chose them
    on the test set. Findings without a threshold or an AUROC are left out; "findings" says how many are in.
    """
    truth, belief = _scored(labels, scores)
    cuts = _thresholds(thresholds, truth.shape[1])
    areas = auroc(truth, belief)["per_class"]
    rows = []
    for finding, cut in enumerate(cuts):
        if np.isnan(cut) or areas[str(finding)] is None:
            continue
        positive, stated = truth[:, finding], belief[:, finding] >= cut
        present = _scores(int((positive & stated).sum()), int(stated.sum()), int(positive.sum()))
        absent = _scores(int((~positive & ~stated).sum()), int((~stated).sum()), int((~positive).sum()))
        share = positive.mean()
        f1 = share * present["f1"] + (1 - share) * absent["f1"]
        rows.append((areas[str(finding)], np.mean(positive == stated), f1, present["precision"]))
    means = np.mean(rows, axis=0).tolist() if rows else [None] * 4
    return dict(zip(("auroc", "accuracy", "f1", "precision"), means, strict=True)) | {"findings": len(rows)}


def vlm3d_scores(labels: Any, predictions: Any, scores: Any | None = None) -> dict[str, float | None]:
    """As the VLM3D challenge: means over all K findings of precision, recall, F1 and accuracy, a 0/0 counting as 0 even
    where a finding neither occurs nor is stated; of AUROC (None without `scores`) over those that have one; and CRG.
    """
    truth, stated = _binary(labels, "labels"), _binary(predictions, "predictions")
    entries = precision_recall_f1(truth, stated)["per_class"].values()
    means = {key: float(np.mean([entry[key] or 0.0 for entry in entries])) for key in ("precision", "recall", "f1")}
    area = None if scores is None else auroc(truth, scores)["macro"]
    return {**means, "accuracy": accuracy(truth, stated), "auroc": area, "crg": crg(truth, stated)}


def crg(labels: Any, predictions: Any) -> float | None:
    """CRG of the VLM3D challenge (see `intervals.crg_of`); None where no study has any finding."""
    truth, stated = _binary(labels, "labels"), _binary(predictions, "predictions")
    if truth.shape != stated.shape:
        raise ValueError(f"labels are {truth.shape} and predictions {stated.shape}; both must be (studies, findings).")
    value = float(crg_of(truth, stated)(np.ones((1, len(truth))))[0])
    return None if np.isnan(value) else value


def _at_least(scores: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """(T,) how many of the scores reach each threshold."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")


def _thresholds(thresholds: Any, count: int) -> NDArray[np.float64]:
    array = np.asarray(thresholds, dtype=np.float64)
    if array.shape not in ((), (count,)):
        raise ValueError(f"Got thresholds of shape {array.shape} for {count} findings; give one for all or one each.")
    cuts = np.broadcast_to(array, (count,))
    if np.isnan(cuts).all():
        raise ValueError("No finding has a threshold; choose them on a split where some studies have the findings and some have not.")
    return cuts


def _scored(labels: Any, scores: Any) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    truth, belief = _binary(labels, "labels"), np.asarray(scores, dtype=np.float64)
    if truth.shape != belief.shape:
        raise ValueError(f"labels are {truth.shape} and scores {belief.shape}; both must be (studies, findings).")
    if np.isnan(belief).any():
        raise ValueError(f"{int(np.isnan(belief).sum())} of {belief.size} scores are NaN; scores must be numbers that can be ordered.")
    return truth, belief


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

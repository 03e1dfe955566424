"""Retrieval of volumes by a volume, scored by the findings that they share.

Shapes: N = studies, d = width of their embeddings, K = findings; `labels` are (N, K) of 0 and 1. Candidates are the studies of other
patients: another reconstruction of the same scan is always near, and always shows the same.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.metrics.retrieval import BLOCK, TIE, check_ks, normalised

KS = (1, 5, 10, 50)


def shared_findings(embeddings: Any, labels: Any, patients: Sequence[Any], ks: Sequence[int] = KS) -> dict[str, NDArray[np.float64]]:
    """Return one value a query, NaN where undefined; their means are the scores.

    Args:
        embeddings: (N, d), normalised here.
        patients: N identifiers.
        ks: how many of the nearest are looked at; all candidates where there are fewer.

    Returns:
        "map{k}", average precision at k: with r_i = 1 where the i-th nearest shares a finding with the query and R candidates that do,
        sum over i <= k of r_i (r_1 + ... + r_i) / i, divided by min(k, R); queries without a finding or with R = 0 have none.
        "overlap{k}", what CT-CLIP's released evaluation averages and calls mean average precision: the share of the findings of either
        that both have (Jaccard), mean over the k nearest of the candidates with a finding. There the query is its own first candidate,
        and each k's mean holds those of the smaller k; here neither.
        "chance_map{k}", "chance_overlap": what is expected of a random order of the same candidates.
        Candidates that are equally near stand in the order that is worst for the query.

    Raises:
        ValueError: if shapes do not fit, a k is below 1, or labels are not 0 or 1.
    """
    check_ks(ks)
    vectors, labels = normalised(embeddings, "embeddings"), np.asarray(labels, dtype=np.float64)
    if labels.ndim != 2 or not len(vectors) == len(labels) == len(patients) or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"embeddings are {vectors.shape}, labels {labels.shape} and patients {len(patients)}; one row of 0 and 1 each")
    patient = np.unique(np.asarray(patients), return_inverse=True)[1]
    counts = labels.sum(axis=1)
    names = [f"{name}{k}" for k in ks for name in ("map", "overlap", "chance_map")]
    values = {name: np.full(len(labels), np.nan) for name in (*names, "chance_overlap")}
    height = max(BLOCK // len(labels), 1)
    for start in range(0, len(labels), height):
        rows = np.arange(start, min(start + height, len(labels)))
        similarity = vectors[rows] @ vectors.T  # (rows, N)
        both = labels[rows] @ labels.T
        overlap = both / np.maximum(counts[rows, None] + counts - both, 1)
        for row, near, shared, alike in zip(rows.tolist(), similarity, both > 0, overlap, strict=True):
            others = patient != patient[row]
            shown = np.flatnonzero(others & (counts > 0))
            if len(shown):
                found = alike[shown][_nearest(near[shown], alike[shown], max(ks))]
                values["chance_overlap"][row] = alike[shown].mean()
                for k in ks:
                    values[f"overlap{k}"][row] = found[:k].mean()
            candidates = np.flatnonzero(others)
            if relevant := int(shared[candidates].sum()):
                hits = shared[candidates][_nearest(near[candidates], shared[candidates], max(ks))]
                precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
                for k in ks:
                    values[f"map{k}"][row] = (precision * hits)[:k].sum() / min(k, relevant)
                    values[f"chance_map{k}"][row] = _expected(relevant, len(candidates), k)
    return values


def _nearest(similarity: NDArray[np.float64], worth: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` highest similarities in order; of equal ones those of least worth come first."""
    count = min(count, len(similarity))
    near = np.flatnonzero(similarity >= np.partition(similarity, -count)[-count] - TIE)
    falling = np.argsort(-similarity[near], kind="stable")
    # Similarities closer than TIE are equal: they get the number of their run.
    run = np.cumsum(np.diff(-similarity[near][falling], prepend=-np.inf) > TIE)
    order = np.lexsort((worth[near][falling], run))
    chosen: NDArray[np.int64] = near[falling][order][:count]
    return chosen


def _expected(relevant: int, candidates: int, k: int) -> float:
    """Return the average precision at k of a random order, where `relevant` of the candidates count as right."""
    place = np.arange(1, min(k, candidates) + 1)
    one = relevant / candidates  # that a place is right, and that another one is, too
    two = one * (relevant - 1) / max(candidates - 1, 1)
    return float(((one + (place - 1) * two) / place).sum() / min(k, relevant))

"""Retrieval between paired images and texts: row i of the one belongs to row i of the other.

Shapes: N = pairs in the pool, d = width of the shared space. The N x N similarities are never held at once, see `BLOCK`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Similarities closer than this count as tied: equal embeddings must tie in spite of the rounding of a matrix product
# in float64. In float32, where rounding reaches 1e-6, pairs that merely resemble each other would tie too.
TIE = 1e-12
BLOCK = 2**25  # similarities at a time: 256 MB of float64, whatever the size of the pool

Ranks = dict[str, NDArray[np.int64]]


def retrieval_scores(
    image_embeddings: Any,
    text_embeddings: Any,
    ks: Sequence[int] = (1, 5, 10),
    pool: int | None = None,
    groups: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Return recall@k, median rank and mean reciprocal rank of the partners, in both directions.

    Args:
        image_embeddings: torch tensor or array (N, d), normalised here.
        text_embeddings: the same; row i of both comes from the same study.
        ks: the k of recall@k; k of the pool or more is always found.
        pool: take the first `pool` pairs only, as the papers do with 100, 500, 1000 and 2000; None takes all.
        groups: N identifiers, equal for studies of equal content (the same report word for word, the same scan twice).

    Returns:
        `{"image_to_text": {"r1", "r5", "r10", "median_rank", "mrr"}, "text_to_image": {...}, "pool": N}`.
        "image_to_text" asks with an image and ranks the texts. Ranks start at 1 and ties count against the partner, so
        a model that embeds everything alike scores 0 at every k below N.
        With `groups` also `"any_of_equal": {"image_to_text": {...}, "text_to_image": {...}, "duplicated": M}`, where
        each of the M studies that have an equal one in the pool is found as soon as one of them is.

    Raises:
        ValueError: if the shapes do not fit, the pool is larger than the data, a k is below 1, or an embedding is not
            finite.
    """
    check_ks(ks)
    ranks = retrieval_ranks(image_embeddings, text_embeddings, pool)
    scores: dict[str, Any] = {direction: _summary(values, ks) for direction, values in ranks.items()}
    scores["pool"] = len(ranks["image_to_text"])
    if groups is not None:
        forgiving = retrieval_ranks(image_embeddings, text_embeddings, pool, groups)
        _, group, sizes = np.unique(np.asarray(groups)[: scores["pool"]], return_inverse=True, return_counts=True)
        scores["any_of_equal"] = {direction: _summary(values, ks) for direction, values in forgiving.items()}
        scores["any_of_equal"]["duplicated"] = int((sizes[group] > 1).sum())
    return scores


def retrieval_ranks(image_embeddings: Any, text_embeddings: Any, pool: int | None = None, groups: Sequence[Any] | None = None) -> Ranks:
    """Return `{"image_to_text": (N,), "text_to_image": (N,)}`: the rank of each query's partner, from 1, or with `groups` of its best equal.

    Arguments and errors as for `retrieval_scores`.
    """
    images, texts = normalised(image_embeddings, "image_embeddings"), normalised(text_embeddings, "text_embeddings")
    if images.shape != texts.shape:
        raise ValueError(f"image_embeddings are {images.shape} and text_embeddings {texts.shape}; they must be pairs of one width.")
    if groups is not None and len(groups) != len(images):
        raise ValueError(f"Got {len(images)} pairs but {len(groups)} groups; give one group for each pair.")
    if pool is not None:
        if not 1 <= pool <= len(images):
            raise ValueError(f"pool={pool} with {len(images)} pairs; choose a pool between 1 and {len(images)}.")
        images, texts = images[:pool], texts[:pool]
    equal = None if groups is None else np.unique(np.asarray(groups)[:pool], return_inverse=True)[1]
    return dict(zip(("image_to_text", "text_to_image"), _ranks(images, texts, equal), strict=True))


def rank_values(ranks: NDArray[np.int64], ks: Sequence[int] = (1, 5, 10)) -> dict[str, NDArray[np.float64]]:
    """Return `{"r1": (N,), ..., "mrr": (N,)}`, one value a query, whose means are the scores: for intervals and tests of pairs."""
    check_ks(ks)
    return {f"r{k}": (ranks <= k).astype(np.float64) for k in ks} | {"mrr": 1 / ranks}


def recall_curve(
    image_embeddings: Any, text_embeddings: Any, ks: Sequence[int] | None = None, pool: int | None = None
) -> dict[str, list[tuple[int, float]]]:
    """Return `{"image to text": [(k, recall), ...], "text to image": [...]}` for `plots.retrieval_curve`.

    Arguments and errors as for `retrieval_scores`; `ks` is by default every k from 1 to N.
    """
    ranks = retrieval_ranks(image_embeddings, text_embeddings, pool)
    size = len(ranks["image_to_text"])
    ks = range(1, size + 1) if ks is None else ks
    check_ks(ks)
    curves = {}
    for direction, values in ranks.items():
        found = np.cumsum(np.bincount(values, minlength=size + 1)) / size  # by k, from 0
        curves[direction.replace("_", " ")] = [(int(k), float(found[min(k, size)])) for k in ks]
    return curves


def _ranks(
    images: NDArray[np.float64], texts: NDArray[np.float64], equal: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ranks (N,) of the images' texts and of the texts' images: one more than the wrong partners that come as near as the right
    one, or, with `equal` (N,), as the best of the right ones. Both come from the same similarities, which are computed once.
    """
    equal = np.arange(len(images)) if equal is None else equal
    nearest = np.einsum("nd,nd->n", images, texts)
    best = nearest, nearest.copy()  # for each image, for each text
    by_group = np.argsort(equal, kind="stable")
    for group in np.split(by_group, np.flatnonzero(np.diff(equal[by_group])) + 1):
        for rows in _blocks(group, len(group)) if len(group) > 1 else ():
            similarity = images[rows] @ texts[group].T
            best[0][rows], best[1][group] = similarity.max(axis=1), np.maximum(best[1][group], similarity.max(axis=0))
    ranks = np.ones(len(images), dtype=np.int64), np.ones(len(images), dtype=np.int64)
    for rows in _blocks(np.arange(len(images)), len(images)):
        similarity = images[rows] @ texts.T  # (rows, N)
        similarity[equal[rows, None] == equal] = -np.inf
        ranks[0][rows] += np.count_nonzero(similarity >= best[0][rows, None] - TIE, axis=1)
        ranks[1][:] += np.count_nonzero(similarity >= best[1] - TIE, axis=0)
    return ranks


def _blocks(rows: NDArray[np.int64], width: int) -> Iterator[NDArray[np.int64]]:
    """Return slices of rows that make at most BLOCK similarities each."""
    height = max(BLOCK // width, 1)
    return (rows[start : start + height] for start in range(0, len(rows), height))


def normalised(embeddings: Any, name: str) -> NDArray[np.float64]:
    if hasattr(embeddings, "detach"):  # a torch tensor, without importing torch; numpy knows no bfloat16
        embeddings = embeddings.detach().float().cpu().numpy()
    array = np.asarray(embeddings, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} must have shape (N, d) with N and d at least 1, got {array.shape}.")
    if not np.isfinite(array).all():
        rows = np.flatnonzero(~np.isfinite(array).all(axis=1))
        raise ValueError(f"{name} holds NaN or infinite values in {len(rows)} of {len(array)} rows, the first is row {rows[0]}.")
    # An all-zero embedding stays zero: it ties with everything and so ranks last.
    lengths = np.maximum(np.linalg.norm(array, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    unit: NDArray[np.float64] = array / lengths
    return unit


def _summary(ranks: NDArray[np.int64], ks: Sequence[int]) -> dict[str, float]:
    means = {name: float(np.mean(values)) for name, values in rank_values(ranks, ks).items()}
    recalls = {name: value for name, value in means.items() if name != "mrr"}
    return recalls | {"median_rank": float(np.median(ranks)), "mrr": means["mrr"]}


def check_ks(ks: Sequence[int]) -> None:
    if not len(ks) or min(ks) < 1:
        raise ValueError(f"ks={list(ks)}: give at least one k, each 1 or more.")

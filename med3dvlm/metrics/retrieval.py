"""Retrieval between paired images and texts: row i of the one belongs to row i of the other.

Shapes: N = pairs in the pool, d = width of the shared space.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Similarities closer than this count as tied: equal embeddings must tie in spite of the rounding of a matrix product
# in float64.
TIE = 1e-12


def retrieval_scores(
    image_embeddings: Any, text_embeddings: Any, ks: Sequence[int] = (1, 5, 10), pool: int | None = None
) -> dict[str, Any]:
    """Recall@k, median rank and mean reciprocal rank of each one's partner, in both directions.

    Args:
        image_embeddings, text_embeddings: torch tensors or arrays (N, d), row i of both from the same study;
            normalised here.
        ks: the k of recall@k; k of the pool or more is always found.
        pool: take the first `pool` pairs only, as the papers do with 100, 500, 1000 and 2000; None takes all.

    Returns:
        `{"image_to_text": {"r1", "r5", "r10", "median_rank", "mrr"}, "text_to_image": {...}, "pool": N}`.
        "image_to_text" asks with an image and ranks the texts. Ranks start at 1 and ties count against the partner, so
        a model that embeds everything alike scores 0 at every k below N.

    Raises:
        ValueError: if the shapes do not fit, the pool is larger than the data, a k is below 1, or an embedding is not
            finite.
    """
    image_ranks, text_ranks = _both_ranks(image_embeddings, text_embeddings, pool)
    _check_ks(ks)
    return {
        "image_to_text": _summary(image_ranks, ks),
        "text_to_image": _summary(text_ranks, ks),
        "pool": len(image_ranks),
    }


def recall_curve(
    image_embeddings: Any, text_embeddings: Any, ks: Sequence[int] | None = None, pool: int | None = None
) -> dict[str, list[tuple[int, float]]]:
    """`{"image to text": [(k, recall), ...], "text to image": [...]}` for `plots.retrieval_curve`.

    Arguments and errors as for `retrieval_scores`; `ks` is by default every k from 1 to N.
    """
    image_ranks, text_ranks = _both_ranks(image_embeddings, text_embeddings, pool)
    ks = range(1, len(image_ranks) + 1) if ks is None else ks
    _check_ks(ks)
    ranks = {"image to text": image_ranks, "text to image": text_ranks}
    return {direction: [(int(k), float(np.mean(values <= k))) for k in ks] for direction, values in ranks.items()}


def partner_ranks(queries: Any, candidates: Any) -> NDArray[np.int64]:
    """(N,) ranks, from 1, of candidate i among all candidates for query i, by cosine similarity, ties against it."""
    similarity = _normalised(queries, "queries") @ _normalised(candidates, "candidates").T  # (N, N)
    partner = np.diagonal(similarity)[:, None]
    ranks: NDArray[np.int64] = np.sum(similarity >= partner - TIE, axis=1)  # counts the partner itself, hence from 1
    return ranks


def _both_ranks(images: Any, texts: Any, pool: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    images, texts = _normalised(images, "image_embeddings"), _normalised(texts, "text_embeddings")
    if images.shape != texts.shape:
        raise ValueError(f"image_embeddings are {images.shape} and text_embeddings {texts.shape}; they must be pairs of one width.")
    if pool is not None:
        if not 1 <= pool <= len(images):
            raise ValueError(f"pool={pool} with {len(images)} pairs; choose a pool between 1 and {len(images)}.")
        images, texts = images[:pool], texts[:pool]
    return partner_ranks(images, texts), partner_ranks(texts, images)


def _normalised(embeddings: Any, name: str) -> NDArray[np.float64]:
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
    recalls = {f"r{k}": float(np.mean(ranks <= k)) for k in ks}
    return recalls | {"median_rank": float(np.median(ranks)), "mrr": float(np.mean(1 / ranks))}


def _check_ks(ks: Sequence[int]) -> None:
    if not len(ks) or min(ks) < 1:
        raise ValueError(f"ks={list(ks)}: give at least one k, each 1 or more.")

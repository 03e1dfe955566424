"""Nearest vectors against plain loops, with ties and odd sizes, and the recall of the vector index."""

from pathlib import Path

import numpy as np
import pytest

from med3dvlm.search import vectors
from med3dvlm.search.vectors import Nearest, Vectors


def unit(values: np.ndarray) -> Vectors:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def by_loops(stored: Vectors, query: Vectors, top: int) -> tuple[list[int], list[float]]:
    """Compute similarities one number at a time."""
    pairs = []
    for row, vector in enumerate(stored.tolist()):
        cosine = 0.0
        for one, other in zip(vector, query.tolist(), strict=True):
            cosine += one * other
        pairs.append((-cosine, row))
    pairs.sort()
    return [row for _, row in pairs[:top]], [-cosine for cosine, _ in pairs[:top]]


def check(found: list[Nearest], stored: Vectors, queries: Vectors, top: int) -> None:
    assert len(found) == len(queries)
    for (rows, cosines), query in zip(found, queries, strict=True):
        expected_rows, expected = by_loops(stored, query, top)
        assert rows.tolist() == expected_rows
        np.testing.assert_allclose(cosines, expected, atol=1e-14)  # worst measured: 3e-16


@pytest.mark.parametrize(("count", "width", "top"), [(1, 5, 1), (7, 3, 7), (48, 33, 5), (131, 17, 20)])
def test_exact_search_equals_plain_loops(count: int, width: int, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks have 16 rows, the last one fewer."""
    monkeypatch.setattr(vectors, "BLOCK", 16)
    random = np.random.default_rng(count)
    stored, queries = unit(random.normal(size=(count, width))), unit(random.normal(size=(3, width)))
    check(vectors.exact(stored, queries, top), stored, queries, top)


def test_equal_vectors_tie_and_the_first_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "BLOCK", 16)
    random = np.random.default_rng(0)
    stored = unit(random.normal(size=(6, 19)))[random.integers(0, 6, 101)]  # each about 17 times
    queries = unit(random.normal(size=(4, 19)))
    found = vectors.exact(stored, queries, 30)
    check(found, stored, queries, 30)
    assert all(len(set(cosines.tolist())) < 6 for _, cosines in found)


@pytest.mark.parametrize("seed", range(8))
def test_vectors_that_float32_cannot_tell_apart(seed: int) -> None:
    """Products in float32 would select other neighbours for half of these seeds."""
    random = np.random.default_rng(seed)
    stored = unit(random.normal(size=(1, 257)) + 1e-6 * random.normal(size=(90, 257)))
    queries = unit(stored[:1] + 0.3 * random.normal(size=(1, 257)))
    check(vectors.exact(stored, queries, 7), stored, queries, 7)


def test_the_index_finds_nearly_all_and_states_exact_cosines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PROBES", 8)  # of 55 cells
    random = np.random.default_rng(2)
    centres = random.normal(size=(40, 24))
    stored, queries = (unit(centres[random.integers(0, 40, n)] + 0.5 * random.normal(size=(n, 24))) for n in (3001, 50))
    vectors.build(stored, tmp_path / "nearest.faiss")
    index = vectors.open_index(tmp_path / "nearest.faiss")
    truth, found = vectors.exact(stored, queries, 10), vectors.by_index(index, stored, queries, 10)
    recall = np.mean([len(set(rows) & set(true_rows)) / 10 for (rows, _), (true_rows, _) in zip(found, truth, strict=True)])
    assert recall > 0.97  # measured: 1, and at least 0.998 for other seeds
    for (rows, cosines), query in zip(found, queries, strict=True):
        assert len(set(rows.tolist())) == 10 and (np.diff(cosines) <= 0).all()
        np.testing.assert_allclose(cosines, stored[rows].astype(np.float64) @ query, atol=1e-14)
    vectors.build(stored, tmp_path / "again.faiss")
    assert (tmp_path / "again.faiss").read_bytes() == (tmp_path / "nearest.faiss").read_bytes()

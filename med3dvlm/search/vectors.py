"""Find the nearest of many unit vectors: exactly, or by an index that searches only where the nearest are likely to be.

    exact     All vectors are compared, block by block, with as little memory as one block takes. Equal vectors tie, and the first comes first.
    index     Beyond EXACT_UP_TO vectors. faiss sorts them into about sqrt(N) cells and keeps 8 bits a number (IVF, SQ8). A query is compared with
              those of the PROBES nearest cells, and the CANDIDATES nearest of them are then compared exactly. What is returned has exact
              similarities; what can be missed is a neighbour in a cell that was not looked at.

Why this index: `python -m benchmarks.search --others` measures it beside two more on vectors that lie in clusters, as embeddings do. It is made of
a million vectors of 512 numbers in half a minute of CPU time. A graph (HNSW; usearch, 8 bits a number) took twice that for the first tenth of
them. Signs alone (1 bit a number) need no training, but all of them have to be scanned and thousands of candidates compared exactly for the
same recall, which takes longer. faiss is MIT-licensed, and one wheel serves every Python from 3.10.

Shapes: N vectors, Q queries, P numbers in each, all float32 of length 1, so that their product is the cosine.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

Vectors = NDArray[np.float32]
Nearest = tuple[NDArray[np.int64], NDArray[np.float64]]  # rows, and their cosines, the nearest first

EXACT_UP_TO = 100_000  # vectors: 200 MB at 512 numbers, which memory gives in less than 50 ms
BLOCK = 1 << 16  # vectors compared at a time
PROBES = 64
CANDIDATES = 100
ROUNDS = 10  # of k-means, by which the cells are found
SAMPLE = 50  # vectors a cell that it is found by


def exact(vectors: Vectors, queries: Vectors, top: int) -> list[Nearest]:
    """Return the `top` nearest of each query among `vectors` (N, P), which may be memory-mapped."""
    # Where float32 rounds, vectors of equal cosine may differ by this; who is nearer is decided below in float64.
    margin = vectors.shape[1] * float(np.finfo(np.float32).eps)
    rows: list[list[NDArray[np.int64]]] = [[] for _ in queries]
    for start in range(0, len(vectors), BLOCK):
        cosines = queries @ vectors[start : start + BLOCK].T  # (Q, block)
        bounds = np.partition(cosines, -min(top, cosines.shape[1]), axis=1)[:, -min(top, cosines.shape[1])]
        for found, of_query, bound in zip(rows, cosines, bounds, strict=True):
            found.append(start + np.flatnonzero(of_query >= bound - margin))
    return [ranked(vectors, query, np.concatenate(found), top) for query, found in zip(queries, rows, strict=True)]


def ranked(vectors: Vectors, query: Vectors, rows: NDArray[np.int64], top: int) -> Nearest:
    """Return the `top` nearest of these rows, compared in float64 one by one, so that equal vectors have equal cosines."""
    rows = np.sort(rows)
    cosines = (vectors[rows].astype(np.float64) * query).sum(axis=1)
    order = np.argsort(-cosines, kind="stable")[:top]
    return rows[order], cosines[order]


def build(vectors: Vectors, path: Path) -> None:
    """Write an index of these vectors."""
    import faiss

    count, width = vectors.shape
    cells = round(math.sqrt(count))
    index: Any = faiss.index_factory(width, f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid = ROUNDS, SAMPLE
    chosen = np.random.default_rng(0).choice(count, size=min(SAMPLE * cells, count), replace=False)
    index.train(np.ascontiguousarray(vectors[np.sort(chosen)]))
    for start in tqdm(range(0, count, BLOCK), desc="vector index", unit="block"):
        index.add(np.ascontiguousarray(vectors[start : start + BLOCK]))
    faiss.write_index(index, str(path))


def open_index(path: Path) -> Any:
    """Open an index that `build` wrote, memory-mapped."""
    import faiss

    index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    index.nprobe = PROBES
    return index


def by_index(index: Any, vectors: Vectors, queries: Vectors, top: int) -> list[Nearest]:
    """Return the nearest among the candidates of the index."""
    _, proposed = index.search(queries, max(CANDIDATES, 2 * top))
    return [ranked(vectors, query, rows[rows >= 0], top) for query, rows in zip(queries, proposed, strict=True)]

"""Measure search among very many embeddings: exactly, and by the vector index, with the index's recall.

    python -m benchmarks.search
    python -m benchmarks.search --others
    python -m benchmarks.search --count 200000 --spread 0.6

The embeddings are drawn, not those of a model: 2000 clusters of very different sizes, their centres and what varies within them of decaying
spectrum, all turned towards a common side as embeddings of one kind are. `--spread` is how far a cluster reaches, relative to its centres'; the
similarity of the nearest, tenth nearest and any other embedding is printed, to compare with a model's. Two kinds of queries: one more of
the same kind (a scan), and one moved by a gap that all share, with noise of its own (a text). Recall is the share of the exact ten nearest that
are among the ten found. Each query is one call, and the median counts; the files are in the page cache. --others builds two more indexes of
faiss, which are rescored exactly as ours is: signs (1 bit a number, all scanned) and a graph (HNSW, which takes an hour or so).
Writes <output>/search.json and .md.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from med3dvlm.files import write_json, write_text
from med3dvlm.programs import Parser, positive, run
from med3dvlm.search import vectors
from med3dvlm.search.vectors import Nearest, Vectors
from med3dvlm.tables import markdown_table

CLUSTERS = 2000
TOP = 10
PROBES = (16, 32, 64, 128)
Search = Callable[[Vectors], Nearest]


class Space:
    """The distribution that embeddings are drawn from."""

    def __init__(self, width: int, spread: float) -> None:
        self.width, self.spread, self.random = width, spread, np.random.default_rng(0)
        self.spectrum = (np.arange(1, width + 1) ** -0.5).astype(np.float32)
        self.within = self.random.permutation(self.spectrum)
        self.length = float(np.linalg.norm(self.spectrum))
        self.centres = self._noise(CLUSTERS) * self.spectrum
        sizes = np.arange(1, CLUSTERS + 1) ** -0.7
        self.shares = sizes / sizes.sum()
        self.side, self.gap = (0.8 * self.length * direction for direction in unit(self._noise(2)))

    def _noise(self, count: int) -> Vectors:
        return self.random.standard_normal((count, self.width), np.float32)

    def draw(self, count: int, text: bool = False) -> Vectors:
        """(count, width) of length 1."""
        centres = self.centres[self.random.choice(CLUSTERS, count, p=self.shares)]
        points = centres + self.spread * self.within * self._noise(count) + self.side
        if text:
            points += self.gap + 0.5 * self.length / self.width**0.5 * self._noise(count)
        return unit(points)

    def fill(self, path: Path, count: int) -> Vectors:
        """(count, width) in a file, mapped."""
        drawn: Vectors = np.lib.format.open_memmap(path, "w+", np.float32, (count, self.width))
        for start in range(0, count, vectors.BLOCK):
            drawn[start : start + vectors.BLOCK] = self.draw(min(vectors.BLOCK, count - start))
        return drawn


def unit(points: Vectors) -> Vectors:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def ours(stored: Vectors, folder: Path) -> Iterator[tuple[str, Search]]:
    path = folder / "nearest.faiss"
    vectors.build(stored, path)
    index = vectors.open_index(path)
    for probes in PROBES:

        def search(query: Vectors, probes: int = probes) -> Nearest:
            index.nprobe = probes
            return vectors.by_index(index, stored, query, TOP)[0]

        yield f"index, {probes} cells looked at" + (" (used)" if probes == vectors.PROBES else ""), search


def signs(stored: Vectors, folder: Path) -> Iterator[tuple[str, Search]]:
    """Return for each number whether it is above its mean."""
    index, mean = faiss.IndexBinaryFlat(stored.shape[1]), stored[:: len(stored) // 10_000 + 1].mean(axis=0)

    def code(points: Vectors) -> np.ndarray:
        return np.packbits(points > mean, axis=1)

    for start in range(0, len(stored), vectors.BLOCK):
        index.add(code(stored[start : start + vectors.BLOCK]))
    faiss.write_index_binary(index, str(folder / "nearest.faiss"))
    for candidates in (200, 1000, 5000):

        def search(query: Vectors, candidates: int = candidates) -> Nearest:
            return vectors.ranked(stored, query[0], index.search(code(query), candidates)[1][0], TOP)

        yield f"signs, {candidates} candidates", search


def graph(stored: Vectors, folder: Path) -> Iterator[tuple[str, Search]]:
    index: Any = faiss.index_factory(stored.shape[1], "HNSW16,SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(stored[:: len(stored) // 50_000 + 1]))
    for start in range(0, len(stored), vectors.BLOCK):
        index.add(np.ascontiguousarray(stored[start : start + vectors.BLOCK]))
    faiss.write_index(index, str(folder / "nearest.faiss"))
    for breadth in (64, 256):

        def search(query: Vectors, breadth: int = breadth) -> Nearest:
            index.hnsw.efSearch = breadth
            return vectors.ranked(stored, query[0], index.search(query, 50)[1][0], TOP)

        yield f"graph, breadth {breadth}", search


def measure(search: Search, queries: dict[str, Vectors], truth: dict[str, list[Nearest]]) -> dict[str, float]:
    """Median milliseconds of a query, and recall by the kind of query."""
    search(next(iter(queries.values()))[:1])  # warm-up
    row, seconds = {}, []
    for kind, asked in queries.items():
        found = []
        for query in asked:
            started = time.perf_counter()
            found.append(search(query[None])[0])
            seconds.append(time.perf_counter() - started)
        shared = [len(set(rows) & set(true_rows)) / TOP for rows, (true_rows, _) in zip(found, truth[kind], strict=True)]
        row[f"recall_{kind}"] = statistics.mean(shared)
    return {"milliseconds": 1000 * statistics.median(seconds)} | row


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=positive, default=1_000_000, help="embeddings (default: %(default)s)")
    parser.add_argument("--width", type=positive, default=512, help="numbers in each (default: %(default)s)")
    parser.add_argument("--spread", type=float, default=1.2, help="of a cluster (default: %(default)s)")
    parser.add_argument("--queries", type=positive, default=50, help="of each kind (default: %(default)s)")
    parser.add_argument("--others", action="store_true", help="measure other indexes beside ours")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"))
    arguments = parser.parse_args(argv)
    count = arguments.count
    space = Space(arguments.width, arguments.spread)
    results: dict[str, Any] = {"count": count, "width": arguments.width, "spread": arguments.spread, "queries": arguments.queries}
    results |= {"threads": faiss.omp_get_max_threads(), "faiss": faiss.__version__, "numpy": np.__version__}
    results["processor"] = platform.processor() or platform.machine()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output) as name:
        folder = Path(name)
        stored = space.fill(folder / "embeddings.npy", count)
        queries = {kind: space.draw(arguments.queries, kind == "text") for kind in ("scan", "text")}
        truth = {kind: vectors.exact(stored, asked, TOP) for kind, asked in queries.items()}
        results["similarity"] = {
            kind: {
                "nearest": statistics.mean(cosines[0] for _, cosines in truth[kind]),
                "tenth": statistics.mean(cosines[-1] for _, cosines in truth[kind]),
                "any": float((queries[kind] @ stored[:1000].T).mean()),
            }
            for kind in queries
        }

        def exactly(query: Vectors) -> Nearest:
            return vectors.exact(stored, query, TOP)[0]

        few = {kind: asked[:5] for kind, asked in queries.items()}
        rows = {"exact": measure(exactly, few, {kind: truth[kind][:5] for kind in few}) | {"gb": stored.nbytes / 1e9}}
        for make in (ours, *((signs, graph) if arguments.others else ())):
            started = time.perf_counter()
            for place, (label, search) in enumerate(make(stored, folder)):
                if not place:
                    build = {"build_seconds": time.perf_counter() - started, "gb": (folder / "nearest.faiss").stat().st_size / 1e9}
                rows[label] = measure(search, queries, truth) | build
        results["ways"] = rows
    write_json(arguments.output / "search.json", results)
    write_text(arguments.output / "search.md", table(results))
    print(table(results))


def table(results: dict[str, Any]) -> str:
    header = ("way", "ms a query", "recall@10, scans", "recall@10, texts", "build, s", "GB")
    rows = [
        [label, f"{row['milliseconds']:.1f}", row["recall_scan"], row["recall_text"], seconds(row), f"{row['gb']:.2f}"]
        for label, row in results["ways"].items()
    ]
    alike = "; ".join(
        f"{kind}s' nearest {values['nearest']:.2f}, tenth {values['tenth']:.2f}, any {values['any']:.2f}"
        for kind, values in results["similarity"].items()
    )
    about = (
        f"{results['count']} x {results['width']} float32, {results['threads']} threads, faiss {results['faiss']}. Similarities: {alike}."
    )
    return f"{about}\n\n{markdown_table(header, rows)}\n"


def seconds(row: dict[str, float]) -> str | None:
    return f"{row['build_seconds']:.0f}" if "build_seconds" in row else None


if __name__ == "__main__":
    sys.exit(run(main))

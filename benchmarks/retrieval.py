"""Seconds and memory of ranking a large pool, both ways, by the function that eval/retrieval.py ranks with.

    python -m benchmarks.retrieval
    python -m benchmarks.retrieval --pairs 2000 --width 768

The embeddings are random, a text near its image. Ranks of some queries are compared with those of one query at a time, or the program fails.
The memory is the most that the process held, embeddings and libraries included. Writes <output>/retrieval.json.
"""

import argparse
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.files import write_json
from med3dvlm.metrics.retrieval import retrieval_ranks
from med3dvlm.programs import Parser, positive, run

CHECKED = 20  # queries each way that are ranked one at a time, too


def pairs(count: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Images and texts, (N, d) each: noise enough that a partner comes first in some and not in others."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((count, width), dtype=np.float32)
    return images, images + 5 * generator.standard_normal((count, width), dtype=np.float32)


def plain_rank(query: int, queries: NDArray[np.float32], candidates: NDArray[np.float32]) -> int:
    """Return the rank of its partner, by the cosine to one candidate after the other."""
    one = queries[query].astype(np.float64)
    cosines = np.array([float(one @ other) / float(np.linalg.norm(other)) for other in map(np.float64, candidates)])
    return int((cosines >= cosines[query]).sum())


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=positive, default=50_000, help="studies in the pool (default: %(default)s)")
    parser.add_argument("--width", type=positive, default=768, help="of the embeddings (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"))
    arguments = parser.parse_args(argv)
    images, texts = pairs(arguments.pairs, arguments.width)
    started = time.perf_counter()
    ranks = retrieval_ranks(images, texts)
    results: dict[str, Any] = {"pairs": arguments.pairs, "width": arguments.width, "seconds": time.perf_counter() - started}
    results["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    results |= {"threads": os.environ.get("OMP_NUM_THREADS", "all"), "processor": platform.processor() or platform.machine()}
    for way, first, second in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        results[f"{way}_r1"] = float((ranks[way] == 1).mean())
        for query in np.linspace(0, arguments.pairs - 1, min(CHECKED, arguments.pairs)).astype(int).tolist():
            if (expected := plain_rank(query, first, second)) != ranks[way][query]:
                raise ValueError(f"{way}: the partner of {query} has rank {ranks[way][query]}, but {expected} one at a time")
    write_json(arguments.output / "retrieval.json", results)
    print(
        f"{arguments.pairs} images and texts, {arguments.width} wide: both ways in {results['seconds']:.0f} s, "
        f"{results['peak_gb']:.2f} GB at most."
    )


if __name__ == "__main__":
    sys.exit(run(main))

"""How fast volumes are loaded from an address, beside the same store on the disk: what the work costs, and what fetching ahead gains.

    python -m benchmarks.bucket
    python -m benchmarks.bucket --latency 0.05 --recipe ct_rate --volumes 32

The server is a process of this machine; `--latency` is how long it waits before each answer, as a bucket of the same region does for some 20
to 100 ms. An epoch goes through a DataLoader with workers, in whose turn `--step` seconds pass for each batch, as a training takes. A cold
cache is a new one for each epoch. The ways take turns after one warm-up each, and the median epoch counts; the page cache is warm. Writes
<output>/bucket.json and .md.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.loading import MEGABYTE, Stored, clones, sources
from med3dvlm import VolumeProcessor
from med3dvlm.allocator import keep_freed_memory
from med3dvlm.datasets.ahead import AHEAD, AheadSampler, OwnRows
from med3dvlm.datasets.store import PreparedData
from med3dvlm.files import write_json
from med3dvlm.programs import Parser, positive, run
from med3dvlm.records import Study
from med3dvlm.remote.cache import Cache
from med3dvlm.training.trainer import WholeBatches

DISK, COLD, AHEAD_OF, WARM = "the disk", "an address, cold cache", "an address, cold cache, fetched ahead", "an address, warm cache"


class Rows(Stored):
    """The volumes of a store, as the data sets of the stages fetch them."""

    def needed(self, indices: Sequence[int]) -> list[Study]:
        return [self.studies[index] for index in indices]

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        self.data.fetch(self.needed(indices))
        return [self[index] for index in indices]


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    latency = 0.0

    def do_GET(self) -> None:
        time.sleep(self.latency)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def serve(folder: str, latency: str) -> None:
    """Serve a folder until standard input ends; prints the port."""
    Handler.latency = float(latency)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


def epoch(open_data: Callable[[], PreparedData], arguments: argparse.Namespace, ahead: bool) -> float:
    """Seconds of an epoch, from the first batch that is asked for to the last."""
    rows = Rows(open_data())
    sampler: Any = WholeBatches(len(rows), arguments.batch, seed=0)
    sampler = AheadSampler(sampler, rows, OwnRows(arguments.batch, 1, 0), AHEAD) if ahead else sampler
    started = time.perf_counter()
    for _ in DataLoader(rows, arguments.batch, sampler=sampler, num_workers=arguments.workers):
        time.sleep(arguments.step)
    seconds = time.perf_counter() - started
    if ahead:
        sampler.fetching.close()
    return seconds


def measure(root: Path, store: Path, address: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the epochs of each way."""
    seconds: dict[str, list[float]] = {DISK: [], COLD: [], AHEAD_OF: [], WARM: []}
    for turn in range(arguments.runs + 1):
        for way in seconds:
            if way in (COLD, AHEAD_OF):
                shutil.rmtree(root / "cache", ignore_errors=True)
            remote = partial(PreparedData, address, cache=Cache(root / "cache"))
            taken = epoch(partial(PreparedData, store) if way == DISK else remote, arguments, way == AHEAD_OF)
            if turn:
                seconds[way].append(taken)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="m3d", help="(default: %(default)s)")
    parser.add_argument("--volumes", type=positive, default=64, help="in an epoch (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=4, help="(default: %(default)s)")
    parser.add_argument("--workers", type=positive, default=2, help="of the loader (default: %(default)s)")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before an answer (default: %(default)s)")
    parser.add_argument("--step", type=float, default=0.0, help="seconds that a batch is worked on (default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=3, help="epochs of each way (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"))
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output) as folder:
        root = Path(folder)
        data = clones(root, sources(root / "scans", None, 4), VolumeProcessor(arguments.recipe), arguments.volumes)
        size = data.volume_size
        command = [
            sys.executable,
            "-c",
            "import sys; from benchmarks.bucket import serve; serve(*sys.argv[1:])",
            data.folder,
            arguments.latency,
        ]
        with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                seconds = measure(root, data.folder, f"http://127.0.0.1:{server.stdout.readline().strip()}", arguments)
            finally:
                server.terminate()
    rates = {way: arguments.volumes / statistics.median(taken) for way, taken in seconds.items()}
    settings = {name: getattr(arguments, name) for name in ("recipe", "volumes", "batch", "workers", "latency", "step", "runs")}
    write_json(arguments.output / "bucket.json", settings | {"volume_bytes": size, "volumes_per_second": rates, "seconds": seconds})
    lines = [f"{settings}, {size / MEGABYTE:.1f} MB a volume", "", "| volumes from | volumes/s | MB/s |", "|---|---|---|"]
    lines += [f"| {way} | {rate:.1f} | {rate * size / MEGABYTE:.0f} |" for way, rate in rates.items()]
    (arguments.output / "bucket.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(run(main))

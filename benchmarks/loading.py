"""Measure how fast volumes are loaded from a store and prepared for it, compared with reading .nii.gz files as M3D's release has them.

    python -m benchmarks.loading
    python -m benchmarks.loading --scan head.nii.gz --volumes 16 --runs 7
    python -m benchmarks.loading --memory 5000

Without --scan the volumes are phantoms. Loading: an epoch through a DataLoader, ready as a float32 batch on the CPU, and for a
device that normalises, as the store has it; by the program itself, which is the work alone, and by one worker process, which has to send
the batches. The ways take turns after one warm-up each, and the median epoch counts. Everything is read from the page cache: what
is compared is the work, not the disk. --memory reads that many volumes with four workers
and draws the memory of all processes. Writes <output>/data.json and .md, and data_memory.png.
"""

import argparse
import gzip
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from med3dvlm import VolumeProcessor, read_volume
from med3dvlm.allocator import keep_freed_memory
from med3dvlm.datasets.outputs import LocalVolumes
from med3dvlm.datasets.phantom import write_phantoms
from med3dvlm.datasets.preparation import finish, prepare
from med3dvlm.datasets.store import PreparedData, volume_path
from med3dvlm.datasets.study_volume import prepare_one
from med3dvlm.files import read_lines, write_json
from med3dvlm.plots.canvas import new_page, plain, save
from med3dvlm.plots.preparation import COLOURS
from med3dvlm.programs import Parser, positive, run
from med3dvlm.recipes import RECIPES
from med3dvlm.records import Records, Study

BASELINE = "prepared .nii.gz float32, SimpleITK"
FLOAT, BYTES = "store, float32 on the CPU", "store, bytes only"
WORKERS = {"by the program itself": 0, "by a worker process, sent to the program": 1}
SETTLED = 500  # volumes after which memory should stay as it is
MEGABYTE = 1e6


class Stored(Dataset[Tensor]):
    """The volumes of a store (1, D, H, W)."""

    def __init__(self, data: PreparedData) -> None:
        self.data, self.studies = data, data.studies("train")

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> Tensor:
        return self.data.volume(self.studies[index])


class Files(Dataset[Tensor]):
    """The same volumes from .nii.gz files (1, D, H, W) float32."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        import SimpleITK as sitk

        return torch.from_numpy(sitk.GetArrayFromImage(sitk.ReadImage(str(self.paths[index]))))[None]


def memory_curve(samples: Sequence[tuple[int, Mapping[str, float]]], path: str | Path) -> Path:
    """Memory in MB against the volumes read so far, [(volumes, {"all processes": MB, ...}), ...]."""
    page = new_page(6.4, 3.6)
    axes = page.add_subplot()
    for name, colour in zip(samples[0][1], COLOURS, strict=False):
        axes.plot([volumes for volumes, _ in samples], [memory[name] for _, memory in samples], color=colour, linewidth=1.6, label=name)
    axes.set(xlabel="volumes read", ylabel="MB", title="Memory over an epoch")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    plain(axes)
    return save(page, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, help="a scan to measure with (default: phantoms)")
    parser.add_argument("--recipe", default="m3d", help="(default: %(default)s)")
    parser.add_argument("--size", help="D,H,W of the prepared volumes (default: the recipe's)")
    parser.add_argument("--volumes", type=positive, default=16, help="in an epoch (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=2, help="(default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=5, help="epochs of each way (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=0, metavar="VOLUMES", help="read so many with four workers, instead of the rest")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"))
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(1)  # per core
    size = None if arguments.size is None else tuple(int(number) for number in arguments.size.split(","))
    processor = VolumeProcessor(arguments.recipe, size=size)
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "data_memory" if arguments.memory else "data"
    with tempfile.TemporaryDirectory(dir=arguments.output) as folder:
        root = Path(folder)
        scans = sources(root / "scans", arguments.scan, 4)
        results: dict[str, Any] = {"recipe": processor.recipe, "size": processor.size, "torch": torch.__version__}
        if arguments.memory:
            samples = memory(clones(root, scans, processor, arguments.memory), arguments.batch)
            memory_curve(samples, arguments.output / f"{name}.png")
            results |= {"volumes": arguments.memory, "megabytes": samples, "growth_mb": growth(samples)}
        else:
            results["preparation"] = preparation(root, scans, processor, arguments.runs)
            results["loading"] = loading(root, scans, processor, arguments)
    write_json(arguments.output / f"{name}.json", results)
    text = f"After {SETTLED} volumes: {results['growth_mb']}\n" if arguments.memory else table(results)
    (arguments.output / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def sources(folder: Path, scan: Path | None, count: int) -> list[Path]:
    """NIfTI files to prepare, compressed."""
    if scan is not None:
        return [scan.resolve()]
    write_phantoms(folder, studies=max(10, count), seed=0, workers=1)
    return sorted(folder.rglob("*.nii.gz"))[:count]


def studies_of(count: int) -> list[Study]:
    return [Study(f"case/{number}", str(number), f"case/{number}", "A report.", {}, "train", "speed") for number in range(count)]


def store(root: Path, scans: list[Path], processor: VolumeProcessor) -> list[Study]:
    """A store of the scans, by the true preparation."""
    studies = [replace(study, image=scan.name) for study, scan in zip(studies_of(len(scans)), scans, strict=True)]
    for study, scan in zip(studies, scans, strict=True):
        (root / study.image).symlink_to(scan)
    prepare(root, Records(studies), processor, root / "store", workers=1)
    return studies


def clones(root: Path, scans: list[Path], processor: VolumeProcessor, count: int) -> PreparedData:
    """A store of `count` volumes, hard links to those of the scans."""
    made = store(root, scans, processor)
    found = {line["study"]: line for line in read_lines(root / "store" / "index.jsonl")}
    many, lines = studies_of(count), {}
    for number, study in enumerate(many):
        one = made[number % len(made)]
        path = volume_path(root / "many", study)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(volume_path(root / "store", one))
        lines[study.id] = found[one.id] | {"study": study.id}
    processor.save_pretrained(root / "many")
    finish(LocalVolumes(root / "many"), processor, Records(many), lines, [])
    return PreparedData(root / "many")


def loading(root: Path, scans: list[Path], processor: VolumeProcessor, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds a volume of an epoch, the median epoch, and how often it fits into the baseline's."""
    import SimpleITK as sitk

    data = clones(root, scans, processor, arguments.volumes)
    files = []
    for number in range(arguments.volumes):
        path = root / f"{number}.nii.gz"
        if number < len(scans):
            sitk.WriteImage(sitk.GetImageFromArray(unrounded(scans[number], processor)), str(path), useCompression=True)
        else:
            path.hardlink_to(files[number % len(scans)])
        files.append(path)
    results = {}
    for where, workers in WORKERS.items():
        stored, read = (epochs(dataset, arguments.batch, workers) for dataset in (Stored(data), Files(files)))
        ways: dict[str, Callable[[], list[Any]]] = {
            BASELINE: lambda read=read: [batch.shape for batch in read()],
            FLOAT: lambda stored=stored: [processor.dequantize(batch).shape for batch in stored()],
            BYTES: lambda stored=stored: [batch.shape for batch in stored()],
        }
        seconds = {name: value / arguments.volumes for name, value in medians(ways, arguments.runs).items()}
        results[where] = {name: {"seconds": value, "times": seconds[BASELINE] / value} for name, value in seconds.items()}
    return results


def unrounded(scan: Path, processor: VolumeProcessor) -> Any:
    """(D, H, W) float32 as the recipe's steps leave it, before it is brought to whole numbers: so it is in M3D's release."""
    data: Any = read_volume(scan)
    for step in RECIPES[processor.recipe].steps(processor):
        data = step(data)
    return np.asarray(data, np.float32)[0]


def epochs(dataset: Dataset[Tensor], batch: int, workers: int) -> Callable[[], Iterator[Tensor]]:
    loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda: iter(loader)


def preparation(root: Path, scans: list[Path], processor: VolumeProcessor, runs: int) -> dict[str, dict[str, float]]:
    """Volumes a second on one core, from NIfTI and from folders of PNG slices, and the share of that time spent decompressing."""
    volume = read_volume(scans[0])
    low, high = np.percentile(volume.array, (0.5, 99.5))
    grey = (np.clip((volume.array - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    (root / "slices").mkdir()
    for number, plane in enumerate(grey, start=1):
        Image.fromarray(plane).save(root / "slices" / f"{number}.png")
    (root / "scan.nii.gz").symlink_to(scans[0])
    packed = (root / "scan.nii.gz").read_bytes()
    slices = [path.read_bytes() for path in sorted((root / "slices").iterdir())]
    unpack: dict[str, Callable[[], Any]] = {
        "scan.nii.gz": lambda: gzip.decompress(packed),
        "slices": lambda: [np.asarray(Image.open(io.BytesIO(content))) for content in slices],
    }
    rows = {}
    for image, decompress in unpack.items():
        if image == "slices" and processor.grid.dtype != torch.uint8:
            continue  # pictures have no HU
        study = replace(studies_of(1)[0], image=image)

        def make(study: Study = study) -> None:
            _, reason = prepare_one(root, LocalVolumes(root / "made"), processor, "", study)
            if reason:
                raise ValueError(reason)

        seconds = medians({"all": make, "unpacking": decompress}, runs)
        rows[image] = {"volumes_per_second": 1 / seconds["all"], "share_decompressing": seconds["unpacking"] / seconds["all"]}
    return rows


def medians(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """The median seconds of each call after a warm-up; they take turns, so that a slow moment of the machine does not meet one alone."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def memory(data: PreparedData, batch: int) -> list[tuple[int, dict[str, float]]]:
    """An epoch with four workers: [(volumes read, MB)]; of pages that several processes share, each has its part (PSS)."""
    samples, process = [], psutil.Process()
    loader = DataLoader(Stored(data), batch_size=batch, shuffle=True, num_workers=4)
    step = max(1, len(loader) // 100)
    for number, volumes in enumerate(loader, start=1):
        data.processor.dequantize(volumes)
        if number % step == 0:
            children = process.children()
            own, others = process.memory_full_info(), [child.memory_full_info() for child in children]
            total = {"all processes, shared pages once": (own.pss + sum(other.pss for other in others)) / MEGABYTE}
            rest = {"main process, resident": own.rss / MEGABYTE, "a worker, resident": max(other.rss for other in others) / MEGABYTE}
            samples.append((number * batch, total | rest))
    return samples


def growth(samples: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return by how many MB the median of the last fifth exceeds that of the fifth that follows the first SETTLED volumes, by curve."""
    later = [values for volumes, values in samples if volumes > SETTLED] or [values for _, values in samples]
    fifth = max(1, len(later) // 5)
    first, last = later[:fifth], later[-fifth:]
    return {name: round(statistics.median(s[name] for s in last) - statistics.median(s[name] for s in first), 1) for name in later[0]}


def table(results: dict[str, Any]) -> str:
    """Markdown: loading, then preparation."""
    lines = [f"{results['recipe']}, {'x'.join(map(str, results['size']))}, page cache warm"]
    for where, rows in results["loading"].items():
        lines += ["", f"| an epoch's loading {where} | ms a volume | x faster |", "|---|---|---|"]
        lines += [f"| {name} | {row['seconds'] * 1e3:.1f} | {row['times']:.1f} |" for name, row in rows.items()]
    lines += ["", "| preparation from | volumes/s on a core | decompressing |", "|---|---|---|"]
    lines += [
        f"| {name} | {row['volumes_per_second']:.2f} | {row['share_decompressing']:.0%} |" for name, row in results["preparation"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run(main))

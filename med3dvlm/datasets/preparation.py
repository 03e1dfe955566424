"""`prepare`: a data set's volumes through the VolumeProcessor into a store (`med3dvlm.datasets.store` says what lies there).

Any number of processes, of several machines with one file system, may work on a store without a lock, because

- a volume's file carries what it was made from and how, is written aside, put on the disk and renamed; whoever comes later reads in its
  header that it need not be made. So a process killed at any time costs the volume that it was making, and nothing else;
- a shard (i of n: every n-th study) writes volumes only. Records, index and summary are written by `prepare`, once the shards
  have ended; it makes what they left out, so it also mends a shard that was killed, and takes seconds where there is nothing to mend;
- summary.json is written last and taken away before a volume that it counts is replaced, so that nobody reads what does not belong
  together. While it is there the index is true, and a run reads that instead of the headers.

A run makes those volumes anew whose scan, way of reading or settings changed, and tries again what failed. Where nothing changed it
writes nothing. Volumes of studies that the data set no longer lists stay, as a shorter table may be an experiment and a volume costs
seconds to make; the summary counts them, and nobody reads them.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from med3dvlm.datasets.engines import Engine, open_engine
from med3dvlm.datasets.masks import pack, read_masks
from med3dvlm.datasets.outputs import Line, Volumes, open_volumes
from med3dvlm.datasets.sources import FULL, Scans, open_scans, states
from med3dvlm.datasets.statistics import BINS, statistics
from med3dvlm.datasets.store import CHECKED, read_stored_masks, read_voxels
from med3dvlm.files import checksum, json_lines, json_text, read_lines
from med3dvlm.formats import VERSION
from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.recipes import RECIPES
from med3dvlm.records import Question, Study, check_ids, fields_of
from med3dvlm.remote.files import Listed
from med3dvlm.remote.store import volume_name
from med3dvlm.reports.findings import named_labels
from med3dvlm.volume import Volume, read_volume

logger = logging.getLogger(__name__)

Failure = dict[str, str]  # "study", "file", "reason"


def prepare(
    source: str | Path | Scans,
    studies: Sequence[Study],
    questions: Sequence[Question],
    processor: VolumeProcessor,
    destination: str | Path | Volumes,
    workers: int = 2,
    failures: Sequence[Failure] = (),
    verify: bool = False,
    engine: str = "local",
) -> dict[str, Any]:
    """Prepare the volumes of `studies`, whose image paths are relative to `source`; returns the summary that is also written.

    Args:
        source, destination: folders, or addresses (see `open_scans`).
        failures: {"study", "file", "reason"} of studies that could not be read, for failures.jsonl.
        verify: read every volume that is there, and make those anew that are damaged.
        engine: "local", `workers` processes of this machine, or "ray" (see `engines`); the result is the same.

    Raises:
        ValueError: two studies have one id, a volume would replace its own scan, or the folder was prepared with other settings.
        OSError: an address cannot be read or written.
    """
    volumes = open_volumes(destination)
    with open_scans(source, at_a_time=workers) as scans:
        check_studies(scans, volumes, studies)
        with open_engine(engine, workers) as run:
            lines, failed, _ = prepare_volumes(scans, studies, processor, volumes, run, verify)
    return finish(volumes, processor, studies, questions, lines, [*failures, *failed])


def prepare_shard(
    source: str | Path | Scans,
    studies: Sequence[Study],
    processor: VolumeProcessor,
    destination: str | Path | Volumes,
    shard: tuple[int, int],
    workers: int = 2,
    verify: bool = False,
) -> dict[str, Any]:
    """Prepare the volumes of the i-th of n parts of `studies`, and nothing else, where `shard` is (i, n), counted from 1.

    Returns {"shard", "studies", "made", "failures"}, the last a list. Arguments and errors are those of `prepare`; also a ValueError where
    there is no such shard.
    """
    volumes = open_volumes(destination)
    part, count = shard
    if not 1 <= part <= count:
        raise ValueError(f"there is no shard {part}/{count}; they count from 1/{count} to {count}/{count}")
    mine = studies[part - 1 :: count]
    with open_scans(source, at_a_time=workers) as scans:
        check_studies(scans, volumes, studies)
        with open_engine("local", workers) as run:
            _, failed, made = prepare_volumes(scans, mine, processor, volumes, run, verify)
    return {"shard": f"{part}/{count}", "studies": len(mine) - len(failed), "made": made, "failures": failed}


def prepare_volumes(
    scans: Scans, studies: Sequence[Study], processor: VolumeProcessor, volumes: Volumes, run: Engine, verify: bool
) -> tuple[dict[str, Line | None], list[Failure], int]:
    """Return the studies' lines of the index, the failures, and how many volumes were made."""
    settings = settle(processor, volumes)
    indexed = _index(volumes)
    lines = _lines(volumes, studies, indexed)
    stale = [study for study in studies if not _is_current(scans, settings, study, lines[study.id])]
    failed: list[Failure] = []
    if stale:
        RECIPES[processor.recipe].steps(processor)  # imports what it needs, once for all forked processes
    if verify:
        outdated = {study.id for study in stale}
        there = [study for study in studies if study.id not in outdated]
        found = [line for study in there if (line := lines[study.id])]
        jobs = run(partial(_is_whole, volumes, processor.size), there, found, lost=lambda reason: False)
        whole = tqdm(jobs, total=len(there), unit="volume", desc="verifying")
        stale += [study for study, good in zip(there, whole, strict=True) if not good]
    if any(study.id in indexed for study in stale):
        volumes.remove("summary.json")
    work = partial(_prepare_on_any_machine, scans, volumes, processor, settings)
    wanted = (scans.files(_files(study)) for study in stale)
    jobs = run(work, stale, wanted, lost=lambda reason: (None, reason)) if stale else iter(())
    results = tqdm(jobs, total=len(studies), initial=len(studies) - len(stale), unit="volume", desc="preparing", smoothing=0.05)
    for study, (line, reason) in zip(stale, results, strict=True):
        lines[study.id] = line
        if reason is not None:
            failed.append({"study": study.id, "file": study.image, "reason": reason})
    place = {study.id: number for number, study in enumerate(studies)}
    return lines, sorted(failed, key=lambda failure: place[failure["study"]]), len(stale) - len(failed)


def check_studies(scans: Scans, volumes: Volumes, studies: Sequence[Study]) -> None:
    check_ids(studies)
    for study in studies:
        named_labels(study.labels)
    for study in studies:
        if scans.path(study.image) == volumes.path(volume_name(study.id)):
            raise ValueError(f"{scans.name}/{study.image} would be replaced by its own preparation; prepare into another folder")


def settle(processor: VolumeProcessor, volumes: Volumes) -> str:
    """Write the processor if there is none, refuse another one. 16 hexadecimal digits of its settings, which each volume keeps:
    two runs that start at the same time with different settings do not see each other here."""
    name = "preprocessor_config.json"
    if not volumes.there([name]):
        volumes.write(name, processor.to_json_string().encode())
    with volumes.here(name) as path:
        if VolumeProcessor.from_pretrained(path.parent).to_dict() != processor.to_dict():
            raise ValueError(f"{volumes.name} was prepared with other settings ({volumes.name}/{name}); choose another folder or delete it")
    return hashlib.sha256(json.dumps(processor.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _index(volumes: Volumes) -> dict[str, Line]:
    """Return the lines of index.jsonl by study, none while the index may be outdated."""
    if not volumes.there(["summary.json"]) or not volumes.there(["index.jsonl"]):
        return {}
    with volumes.here("index.jsonl") as path:
        return {line["study"]: line for line in read_lines(path)}


def _lines(volumes: Volumes, studies: Sequence[Study], indexed: Mapping[str, Line]) -> dict[str, Line | None]:
    """Return what is known of each study's volume, from the index or from the volume; None of one that is not there."""
    names = {study.id: volume_name(study.id) for study in studies}
    there = volumes.there([name for study, name in names.items() if study in indexed])
    kept = volumes.lines([name for study, name in names.items() if study not in indexed])
    return {study: indexed[study] if name in there else kept.get(name) for study, name in names.items()}


def _is_current(scans: Scans, settings: str, study: Study, line: Line | None) -> bool:
    """Return whether the prepared volume exists and was made from the scan as it is now, with these settings."""
    if line is None or not _stamp(settings, study).items() <= line.items():
        return False
    try:
        return scans.unchanged(_files(study), line)
    except OSError:  # which preparing it says better
        return False


def _files(study: Study) -> tuple[str, ...]:
    """Return the names of a scan and of its masks' files."""
    return (study.image, *sorted({mask.file for mask in study.masks.values()}))


def _stamp(settings: str, study: Study) -> Line:
    """Return a digest of how a volume is made: scan, what the data set says of it, settings, the readers' version."""
    reading = json.loads(json.dumps(study.reading))
    stamp = {"study": study.id, "image": study.image, "reading": reading, "settings": settings, "readers": VERSION}
    places = {name: [mask.file, mask.channel, mask.value] for name, mask in study.masks.items()}
    return stamp | {"drawn": places} if places else stamp


def _is_whole(volumes: Volumes, size: Sequence[int], study: Study, line: Line) -> bool:
    try:
        with volumes.here(volume_name(study.id)) as path:
            read_voxels(path, line["checksum"])
            for name in line.get("masks", {}):
                read_stored_masks(path, size, line["masks"], [name])
    except ValueError:
        return False
    return True


def _prepare_on_any_machine(
    scans: Scans, volumes: Volumes, processor: VolumeProcessor, settings: str, study: Study, files: Mapping[str, Listed]
) -> tuple[Line | None, str | None]:
    """As `prepare_one`, of a scan of these files; raises FileNotFoundError on a machine that does not see the folders."""
    scans.require()
    volumes.require()
    with ExitStack() as stack:
        try:
            root, state = stack.enter_context(scans.here(files))
        except OSError as error:
            if error.errno in FULL:
                raise
            return None, str(error)
        line, reason = prepare_one(root, volumes, processor, settings, study, state)
    return line, None if reason is None else reason.replace(str(root), scans.name)


def prepare_one(
    source: Path, volumes: Volumes, processor: VolumeProcessor, settings: str, study: Study, untouched: str | None = None
) -> tuple[Line | None, str | None]:
    """Prepare one volume. Returns its line of the index, or the failure.

    Args:
        untouched: the state of the scan's files at an address, where they come from one.
    """
    scan = source / study.image
    try:
        stamp = _stamp(settings, study)
        if all((source / file).exists() for file in _files(study)):  # before they are read
            stamp |= {"files": states(source, _files(study), contents=True), "untouched": untouched or states(source, _files(study))}
        volume = read_volume(scan, **study.reading)
        regular = volume.straighten() if processor.straighten else volume
        values, placement = processor.transform_and_placement(regular)
        voxels = processor.quantize(values)[0].contiguous()
        masks, packed, doubts = _masks(source, study, volume, processor, placement)
    except (OSError, ValueError) as error:  # VolumeError is a ValueError
        return None, str(error)
    except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError; anything else is a defect and stops the run
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        return None, f"{scan}: memory does not suffice for this scan; prepare with fewer workers or on a larger machine"
    line = stamp | {"checksum": checksum(voxels.numpy())} | _found(volume, voxels, processor) | masks
    if regular.spacing is not None:  # mm of the prepared voxels
        line["grid_spacing"] = [round(float(mm), 4) for mm in np.array(regular.spacing) @ np.abs(placement[:3, :3])]
    line["warnings"] += doubts
    volumes.write(volume_name(study.id), save({"voxels": voxels, **packed}, {"line": json.dumps(line)}))
    return line, None


def _masks(
    source: Path, study: Study, volume: Volume, processor: VolumeProcessor, placement: np.ndarray[Any, np.dtype[np.float64]]
) -> tuple[Line, dict[str, torch.Tensor], list[str]]:
    """Return the index's facts about the study's masks, their bits by their names in the file, and warnings."""
    stored: Line = {}
    contents: dict[str, torch.Tensor] = {}
    doubts: list[str] = []
    empty: list[str] = []
    lost: list[str] = []
    for name, drawn, assumed in read_masks(source, study.masks, volume):
        straight = volume.straightening().apply(drawn.astype(np.float32)) >= 0.5 if processor.straighten and not volume.regular else drawn
        made = pack(processor.transform_mask(straight, placement))
        stored[name] = {"voxels": made.voxels, "box": made.box, "place": len(contents), "checksum": checksum(made.content)}
        if made.voxels:
            contents[f"mask {len(contents)}"] = torch.frombuffer(bytearray(made.content), dtype=torch.uint8)
        else:
            (lost if drawn.any() else empty).append(name)
        doubts += assumed
    for names, what in ((empty, "some masks hold no voxel of the scan"), (lost, "some masks are lost by cropping and resizing")):
        if names:
            doubts.append(f"{what} ({len(names)}: {', '.join(names)}).")
    return {"masks": {name: stored[name] for name in study.masks}} if stored else {}, contents, list(dict.fromkeys(doubts))


def _found(volume: Volume, voxels: torch.Tensor, processor: VolumeProcessor) -> Line:
    """Return the facts that the summary counts. The histogram is of every second voxel along each axis, in parts per 10,000."""
    sample = voxels[::2, ::2, ::2].numpy()
    counts, _ = np.histogram(sample, BINS, (processor.grid.low, processor.grid.high))
    return {
        "shape": list(volume.shape),
        "spacing": None if volume.spacing is None else [round(mm, 4) for mm in volume.spacing],
        "orientation": volume.orientation,
        "unit": volume.unit,
        "warnings": list(volume.warnings),
        "histogram": np.rint(counts * 1e4 / sample.size).astype(int).tolist(),
    }


def finish(
    volumes: Volumes,
    processor: VolumeProcessor,
    studies: Sequence[Study],
    questions: Sequence[Question],
    lines: dict[str, Line | None],
    failed: Sequence[Failure],
) -> dict[str, Any]:
    """Write records, index, summary and picture, unless they are there as they should be."""
    from med3dvlm.plots import prepared_volumes

    without = {failure["study"] for failure in failed}
    kept = [study for study in studies if study.id not in without]
    index = [line for study in kept if (line := lines[study.id]) is not None]
    asked = [question for question in questions if question.study not in without]
    sizes = volumes.sizes()
    others = sizes.keys() - {volume_name(study.id) for study in kept}
    if others:
        logger.warning("%s: kept %d volumes of studies that are not, or no longer, among those prepared", volumes.name, len(others))
    doubts = [{"study": line["study"], "file": line["image"], "warnings": line["warnings"]} for line in index if line["warnings"]]
    records = (map(fields_of, kept), map(fields_of, asked), index, failed)
    texts = {name: json_lines(rows) for name, rows in zip(CHECKED, records, strict=True)}
    sums = {name: checksum(text.encode()) for name, text in texts.items()}
    texts["warnings.jsonl"] = json_lines(doubts)
    voxels = [line["checksum"] for line in index]
    voxels += [mask["checksum"] for line in index for mask in line.get("masks", {}).values()]
    parts = (json.dumps(processor.to_dict(), sort_keys=True), texts["studies.jsonl"], texts["questions.jsonl"], str(voxels))
    summary: dict[str, Any] = {
        "studies": len(kept),
        "questions": len(asked),
        "failures": len(failed),
        "splits": {split: sum(study.split == split for study in kept) for split in sorted({study.split for study in kept})},
        **statistics(index, processor),
        "disk_gb": round(sum(sizes.values()) / 1e9, 3),
        "volumes_of_no_study": len(others),
        "checksums": sums,
        "fingerprint": hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16],
    }
    contents = {name: text.encode() for name, text in texts.items()}
    before = volumes.read("summary.json") if volumes.there(["summary.png"]) else None
    if before is not None and json.loads(before) == summary and all(volumes.read(name) == content for name, content in contents.items()):
        return summary
    volumes.remove("summary.json")  # until the files below belong together
    for name, content in contents.items():
        volumes.write(name, content)
    if index:
        with TemporaryDirectory() as folder:
            picture = Path(folder) / "summary.png"
            prepared_volumes(index, {study.id: study.split for study in kept}, processor.grid.values, picture)
            volumes.write("summary.png", picture.read_bytes())
    volumes.sweep()
    volumes.write("summary.json", json_text(summary).encode())
    return summary

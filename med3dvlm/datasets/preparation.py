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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from med3dvlm.datasets.engines import Engine, open_engine
from med3dvlm.datasets.outputs import Line, Volumes, open_volumes
from med3dvlm.datasets.sources import Scans, open_scans
from med3dvlm.datasets.statistics import statistics
from med3dvlm.datasets.store import CHECKED, read_processor
from med3dvlm.datasets.study_volume import files_of, is_whole, prepare_on_any_machine, stamp_of
from med3dvlm.files import checksum, json_lines, json_text, read_lines
from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.recipes import RECIPES
from med3dvlm.records import Failure, Records, Study, check_ids, fields_of
from med3dvlm.remote.store import volume_name
from med3dvlm.reports.findings import named_labels

logger = logging.getLogger(__name__)


def prepare(
    source: str | Path | Scans,
    records: Records,
    processor: VolumeProcessor,
    destination: str | Path | Volumes,
    workers: int = 2,
    verify: bool = False,
    engine: str = "local",
) -> dict[str, Any]:
    """Prepare the volumes of a data set, whose image paths are relative to `source`; returns the summary that is also written.

    Args:
        source, destination: folders, or addresses (see `open_scans`).
        verify: read every volume that is there, and make those anew that are damaged.
        engine: "local", `workers` processes of this machine, or "ray" (see `engines`); the result is the same.

    Raises:
        ValueError: two studies have one id, a volume would replace its own scan, or the folder was prepared with other settings.
        OSError: an address cannot be read or written.
    """
    volumes = open_volumes(destination)
    with open_scans(source, at_a_time=workers) as scans:
        check_studies(scans, volumes, records.studies)
        with open_engine(engine, workers) as run:
            lines, failed, _ = prepare_volumes(scans, records.studies, processor, volumes, run, verify)
    return finish(volumes, processor, records, lines, [*records.failures, *failed])


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
        jobs = run(partial(is_whole, volumes, processor.size), there, found, lost=lambda reason: False)
        whole = tqdm(jobs, total=len(there), unit="volume", desc="verifying")
        stale += [study for study, good in zip(there, whole, strict=True) if not good]
    if any(study.id in indexed for study in stale):
        volumes.remove("summary.json")
    work = partial(prepare_on_any_machine, scans, volumes, processor, settings)
    wanted = (scans.files(files_of(study)) for study in stale)
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
            raise ValueError(f"{scans.name}/{study.image} would be overwritten by its prepared volume; prepare into another folder")


def settle(processor: VolumeProcessor, volumes: Volumes) -> str:
    """Write the processor if there is none, refuse another one. 16 hexadecimal digits of its settings, which each volume keeps:
    two runs that start at the same time with different settings do not see each other here."""
    name = "preprocessor_config.json"
    if not volumes.there([name]):
        volumes.write(name, processor.to_json_string().encode())
    with volumes.here(name) as path:
        if read_processor(path.parent, volumes.name).to_dict() != processor.to_dict():
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
    if line is None or not stamp_of(settings, study).items() <= line.items():
        return False
    try:
        return scans.unchanged(files_of(study), line)
    except OSError:  # which preparing it says better
        return False


def finish(
    volumes: Volumes, processor: VolumeProcessor, records: Records, lines: dict[str, Line | None], failed: Sequence[Failure]
) -> dict[str, Any]:
    """Write records, index, summary and picture, unless they are there as they should be."""
    from med3dvlm.plots import prepared_volumes

    without = {failure["study"] for failure in failed}
    kept = [study for study in records.studies if study.id not in without]
    index = [line for study in kept if (line := lines[study.id]) is not None]
    asked = [question for question in records.questions if question.study not in without]
    sizes = volumes.sizes()
    others = sizes.keys() - {volume_name(study.id) for study in kept}
    if others:
        logger.warning("%s: kept %d volumes of studies that are no longer in the data set; nothing uses them", volumes.name, len(others))
    doubts = [{"study": line["study"], "file": line["image"], "warnings": line["warnings"]} for line in index if line["warnings"]]
    tables = (map(fields_of, kept), map(fields_of, asked), index, failed)
    texts = {name: json_lines(rows) for name, rows in zip(CHECKED, tables, strict=True)}
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

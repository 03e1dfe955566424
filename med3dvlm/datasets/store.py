"""Prepared data: every volume once through the VolumeProcessor, kept as uint8, beside the records and the processor itself.

    <root>/preprocessor_config.json   how the volumes were made
    <root>/studies.jsonl  questions.jsonl
    <root>/volumes/<study id>.npy     (D, H, W) uint8
    <root>/sources.jsonl              from which scan, of which size and date, each volume was made
    <root>/failures.jsonl             studies that could not be prepared, with the reason
    <root>/summary.json               counts and a fingerprint of records, settings and volumes; written last

A file appears under its name when it is whole, so a killed preparation continues. Run again, it makes those volumes anew whose scan
changed, and nothing else; while it does there is no summary.json, so that nobody reads what does not belong together.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from med3dvlm.files import read_lines, write_json, write_lines
from med3dvlm.preprocessing import VolumeProcessor, quantize
from med3dvlm.records import Question, Study, check_ids, read_questions, read_studies, write_records


def prepare(
    source: str | Path,
    studies: Sequence[Study],
    questions: Sequence[Question],
    processor: VolumeProcessor,
    destination: str | Path,
    workers: int = 2,
    failures: Sequence[dict[str, str]] = (),
) -> dict[str, object]:
    """Prepare the volumes of `studies`, whose image paths are relative to `source`; returns the summary that is also written.

    Args:
        failures: {"study", "file", "reason"} of studies that could not be read, for failures.jsonl.

    Raises:
        ValueError: two studies have one id, a volume would replace its own scan, or the folder was prepared with other settings.
    """
    source, destination = Path(source), Path(destination)
    check_ids(studies)
    here, there = source.resolve(), destination.resolve()
    for study in studies:
        if here / study.image == volume_path(there, study):
            raise ValueError(f"{source / study.image} would be replaced by its own preparation; prepare into another folder")
    settings, summary_path = destination / "preprocessor_config.json", destination / "summary.json"
    if settings.is_file() and VolumeProcessor.from_pretrained(destination).to_dict() != processor.to_dict():
        raise ValueError(f"{destination} was prepared with other settings ({settings}); choose another folder or delete it")
    destination.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(destination)
    made = {line["study"]: line for line in read_lines(destination / "sources.jsonl", repair=True)}
    stale = [study for study in studies if not _is_current(source, destination, study, made.get(study.id))]
    reasons: dict[str, str] = {}
    if stale:
        summary_path.unlink(missing_ok=True)
        with (
            ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
            (destination / "sources.jsonl").open("a", encoding="utf-8") as listing,
        ):
            jobs = pool.map(partial(_prepare_one, source, destination, processor), stale, chunksize=4)
            results = tqdm(jobs, total=len(studies), initial=len(studies) - len(stale), unit="volume", desc="preparing")
            for study, (line, reason) in zip(stale, results, strict=True):
                if reason is not None:
                    reasons[study.id] = reason
                    continue
                made[study.id] = line
                listing.write(json.dumps(line) + "\n")
                listing.flush()
    summary_path.unlink(missing_ok=True)  # until the records below belong together
    failed = [*failures]
    failed += [{"study": study.id, "file": study.image, "reason": reasons[study.id]} for study in studies if study.id in reasons]
    without = {failure["study"] for failure in failed}
    kept = [study for study in studies if study.id not in without]
    asked = [question for question in questions if question.study not in without]
    write_records(destination / "studies.jsonl", kept)
    write_records(destination / "questions.jsonl", asked)
    write_lines(destination / "sources.jsonl", [made[study.id] for study in studies if study.id in made])
    write_lines(destination / "failures.jsonl", failed)
    digest = hashlib.sha256()
    for name in ("preprocessor_config.json", "studies.jsonl", "questions.jsonl"):
        digest.update((destination / name).read_bytes())
    digest.update(str([0 if study.id in reasons else made[study.id]["checksum"] for study in studies]).encode())
    summary: dict[str, object] = {
        "studies": len(kept),
        "questions": len(asked),
        "failures": len(failed),
        "splits": {split: sum(study.split == split for study in kept) for split in sorted({study.split for study in kept})},
        "fingerprint": digest.hexdigest()[:16],
    }
    write_json(summary_path, summary)
    return summary


def _is_current(source: Path, destination: Path, study: Study, line: dict[str, Any] | None) -> bool:
    """Whether the prepared volume is there and was made, as its line in sources.jsonl says, from the scan as it is now."""
    if line is None or not volume_path(destination, study).is_file():
        return False
    try:
        return line == _line(source, study, line["checksum"])
    except OSError:  # the scan is gone, which preparing it says better
        return False


def _line(source: Path, study: Study, checksum: int) -> dict[str, Any]:
    """What sources.jsonl says of a study: the scan, its size in bytes and when it was changed (ns), and the prepared file's CRC-32."""
    path = source / study.image
    states = [place.stat() for place in ([path, *path.iterdir()] if path.is_dir() else [path])]
    size, changed = sum(state.st_size for state in states), max(state.st_mtime_ns for state in states)
    return {"study": study.id, "image": study.image, "size": size, "changed": changed, "checksum": checksum}


def _prepare_one(source: Path, destination: Path, processor: VolumeProcessor, study: Study) -> tuple[dict[str, Any], str | None]:
    """The study's line in sources.jsonl, or {} and the reason why there is none."""
    path = volume_path(destination, study)
    try:
        line = _line(source, study, 0) if (source / study.image).exists() else {}  # before it is read
        tensor = quantize(processor(source / study.image)["pixel_values"][0, 0])
    except (OSError, ValueError) as error:  # VolumeError is a ValueError; anything else is a defect and stops the run
        return {}, str(error)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    with aside.open("wb") as file:
        np.save(file, tensor.numpy())
    checksum = zlib.crc32(aside.read_bytes())
    aside.replace(path)
    return line | {"checksum": checksum}, None


def volume_path(root: Path, study: Study) -> Path:
    return root / "volumes" / f"{study.id}.npy"


class PreparedData:
    """A prepared folder, opened.

    Args:
        exclude_failures: go on without the studies listed in failures.jsonl; by default they are an error.

    Raises:
        FileNotFoundError: the folder is not prepared, or not to the end.
        ValueError: some studies failed, or some records are lost.
    """

    def __init__(self, root: str | Path, exclude_failures: bool = False) -> None:
        self.root = Path(root)
        if not (self.root / "summary.json").is_file():
            raise FileNotFoundError(f"{self.root} holds no finished preparation (no summary.json); run: med3dvlm prepare")
        failures = read_lines(self.root / "failures.jsonl")
        if failures and not exclude_failures:
            first = failures[0]
            raise ValueError(
                f"{len(failures)} studies of {self.root} could not be prepared, the first is {first['study']}: {first['reason']} "
                "Mend the files and prepare again, or pass --exclude_failures true."
            )
        self.summary = json.loads((self.root / "summary.json").read_text(encoding="utf-8"))
        self.processor = VolumeProcessor.from_pretrained(self.root)
        self._studies = read_studies(self.root / "studies.jsonl")
        self._questions = read_questions(self.root / "questions.jsonl")
        found = {"studies": len(self._studies), "questions": len(self._questions)}
        if different := [name for name, count in found.items() if count != self.summary[name]]:
            raise ValueError(f"{self.root / 'summary.json'} counts other {different[0]} than there are ({found}); run: med3dvlm prepare")

    def studies(self, split: str) -> list[Study]:
        found = [study for study in self._studies if study.split == split]
        if not found:
            raise ValueError(f"{self.root} has no studies of split {split!r}; it has {self.summary['splits']}")
        return found

    def questions(self, split: str) -> list[Question]:
        known = {study.id for study in self._studies if study.split == split}
        return [question for question in self._questions if question.study in known]

    def volume(self, study: Study) -> Tensor:
        """(1, D, H, W) uint8, `preprocessing.dequantize` makes it the tensor that the processor gives for the scan file."""
        path = volume_path(self.root, study)
        if not path.is_file():
            raise FileNotFoundError(f"{path}, the prepared volume of {study.id}, is missing; run: med3dvlm prepare")
        return torch.from_numpy(np.load(path)).unsqueeze(0)


def same_preprocessing(model: VolumeProcessor, data: PreparedData) -> None:
    """Raises ValueError unless the data was prepared the way that the model takes it."""
    for name in ("recipe", "size", "hu_range", "resize"):
        wanted, found = getattr(model, name), getattr(data.processor, name)
        if wanted != found:
            raise ValueError(f"the model takes volumes of {name} {wanted}, but {data.root} was prepared with {found}; prepare it anew")

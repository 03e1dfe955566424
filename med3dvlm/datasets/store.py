"""Prepared data: every volume once through the VolumeProcessor, kept as uint8, beside the records and the processor itself.

    <root>/preprocessor_config.json   how the volumes were made
    <root>/studies.jsonl  questions.jsonl
    <root>/volumes/<study id>.npy     (D, H, W) uint8, memory-mapped when read
    <root>/failures.jsonl             studies that could not be prepared, with the reason
    <root>/summary.json               counts and a fingerprint of all of the above; written last

A file appears under its name when it is whole, so a killed preparation continues, and running it again does nothing.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from med3dvlm.preprocessing import VolumeProcessor, quantize
from med3dvlm.records import Question, Study, read_questions, read_studies, write_records

logger = logging.getLogger(__name__)


def prepare(
    source: str | Path,
    studies: Sequence[Study],
    questions: Sequence[Question],
    processor: VolumeProcessor,
    destination: str | Path,
    workers: int = 2,
) -> dict[str, object]:
    """Prepare the volumes of `studies`, whose image paths are relative to `source`; returns the summary that is also written."""
    destination = Path(destination)
    settings = destination / "preprocessor_config.json"
    if settings.is_file() and VolumeProcessor.from_pretrained(destination).to_dict() != processor.to_dict():
        raise ValueError(f"{destination} was prepared with other settings ({settings}); choose another folder or delete it")
    destination.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(destination)
    results: list[tuple[int, str | None]] = []
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = pool.map(partial(_prepare_one, Path(source), destination, processor), studies, chunksize=4)
        results.extend(tqdm(jobs, total=len(studies), unit="volume", desc="preparing"))
    failures = [
        {"study": study.id, "file": study.image, "reason": reason} for study, (_, reason) in zip(studies, results, strict=True) if reason
    ]
    failed = {failure["study"] for failure in failures}
    kept = [study for study in studies if study.id not in failed]
    asked = [question for question in questions if question.study not in failed]
    write_records(destination / "studies.jsonl", kept)
    write_records(destination / "questions.jsonl", asked)
    (destination / "failures.jsonl").write_text("".join(json.dumps(failure) + "\n" for failure in failures), encoding="utf-8")
    digest = hashlib.sha256()
    for name in ("preprocessor_config.json", "studies.jsonl", "questions.jsonl"):
        digest.update((destination / name).read_bytes())
    digest.update(str([checksum for checksum, _ in results]).encode())
    summary: dict[str, object] = {
        "studies": len(kept),
        "questions": len(asked),
        "failures": len(failures),
        "splits": {split: sum(study.split == split for study in kept) for split in sorted({study.split for study in kept})},
        "fingerprint": digest.hexdigest()[:16],
    }
    aside = destination / "summary.json.part"
    aside.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    aside.replace(destination / "summary.json")
    return summary


def _prepare_one(source: Path, destination: Path, processor: VolumeProcessor, study: Study) -> tuple[int, str | None]:
    """Checksum of the prepared volume, or 0 and the reason why there is none."""
    path = volume_path(destination, study)
    if not path.is_file():
        try:
            tensor = quantize(processor(source / study.image)["pixel_values"][0, 0])
        except (OSError, ValueError) as error:  # VolumeError is a ValueError; anything else is a defect and stops the run
            return 0, str(error)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        with aside.open("wb") as file:
            np.save(file, tensor.numpy())
        aside.replace(path)
    return zlib.crc32(path.read_bytes()), None


def volume_path(root: Path, study: Study) -> Path:
    return root / "volumes" / f"{study.id}.npy"


class PreparedData:
    """A prepared folder, opened.

    Args:
        exclude_failures: go on without the studies listed in failures.jsonl; by default they are an error.

    Raises:
        FileNotFoundError: the folder is not prepared, or not to the end.
        ValueError: some studies failed.
    """

    def __init__(self, root: str | Path, exclude_failures: bool = False) -> None:
        self.root = Path(root)
        if not (self.root / "summary.json").is_file():
            raise FileNotFoundError(f"{self.root} holds no finished preparation (no summary.json); run: med3dvlm prepare")
        failures = [json.loads(line) for line in (self.root / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
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

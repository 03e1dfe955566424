"""Torch data sets of prepared data: image-report pairs for the contrastive stage, and the base of other data sets.

Everything is a function of (seed, epoch, the row's place in its data set): the order of workers and processes changes nothing.

Volumes leave the loader as the whole numbers that are stored, a quarter or half of the bytes of float32, and become a model's input on the
device: in training in StageTrainer, which augments them there by their keys, elsewhere in `load_volumes`.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.streams import stream
from med3dvlm.models.clip_processor import Med3DCLIPProcessor
from med3dvlm.records import Study

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def load_volumes(data: PreparedData, studies: Iterable[Study], device: torch.device | str = "cpu") -> Tensor:
    """Return the volumes of studies as model input: (B, 1, D, H, W) float32 on the device, the same bits on every kind of device."""
    studies = list(studies)
    data.fetch(studies)
    return data.processor.dequantize(torch.stack([data.volume(study) for study in studies]).to(device))


class StudyDataset(Dataset[dict[str, Any]]):
    """Base of the data sets: the studies of a split, by default one row each, and the augmentation of their volumes, if any.

    A row has a "volume" (1, D, H, W) of whole numbers and, if it is to be augmented, the "key" that says how: (seed, epoch, row).

    Raises:
        ValueError: the volumes would be flipped, but the texts speak of sides.
    """

    def __init__(self, data: PreparedData, split: str, seed: int = 0, augmentation: Augmentation | None = None) -> None:
        self.data, self.seed, self.epoch, self.augmentation = data, seed, 0, augmentation
        self.studies = data.studies(split)
        if augmentation is not None:
            questions = data.questions(split)
            augmentation.check(text for question in questions for text in (question.text, *question.choices, question.answer))
            augmentation.check(study.report for study in self.studies)

    def require_reports(self) -> None:
        """Raise ValueError where a study has no report, as in data sets of masks."""
        if without := [study.id for study in self.studies if not study.report.strip()]:
            raise ValueError(
                f"{len(without)} of the {len(self.studies)} studies in {self.data.root} have no report, the first is {without[0]}; this stage "
                "learns from reports, so leave them out by --split-file"
            )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the trainer calls this, and every epoch draws anew."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.studies)

    def needed(self, indices: Iterable[int]) -> list[Study]:
        """Return the studies whose volumes the rows hold."""
        return [self.studies[index] for index in indices]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return a batch of rows, whose volumes are fetched together."""
        self.data.fetch(self.needed(indices))
        return [self[index] for index in indices]

    def image(self, study: Study, index: int) -> dict[str, Tensor]:
        """Return the volume part of row `index`."""
        row = {"volume": self.data.volume(study)}
        return row if self.augmentation is None else row | {"key": torch.tensor((self.seed, self.epoch, index))}


def stack_images(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return `pixel_values` (B, 1, D, H, W), still whole numbers, and `augmentation_keys` (B, 3) where rows have keys."""
    # In a worker process default_collate stacks where the main process reads: one copy fewer.
    batch = {"pixel_values": default_collate([row["volume"] for row in rows])}
    return batch | {"augmentation_keys": torch.stack([row["key"] for row in rows])} if "key" in rows[0] else batch


class PairDataset(StudyDataset):
    """Every study's volume with "text", the report, and "id". Where `text_features` (studies, C) is set, a row has the report's too.

    Args:
        sentences: a row has a second text, "sentences": 1 to so many of the report's, drawn in every epoch anew, as ConVIRT draws one
            (arXiv 2010.00747). So a model learns what a short prompt means, too. None leaves it out.
    """

    text_features: Tensor | None = None

    def __init__(
        self,
        data: PreparedData,
        split: str,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        sentences: int | None = None,
    ) -> None:
        super().__init__(data, split, seed, augmentation)
        self.require_reports()
        self.sentences = sentences

    def __getitem__(self, index: int) -> dict[str, Any]:
        study = self.studies[index]
        row: dict[str, Any] = {**self.image(study, index), "text": study.report, "id": study.id}
        if self.text_features is not None:
            row["text_features"] = self.text_features[index]
        if self.sentences is not None:
            sentences = SENTENCE_END.split(study.report.strip())
            random = stream((self.seed, self.epoch, index))
            count = min(int(random.integers(1, self.sentences + 1)), len(sentences))
            row["sentences"] = " ".join(sentences[place] for place in random.choice(len(sentences), size=count, replace=False))
        return row


class PairCollator:
    """Rows of a PairDataset -> their images and either `input_ids`, `attention_mask` or `text_features` (B, C).

    The first two are (B, L), or (2B, L) where rows have a second text: all first ones, then all second ones.
    """

    def __init__(self, processor: Med3DCLIPProcessor) -> None:
        self.processor = processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if "text_features" in rows[0]:
            return {**stack_images(rows), "text_features": torch.stack([row["text_features"] for row in rows])}
        texts = [row[kind] for kind in ("text", "sentences") if kind in rows[0] for row in rows]
        return {**stack_images(rows), **self.processor(text=texts)}

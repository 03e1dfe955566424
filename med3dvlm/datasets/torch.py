"""Prepared data -> what a trainer draws batches from: pairs for the contrastive stage, conversations for the language stages.

Everything is a function of (seed, epoch, the study's place in its split): the order of workers and processes changes nothing.

Volumes leave the loader as the whole numbers that are stored, a quarter or half of the bytes of float32, and become a model's input on the
device: in training in StageTrainer, which augments them there by their keys, elsewhere in `load_volumes`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.store import PreparedData
from med3dvlm.processing import Med3DVLMProcessor, Message, branch_mask
from med3dvlm.prompts import REPORT_PROMPTS, closed_answer, closed_prompt
from med3dvlm.records import Question, Study

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def load_volumes(data: PreparedData, studies: Iterable[Study], device: torch.device | str = "cpu") -> Tensor:
    """The volumes of studies as a model takes them: (B, 1, D, H, W) float32 on the device, the same bits on every kind of device."""
    return data.processor.dequantize(torch.stack([data.volume(study) for study in studies]).to(device))


class StudyDataset(Dataset[dict[str, Any]]):
    """What the two data sets share: the studies of a split, one row each, and how their volumes are to be augmented, if at all.

    A row has a "volume" (1, D, H, W) of whole numbers and, if it is to be augmented, the "key" that says how: (seed, epoch, index).

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

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer: every epoch draws anew."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.studies)

    def image(self, index: int) -> dict[str, Tensor]:
        row = {"volume": self.data.volume(self.studies[index])}
        return row if self.augmentation is None else row | {"key": torch.tensor((self.seed, self.epoch, index))}


def _stack_images(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """`pixel_values` (B, 1, D, H, W), still whole numbers, and `augmentation_keys` (B, 3) where rows have keys."""
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
        self.sentences = sentences

    def __getitem__(self, index: int) -> dict[str, Any]:
        study = self.studies[index]
        row: dict[str, Any] = {**self.image(index), "text": study.report, "id": study.id}
        if self.text_features is not None:
            row["text_features"] = self.text_features[index]
        if self.sentences is not None:
            told = SENTENCE_END.split(study.report.strip())
            random = np.random.default_rng((self.seed, self.epoch, index))
            count = min(int(random.integers(1, self.sentences + 1)), len(told))
            row["sentences"] = " ".join(told[place] for place in random.choice(len(told), size=count, replace=False))
        return row


class PairCollator:
    """Rows of a PairDataset -> their images and either `input_ids`, `attention_mask` or `text_features` (B, C).

    The first two are (B, L), or (2B, L) where rows have a second text: all first ones, then all second ones.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        coded = self.tokenizer(
            list(texts), padding=True, padding_side="right", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {key: coded[key] for key in ("input_ids", "attention_mask")}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if "text_features" in rows[0]:
            return {**_stack_images(rows), "text_features": torch.stack([row["text_features"] for row in rows])}
        texts = [row[kind] for kind in ("text", "sentences") if kind in rows[0] for row in rows]
        return {**_stack_images(rows), **self.tokenize(texts)}


class ConversationDataset(StudyDataset):
    """One row a study: its image and conversations about it, each as if it were the first (see Med3DVLMProcessor.branch).

    A row holds every question in its open form, and with the given probabilities the report, a question with its choices spelled out,
    and a conversation of two questions, from which the model learns to keep what was said in mind.

    Args:
        yes_no: ask the yes/no questions too (stage 3).
        reports, closed, follow_ups: probabilities.
        features: (study) -> image features computed before, instead of the volume.
        image: False puts the report's text in the volume's place, which teaches a new language model its words.
        augmentation: of volumes; image features stay as they are.
    """

    def __init__(
        self,
        data: PreparedData,
        split: str,
        yes_no: bool,
        reports: float = 1.0,
        closed: float = 0.5,
        follow_ups: float = 0.25,
        seed: int = 0,
        features: Callable[[Study], tuple[Tensor, Tensor]] | None = None,
        image: bool = True,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(data, split, seed, augmentation)
        self.yes_no, self.reports, self.closed, self.follow_ups = yes_no, reports, closed, follow_ups
        self.features, self.with_image = features, image
        self.asked: dict[str, list[Question]] = defaultdict(list)
        for question in data.questions(split):
            if yes_no or not question.yes_no:
                self.asked[question.study].append(question)

    def __getitem__(self, index: int) -> dict[str, Any]:
        study = self.studies[index]
        row: dict[str, Any] = {"id": study.id, "conversations": self.conversations(index)}
        if not self.with_image:
            return row | {"context": study.report}
        return row | ({"features": self.features(study)} if self.features is not None else self.image(index))

    def conversations(self, index: int) -> list[list[Message]]:
        study = self.studies[index]
        random = np.random.default_rng((self.seed, self.epoch, index))
        turns = [_turn(question.text, question.answer) for question in self.asked[study.id]]
        rows = list(turns)
        if random.random() < self.reports or not rows:
            rows.append(_turn(str(random.choice(REPORT_PROMPTS)), study.report))
        lettered = [question for question in self.asked[study.id] if question.lettered and not question.yes_no]
        if lettered and random.random() < self.closed:
            question = lettered[random.integers(len(lettered))]
            rows.append(_turn(closed_prompt(question.text, question.choices), closed_answer(question.choices, question.answer)))
        if len(turns) > 1 and random.random() < self.follow_ups:
            first, second = random.choice(len(turns), size=2, replace=False)
            rows.append(turns[first] + turns[second])
        return rows


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class ConversationCollator:
    """Rows of a ConversationDataset -> the arguments of Med3DVLM.forward."""

    def __init__(self, processor: Med3DVLMProcessor, max_length: int) -> None:
        self.processor, self.max_length = processor, max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        branched = [self.processor.branch(row["conversations"], self.max_length, row.get("context")) for row in rows]
        batch: dict[str, Any] = self.processor.pad(branched, left=False)
        batch["attention_mask"] = branch_mask(batch.pop("branches"))
        if "features" in rows[0]:
            batch["image_features"] = tuple(torch.stack(level) for level in zip(*(row["features"] for row in rows), strict=True))
        elif "volume" in rows[0]:
            batch |= _stack_images(rows)
        return batch

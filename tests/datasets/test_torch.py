"""Batches of the loader: integers that become the model's input on the device, augmented or not."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from med3dvlm.checkpoints import load_clip, load_vlm
from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.conversations import ConversationCollator, ConversationDataset, ConversationOptions
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import PairCollator, PairDataset, load_volumes
from med3dvlm.records import Question
from med3dvlm.training.arguments import ImageArguments
from med3dvlm.training.language import ConversationArguments, conversations
from med3dvlm.training.trainer import StageTrainer


class Eye(nn.Module):
    """Records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[Tensor] = []

    def forward(self, pixel_values: Tensor, **_: Any) -> dict[str, Tensor]:
        self.seen.append(pixel_values)
        return {"loss": self.weight.sum() + 0 * pixel_values.mean()}


@pytest.fixture
def pair_processor(tiny_models: SimpleNamespace) -> Any:
    return load_clip(tiny_models.clip)[1]


def settings(folder: Path, kind: type = ImageArguments, **others: Any) -> Any:
    values = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "data": "x"} | others
    return kind(str(folder), **values)


def test_volumes_leave_the_loader_as_they_are_stored(prepared: Path, pair_processor: Any, tiny_models: SimpleNamespace) -> None:
    data = PreparedData(prepared)
    pairs, (_, processor) = PairDataset(data, "train"), load_vlm(tiny_models.vlm)
    talks = ConversationDataset(data, "train", ConversationOptions())
    stored = torch.stack([data.volume(study) for study in data.studies("train")[:3]])
    for dataset, collator in ((pairs, PairCollator(pair_processor)), (talks, ConversationCollator(processor, 400))):
        batch = collator([dataset[index] for index in range(3)])
        assert torch.equal(batch["pixel_values"], stored) and batch["pixel_values"].dtype == data.processor.stored_dtype
        assert "augmentation_keys" not in batch
    expected = torch.cat([data.processor(volume)["pixel_values"] for volume in stored])  # one by one, as the app does
    assert torch.equal(load_volumes(data, data.studies("train")[:3]), expected)


def test_only_questions_with_enough_letters_are_asked_as_closed(prepared: Path) -> None:
    """Open questions and those with nine choices keep their open form."""
    data = PreparedData(prepared)
    study = data.studies("train")[0]
    nine = tuple(f"organ {number}" for number in range(9))
    asked = [Question(study.id, "other", "Open?", (), "Free."), Question(study.id, "other", "Nine?", nine, nine[8])]
    talks = ConversationDataset(data, "train", ConversationOptions(reports=0, closed=1, follow_ups=0))
    talks.asked[study.id] = asked
    assert [row[0]["content"] for row in talks.conversations(0)] == ["Open?", "Nine?"]
    talks.asked[study.id] = [*asked, Question(study.id, "other", "Eight?", nine[:8], nine[7])]
    question, answer = talks.conversations(0)[-1]
    assert question["content"] == "Eight? Choices: " + " ".join(f"{'ABCDEFGH'[number]}. organ {number}" for number in range(8))
    assert answer["content"] == "H. organ 7"


def test_the_model_gets_the_tensors_of_the_processor(prepared: Path, pair_processor: Any, tmp_path: Path) -> None:
    """They equal single scans in float32 bit for bit; augmentation keys are not passed to the model."""
    data = PreparedData(prepared)
    pairs, eye = PairDataset(data, "train"), Eye()
    arguments = settings(tmp_path, max_steps=2, per_device_train_batch_size=11, train_sampling_strategy="sequential")
    StageTrainer(model=eye, args=arguments, train_dataset=pairs, data_collator=PairCollator(pair_processor)).train()
    seen = torch.cat(eye.seen)
    expected = torch.cat([data.processor(data.volume(study))["pixel_values"] for study in pairs.studies])
    assert seen.dtype == torch.float32 and torch.equal(seen, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_follows_from_seed_epoch_and_study(workers: int, prepared: Path, pair_processor: Any, tmp_path: Path) -> None:
    """In two shuffled epochs, with and without workers, each volume equals one computed alone."""
    data, augment = PreparedData(prepared), Augmentation(share=1)
    pairs, eye = PairDataset(data, "train", 5, augment), Eye()
    arguments = settings(tmp_path, num_train_epochs=2, per_device_train_batch_size=11, dataloader_num_workers=workers, seed=workers)
    trainer_with_epochs(eye, arguments, pairs, PairCollator(pair_processor)).train()
    seen = torch.cat(eye.seen)
    assert len(seen) == 2 * len(pairs)
    plain = load_volumes(data, pairs.studies)
    for epoch, part in enumerate(seen.split(len(pairs))):
        expected = augment(plain, torch.tensor([(5, epoch, place) for place in range(len(pairs))]), data.processor.grid.values)
        matches = [[place for place, volume in enumerate(expected) if torch.equal(volume, shown)] for shown in part]
        assert sorted(place for found in matches for place in found) == list(range(len(pairs)))
        assert not torch.equal(expected, plain)


def trainer_with_epochs(model: nn.Module, arguments: Any, dataset: PairDataset, collator: Any) -> StageTrainer:
    from med3dvlm.training.run import EpochSetter

    return StageTrainer(model=model, args=arguments, train_dataset=dataset, data_collator=collator, callbacks=[EpochSetter()])


def test_keys_are_the_same_for_every_number_of_workers(prepared: Path, pair_processor: Any) -> None:
    pairs = PairDataset(PreparedData(prepared), "train", 3, Augmentation())
    pairs.set_epoch(4)
    batches = [
        [
            batch["augmentation_keys"].tolist()
            for batch in DataLoader(pairs, 5, num_workers=workers, collate_fn=PairCollator(pair_processor))
        ]
        for workers in (0, 2)
    ]
    assert batches[0] == batches[1] and sum(batches[0], []) == [[3, 4, index] for index in range(len(pairs))]


@dataclass
class Talk(ConversationArguments):
    pass


def test_cached_features_cannot_be_augmented(prepared: Path, tiny_models: SimpleNamespace, tmp_path: Path) -> None:
    model, processor = load_vlm(tiny_models.vlm)
    model.vision_encoder.requires_grad_(False)
    data = PreparedData(prepared)
    arguments = settings(tmp_path, Talk, cache_features=True, augmentation="default")
    with pytest.raises(ValueError, match="every volume is seen once, unchanged; pass --cache-features false or --augmentation none"):
        conversations(arguments, data, model, processor, yes_no=True)
    parts = conversations(settings(tmp_path, Talk, augmentation='{"zoom": 0}'), data, model, processor, yes_no=True)
    dataset = parts["train_dataset"]
    assert dataset.augmentation == Augmentation(zoom=0) and dataset[2]["key"].tolist() == [42, 0, 2]


def test_persistent_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataloader_persistent_workers is True but must be false"):
        settings(tmp_path, dataloader_persistent_workers=True, dataloader_num_workers=1)


def test_a_split_file_replaces_the_splits(prepared: Path, tmp_path: Path) -> None:
    whole = PreparedData(prepared)
    train, test = ([study.id for study in whole.studies(split)] for split in ("train", "test"))
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": train[1:], "test": [test[2]], "held": [test[0], train[0]]}))
    data = PreparedData(prepared, split_file=path)
    assert [study.id for study in data.studies("train")] == train[1:] and [study.id for study in data.studies("test")] == [test[2]]
    assert {study.id for study in data.studies("held")} == {test[0], train[0]} and {s.split for s in data.studies("held")} == {"held"}
    assert {question.study for question in data.questions("test")} == {test[2]}
    assert data.summary["splits"] == {"train": len(train) - 1, "test": 1, "held": 2}
    assert data.summary["fingerprint"] != whole.summary["fingerprint"]
    path.write_text(json.dumps({"held": [train[0], test[0]], "test": [test[2]], "train": train[:0:-1]}))  # the same in another order
    assert PreparedData(prepared, split_file=path).summary == data.summary
    with pytest.raises(ValueError, match="no studies of split 'validation'"):
        data.studies("validation")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "the split file, is not valid JSON"),
        ("[]", "must hold {split: \\[study ids\\]}"),
        ('{"train": "a"}', "must hold"),
        ('{"train": ["nobody"]}', "names 1 studies that .* does not hold, as nobody"),
    ],
)
def test_a_wrong_split_file_is_refused(text: str, sentence: str, prepared: Path, tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        PreparedData(prepared, split_file=path)
    one = PreparedData(prepared).studies("test")[0].id
    path.write_text(json.dumps({"a": [one], "b": [one]}))
    with pytest.raises(ValueError, match="names a study twice"):
        PreparedData(prepared, split_file=path)

"""Pointing answers: after which sentences, to which masks, and where a conversation is cut."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from med3dvlm import Med3DVLMProcessor
from med3dvlm.checkpoints import load_vlm
from med3dvlm.datasets.conversations import ConversationCollator, ConversationDataset, ConversationOptions
from med3dvlm.datasets.pointing import PointingAnswers, named_masks, places
from med3dvlm.datasets.store import PreparedData
from med3dvlm.models.pointing import POINTING_TOKEN
from med3dvlm.models.vlm_processor import POINT
from med3dvlm.records import Mask

MASKS = {
    "lung nodule": Mask("a.npz", side="left", text="Nodule of 8 mm in the  left upper lobe."),
    "lung nodule (2)": Mask("a.npz", side="right"),
    "liver mass": Mask("a.npz"),
    "liver": Mask("a.npz", kind="structure"),
}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Nodule of 8 mm in the left upper lobe.", ("lung nodule",)),  # its own
        ("Lung nodule on the right.", ("lung nodule (2)",)),
        ("There are lung nodules.", ("lung nodule", "lung nodule (2)")),
        ("Possible liver mass", ("liver mass",)),
        ("No liver mass.", ()),
        ("The liver is enlarged.", ()),
        ("Pleural effusion.", ()),
    ],
)
def test_a_sentence_points_to_the_masks_of_its_findings(sentence: str, expected: tuple[str, ...]) -> None:
    assert named_masks(sentence, MASKS) == expected


def test_pointing_tokens_follow_the_ends_of_sentences() -> None:
    text = "CT of the chest. Liver mass of 5.5 cm.  No effusion. Lung nodule on the right \n"
    assert [(text[:end][-9:], names) for end, names in places(text, MASKS)] == [
        ("f 5.5 cm.", ("liver mass",)),
        ("the right", ("lung nodule (2)",)),
    ]


@pytest.fixture(scope="module")
def processor(tiny_models: SimpleNamespace) -> Med3DVLMProcessor:
    processor = load_vlm(tiny_models.vlm)[1]
    processor.add_pointing(POINTING_TOKEN)
    return processor


def rows_of(prepared: Path, **settings: object) -> ConversationDataset:
    data = PreparedData(prepared)
    return ConversationDataset(data, "train", ConversationOptions(**settings), answers=PointingAnswers(data))  # type: ignore[arg-type]


def test_masks_come_in_the_order_of_the_tokens_whatever_is_cut(prepared: Path, processor: Med3DVLMProcessor) -> None:
    """The sentence before each pointing token states the finding of its mask."""
    data, rows, cut, pointed = PreparedData(prepared), rows_of(prepared), 0, 0
    for max_length in (512, 90):
        collate = ConversationCollator(processor, max_length)
        for number in range(len(rows)):
            row, study = rows[number], rows.studies[rows.rows[number].study]
            assert [message["content"].replace(POINT, "") for turns in row["conversations"] for message in turns] == [
                message["content"] for turns in rows.conversations(number) for message in turns
            ]
            batch = collate([row])
            ids = batch["input_ids"][0].tolist()
            at = [place for place, token in enumerate(ids) if token == processor.pointing_token_id]
            points = batch["points"][0].tolist()
            assert len(at) == len(points) and -1 not in points
            cut += sum(map(len, row["points"])) - len(points)
            for place, point in zip(at, points, strict=True):
                said = processor.tokenizer.decode(ids[:place], skip_special_tokens=False).rpartition("<|assistant|>")[2]
                sentence = said.replace(POINTING_TOKEN, "").replace(". ", ".\n").splitlines()[-1]
                sentence = sentence.partition(". ")[2] if sentence[1:3] == ". " else sentence  # a choice's letter
                names = named_masks(sentence, {name: study.masks[name] for name in data.mask_names(study)})
                assert names and torch.equal(batch["masks"][0, point], data.masks(study, names).any(dim=0)), (sentence, names)
                pointed += 1
    assert pointed > 50 and cut > 5


def test_rows_are_counted_with_their_tokens(prepared: Path, processor: Med3DVLMProcessor) -> None:
    rows = rows_of(prepared, reports=1.0, closed=1.0, follow_ups=1.0)
    rows.limit_rows(processor, 200, 220)
    assert len(rows) > len(rows.studies)
    collate = ConversationCollator(processor, 200)
    for epoch in range(2):
        rows.set_epoch(epoch)
        assert max(collate([rows[number]])["input_ids"].shape[1] for number in range(len(rows))) <= 220


def test_rows_of_a_batch_are_padded(prepared: Path, processor: Med3DVLMProcessor) -> None:
    rows = rows_of(prepared, closed=0, follow_ups=0)
    collate = ConversationCollator(processor, 512)
    batch = collate([rows[number] for number in range(6)])
    tokens = (batch["input_ids"] == processor.pointing_token_id).sum(dim=1)
    assert torch.equal((batch["points"] >= 0).sum(dim=1), tokens) and len(set(tokens.tolist())) > 1
    assert batch["masks"].shape[:2] == (6, max(len(rows[number]["masks"]) for number in range(6)))

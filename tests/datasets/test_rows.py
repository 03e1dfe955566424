"""Rows of conversations: both kinds, bounded in length, reproducible, with independent random numbers for each purpose."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from med3dvlm.checkpoints import load_vlm
from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.conversations import ConversationDataset, ConversationOptions
from med3dvlm.datasets.rows import pack
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import PairDataset
from med3dvlm.models.vlm_processor import Med3DVLMProcessor
from med3dvlm.prompts import REPORT_PROMPTS, closed_prompt
from med3dvlm.records import Question


@pytest.fixture(scope="module")
def data(prepared: Path) -> PreparedData:
    return PreparedData(prepared)


@pytest.fixture(scope="module")
def processor(tiny_models: SimpleNamespace) -> Med3DVLMProcessor:
    return load_vlm(tiny_models.vlm)[1]


def one_each(data: PreparedData, seed: int = 0, augmentation: Augmentation | None = None, **options: Any) -> ConversationDataset:
    return ConversationDataset(data, "train", ConversationOptions(follow_ups=0, rows="conversation", **options), seed, augmentation)


def test_every_question_and_report_is_a_row_of_its_own(data: PreparedData) -> None:
    talks = one_each(data, closed=0.4, seed=3)
    questions = Counter((question.study, question.text, question.answer) for question in data.questions("train"))
    assert len(talks) == len(talks.studies) + questions.total()
    spelled = kinds = 0
    for epoch in range(4):
        talks.set_epoch(epoch)
        asked: Counter[tuple[str, str, str]] = Counter()
        told: list[str] = []
        for index, row in enumerate(talks.rows):
            ((question, answer),) = talks.conversations(index)
            study = talks.studies[row.study]
            if question["content"] in REPORT_PROMPTS:
                told.append(study.id)
                assert answer["content"] == study.report
                continue
            (original,) = talks.asked[study.id][row.questions]
            lettered = original.lettered and not original.yes_no
            kinds += lettered
            if question["content"] != original.text:
                assert lettered and question["content"] == closed_prompt(original.text, original.choices)
                assert answer["content"] == f"{original.letter}. {original.answer}"
                spelled += 1
            else:
                assert answer["content"] == original.answer
            asked[study.id, original.text, original.answer] += 1
        assert asked == questions and told == [study.id for study in talks.studies]
    assert 0.3 < spelled / kinds < 0.5


def test_the_reports_of_a_share_of_the_studies_are_rows(data: PreparedData) -> None:
    """They are the same in every epoch and differ between seeds."""
    few, other = one_each(data, reports=0.5, seed=1), one_each(data, reports=0.5, seed=2)
    chosen = [[row.study for row in talks.rows if row.drawn] for talks in (few, other)]
    assert 5 < len(chosen[0]) < 17 and chosen[0] != chosen[1]
    few.set_epoch(5)
    assert [row.study for row in few.rows if row.drawn] == chosen[0]
    assert not [row for row in one_each(data, reports=0).rows if row.drawn]
    assert few[0]["id"] == few.studies[few.rows[0].study].id and "volume" in few[0]


def test_wrong_rows_are_named(data: PreparedData, processor: Med3DVLMProcessor) -> None:
    with pytest.raises(ValueError, match="rows is 'volume' but must be study or conversation"):
        ConversationDataset(data, "train", ConversationOptions(rows="volume"))
    with pytest.raises(ValueError, match="follow_ups is 0.25 but must be 0 with rows='conversation'; pass --follow-ups 0"):
        ConversationDataset(data, "train", ConversationOptions(rows="conversation"))
    with pytest.raises(ValueError, match="max_row_length is 99 but must be at least max_length, 100"):
        ConversationDataset(data, "train", ConversationOptions()).limit_rows(processor, 100, 99)


def many_questions(talks: ConversationDataset, place: int, count: int) -> None:
    study = talks.studies[place].id
    organs = ("The left kidney", "The spleen", "Both lungs, in their upper lobes")
    talks.asked[study] = [
        Question(study, "organ", f"Which organ holds lesion {number}{' of several, seen here' * (number % 3)}?", organs, organs[number % 3])
        for number in range(count)
    ]


@pytest.mark.parametrize(("image", "max_row_length"), [(True, 400), (True, 2000), (False, 1000)])
def test_five_hundred_questions_become_rows_of_bounded_length(
    data: PreparedData, processor: Med3DVLMProcessor, image: bool, max_row_length: int
) -> None:
    talks = ConversationDataset(data, "train", ConversationOptions(reports=0.5), 4, image=image)
    many_questions(talks, 2, 500)
    talks.limit_rows(processor, 400, max_row_length)
    places = [index for index, row in enumerate(talks.rows) if row.study == 2]
    assert places == list(range(places[0], places[-1] + 1))
    study = talks.studies[2]
    lengths: list[int] = []
    reports = 0
    for epoch in range(6):
        talks.set_epoch(epoch)
        asked: list[str] = []
        for index in places:
            conversations = talks.conversations(index)
            lengths.append(len(processor.branch(conversations, 400, None if image else study.report)["input_ids"]))
            open_forms = [turns[0]["content"] for turns in conversations if len(turns) == 2 and "Choices" not in turns[0]["content"]]
            reports += sum(text in REPORT_PROMPTS for text in open_forms)
            asked += [text for text in open_forms if text not in REPORT_PROMPTS]
            assert conversations and talks[index]["id"] == study.id
        assert asked == [question.text for question in talks.asked[study.id]]  # every one once, in order
    assert max(lengths) <= max_row_length < 500 * 10
    assert np.mean(lengths) > 0.6 * max_row_length  # and no row more than there must be
    assert 0 < reports < 6


@pytest.mark.parametrize("image", [True, False])
def test_lengths_grow_with_the_tokens_of_the_epochs_rows(data: PreparedData, processor: Med3DVLMProcessor, image: bool) -> None:
    talks = ConversationDataset(data, "train", ConversationOptions(reports=0.5), 4, image=image)
    for epoch in range(2):
        talks.set_epoch(epoch)
        contexts = [None if image else study.report for study in talks.studies]
        tokens = [len(processor.branch(talks.conversations(row), 4096, context)["input_ids"]) for row, context in enumerate(contexts)]
        assert np.corrcoef(talks.lengths(), tokens)[0, 1] > 0.95


def test_lengths_are_those_of_rows_not_of_studies(data: PreparedData, processor: Med3DVLMProcessor) -> None:
    split = ConversationDataset(data, "train", ConversationOptions(), 4)
    many_questions(split, 2, 500)
    split.limit_rows(processor, 400, 2000)
    for talks in (split, one_each(data)):
        assert len(talks.lengths()) == len(talks) > len(talks.studies)
        tokens = [len(processor.branch(talks.conversations(row), 400)["input_ids"]) for row in range(len(talks))]
        assert np.corrcoef(talks.lengths(), tokens)[0, 1] > 0.9


def test_short_studies_stay_one_row_with_the_same_conversations(data: PreparedData, processor: Med3DVLMProcessor) -> None:
    talks, limited = (ConversationDataset(data, "train", ConversationOptions(), 6) for _ in range(2))
    limited.limit_rows(processor, 400, 4096)
    assert len(limited) == len(talks.studies)
    for index in range(len(talks)):
        assert limited.conversations(index) == talks.conversations(index)
        told = any(turns[0]["content"] in REPORT_PROMPTS for turns in talks.conversations(index))
        assert told == (np.random.default_rng((6, 0, index)).random() < 1.0)  # the stream of the words


def test_a_row_without_fixed_questions_is_never_empty(data: PreparedData, processor: Med3DVLMProcessor) -> None:
    """Where a row has room for a single conversation, the report gets its own row."""
    talks = ConversationDataset(data, "train", ConversationOptions(reports=0.1, closed=0.1, follow_ups=0.1))
    longest = 110
    talks.limit_rows(processor, longest, longest)
    assert len(talks) > 2 * len(talks.studies)
    for index in range(len(talks)):
        row = processor.branch(talks.conversations(index), longest)
        assert len(row["input_ids"]) <= longest and max(row["branches"]) >= 1


def test_packing_is_first_fit() -> None:
    assert pack([3, 3, 3, 5], {"report": 4, "closed": 2}, 6) == [
        (slice(0, 2), ()), (slice(2, 3), ("closed",)), (slice(3, 4), ()), (slice(0), ("report",))
    ]  # fmt: skip
    assert pack([], {"report": 4}, 6) == [(slice(0), ("report",))]
    assert pack([1, 1], {"report": 4}, 6) == [(slice(0, 2), ("report",))]


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    return abs(float(np.corrcoef(one, other)[0, 1]))


def moved(keys: Sequence[torch.Tensor]) -> list[bool]:
    """Returns which rows an augmentation by translation alone moves."""
    augment = Augmentation(share=0.5, scale=0, shift=0, gamma=0, noise=0, zoom=0, crop=0, rotation=0, translation=0.3)
    volumes = torch.rand(1, 1, 3, 4, 5).repeat(len(keys), 1, 1, 1, 1)
    return [not torch.equal(*pair) for pair in zip(augment(volumes, torch.stack(list(keys)), (0, 1)), volumes, strict=True)]


def test_conversations_and_augmentation_are_independent(data: PreparedData) -> None:
    """Over 1,100 rows a correlation of 0.12 is four standard errors; one stream for both gave 0.9 and more."""
    augment = Augmentation(share=0.5)
    talks = ConversationDataset(data, "train", ConversationOptions(reports=0.5), augmentation=augment)
    pairs = PairDataset(data, "train", 0, augment, sentences=3)
    reported, said, keys = [], [], []
    for epoch in range(50):
        talks.set_epoch(epoch)
        pairs.set_epoch(epoch)
        for index in range(len(talks)):
            reported.append(any(turns[0]["content"] in REPORT_PROMPTS for turns in talks.conversations(index)))
            keys.append(torch.tensor((0, epoch, index)))
            said.append(len(pairs[index]["sentences"]) if epoch < 20 else 0)
    assert talks[3]["key"].tolist() == [0, 49, 3]
    found = moved(keys)
    assert 0.4 < np.mean(found) < 0.6
    assert correlation(reported, found) < 0.12
    assert correlation(said[:440], found[:440]) < 0.19


def test_rows_of_one_study_are_augmented_independently(data: PreparedData) -> None:
    talks = one_each(data, augmentation=Augmentation(share=0.5))
    rows = [index for index, row in enumerate(talks.rows) if row.study == 4]
    keys = []
    for epoch in range(200):
        talks.set_epoch(epoch)
        keys += [torch.tensor((talks.seed, talks.epoch, index)) for index in rows[:2]]
    assert talks[rows[1]]["key"].tolist() == keys[-1].tolist()
    found = moved(keys)
    assert correlation(found[::2], found[1::2]) < 0.28


@pytest.mark.parametrize("image", [True, False])
def test_cut_conversations_are_counted_and_end_without_end_token(image: bool, data: PreparedData, processor: Med3DVLMProcessor) -> None:
    """The counts equal those of rows written out with every report and question; without an image the report replaces it."""
    talks = ConversationDataset(data, "train", ConversationOptions(), image=image)
    end = processor.tokenizer.eos_token_id
    inserted = processor.num_image_tokens if image else 0

    def lengths(study: Any) -> tuple[int, list[int]]:
        own = 0 if image else len(processor.tokenizer(study.report, add_special_tokens=False)["input_ids"])
        questions = [(question.text, question.answer) for question in talks.asked[study.id]]
        spelled = [
            (closed_prompt(question.text, question.choices), f"{question.letter}. {question.answer}")
            for question in talks.asked[study.id]
            if question.lettered and not question.yes_no
        ]
        asked = [*((prompt, study.report) for prompt in REPORT_PROMPTS), *questions, *spelled]
        rows = (processor.tokenizer.apply_chat_template(messages(*turn), tokenize=True, return_dict=False) for turn in asked)
        return own, [len(row) + inserted + own for row in rows]

    needed = [max(2 * own, max(counts[: len(REPORT_PROMPTS)])) for own, counts in map(lengths, talks.studies)]
    limit = sorted(needed)[len(needed) // 2 if image else -4]  # without an image a question takes a good part of it
    cut, count, most = talks.count_cut(processor, limit)["reports"]
    assert (cut, count, most) == (sum(length > limit for length in needed), len(talks.studies), max(needed)) and 0 < cut < count
    assert talks.count_cut(processor, most)["reports"][0] == talks.count_cut(processor, most)["answers"][0] == 0
    for study in talks.studies:
        context = None if image else study.report
        row = processor.branch([messages(REPORT_PROMPTS[0], study.report)], limit, context)
        _, counts = lengths(study)
        assert (row["labels"][-1] == end) == (counts[0] <= limit) or not image
        assert len(row["input_ids"]) <= limit


def messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

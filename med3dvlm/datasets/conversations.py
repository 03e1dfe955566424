"""Conversations about prepared volumes, for the language stages. `datasets/torch.py` holds what they share with image-report pairs."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.rows import Row, pack
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.streams import Purpose, stream
from med3dvlm.datasets.torch import StudyDataset, stack_images
from med3dvlm.models.vlm_processor import IGNORED, Med3DVLMProcessor, Message, answer_lengths, exchange
from med3dvlm.prompts import REPORT_PROMPTS, closed_answer, closed_prompt
from med3dvlm.records import Question, Study

if TYPE_CHECKING:
    from med3dvlm.datasets.pointing import PointingAnswers

ROWS = ("study", "conversation")
LOSS_WEIGHTINGS = ("token", "conversation")


@dataclass(frozen=True)
class ConversationOptions:
    """Which conversations are held about a study, and how they are distributed over rows.

    Args:
        yes_no: ask the yes/no questions too (stage 3).
        reports, closed, follow_ups: probabilities of a report, of a question with its choices, and of two questions in one conversation.
        rows: "study" or "conversation", see `ConversationDataset`.

    Raises:
        ValueError: an unknown kind of row, or follow-ups in rows of one conversation.
    """

    yes_no: bool = True
    reports: float = 1.0
    closed: float = 0.5
    follow_ups: float = 0.25
    rows: str = "study"

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise ValueError(f"rows is {self.rows!r} but must be {' or '.join(ROWS)}")
        if self.rows == "conversation" and self.follow_ups:
            raise ValueError(f"follow_ups is {self.follow_ups} but must be 0 with rows='conversation'; pass --follow-ups 0")


class ConversationDataset(StudyDataset):
    """Volumes and conversations about them, each as if it were the first (see Med3DVLMProcessor.branch).

    A row is one of two kinds:

    - "study": the image and all conversations about it. It holds every question in its open form, and with the given probabilities the
      report, a question with its choices spelled out, and a conversation of two questions, from which the model learns to keep what
      was said in mind. The image is encoded and read once for all of them. `limit_rows` splits long rows.
    - "conversation": the image and one conversation, as the papers train. There is one row for every question, with its choices spelled out
      in a share `closed` of the epochs, and one for the report of a share `reports` of the studies, drawn once by the seed.

    Args:
        options: which conversations there are.
        seed: of everything that is drawn.
        augmentation: of volumes; image features stay as they are. Every row draws its own.
        image: False puts the report's text in the volume's place, which teaches a new language model its words.
        features: (study) -> image features computed before, instead of the volume.
        answers: makes the answers point at what they name; rows then have "masks" and "points" (see `PointingAnswers.row`).

    Raises:
        ValueError: there is no row at all.
    """

    def __init__(
        self,
        data: PreparedData,
        split: str,
        options: ConversationOptions,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        image: bool = True,
        features: Callable[[Study], tuple[Tensor, ...]] | None = None,
        answers: "PointingAnswers | None" = None,
    ) -> None:
        super().__init__(data, split, seed, augmentation)
        if options.reports:
            self.require_reports()
        self.options, self.packed = options, options.rows == "study"
        self.features, self.with_image, self.answers = features, image, answers
        self.asked: dict[str, list[Question]] = defaultdict(list)
        for question in data.questions(split):
            if options.yes_no or not question.yes_no:
                self.asked[question.study].append(question)
        self.rows = [Row(study) for study in range(len(self.studies))] if self.packed else self._rows_of_one()
        if not self.rows:
            raise ValueError(
                f"split {split!r} has no conversation to learn from: there is no question and reports is {options.reports}; raise reports"
            )

    def needed(self, indices: Iterable[int]) -> list[Study]:
        """Return the studies whose volumes the rows hold."""
        if self.features is not None or not self.with_image:
            return []
        return [self.studies[self.rows[index].study] for index in indices]

    def _rows_of_one(self) -> list[Row]:
        reported = stream(self.seed, Purpose.REPORT_ROWS).random(len(self.studies)) < self.options.reports
        rows = []
        for place, study in enumerate(self.studies):
            rows += [Row(place, slice(0), ("report",))] if reported[place] else []
            rows += [Row(place, slice(number, number + 1), ()) for number in range(len(self.asked[study.id]))]
        return rows

    def limit_rows(self, processor: Med3DVLMProcessor, max_length: int, max_row_length: int) -> None:
        """Split a study into several rows, each with its volume, where its conversations could take more than `max_row_length` tokens.

        Which row asks a question follows from the texts alone, so every process and epoch has the same rows. What is drawn in every
        epoch anew is planned with its longest form, into the first row that has room.

        Tokens are counted only where there could be too many: a text's UTF-8 bytes are never fewer than its tokens.

        Args:
            max_length: tokens of a conversation, as the collator cuts it.

        Raises:
            ValueError: a row could not hold one conversation.
        """
        if max_row_length < max_length:
            raise ValueError(
                f"max_row_length is {max_row_length} but must be at least max_length, {max_length}, so that a row can hold a conversation"
            )
        if not self.packed:
            return

        def count(messages: Sequence[Message], context: str | None) -> tuple[int, int]:
            branches = processor.branch([messages], max_length, context)["branches"]
            return branches.count(0), branches.count(1)

        one = exchange(".", ".")
        shared, first = count(one, None if self.with_image else "")
        further = count(one + one, None if self.with_image else "")[1] - first if self.options.follow_ups else 0
        rows: list[Row] = []

        def most(messages: Sequence[Message]) -> int:
            return min(first + further * (len(messages) // 2 - 1) + _byte_count(messages), max_length - shared)

        for place, study in enumerate(self.studies):
            context = None if self.with_image else study.report
            begin = shared + len((context or "").encode())
            costs = self._costs(study, most)
            if begin + sum(costs[0]) + sum(costs[1].values()) <= max_row_length:
                rows.append(Row(place))
                continue
            begin, _ = count(one, context)
            costs = self._costs(study, lambda turn, context=context: count(turn, context)[1])  # type: ignore[misc]
            rows += [Row(place, *part) for part in pack(*costs, max_row_length - begin)]
        self.rows = rows

    def count_cut(self, processor: Med3DVLMProcessor, max_length: int) -> dict[str, tuple[int, int, int]]:
        """Return for reports and answers how many `max_length` cuts, out of how many, and the length that would cut none.

        Tokens are counted only where there could be too many, as in `limit_rows`.

        Raises:
            ValueError: a question leaves no room for its answer.
        """
        prompt = max(REPORT_PROMPTS, key=lambda words: len(processor.branch([exchange(words, ".")])["branches"]))
        frame = processor.branch([exchange(".", ".")], None, None if self.with_image else "")["branches"]
        lengths: dict[str, list[int]] = {"reports": [], "answers": []}
        for study in self.studies:
            context = None if self.with_image else study.report
            turns = (
                [("reports", exchange(prompt, study.report))]
                if self.options.reports or not self.with_image or not self.asked[study.id]
                else []
            )
            for question in self.asked[study.id]:
                forms = [exchange(question.text, question.answer), *([_closed_turn(question)] if _has_closed_form(question) else [])]
                turns.append(("answers", max(forms, key=_byte_count)))
            for kind, turn in turns:
                length = max(
                    len(frame) + _byte_count(self._shown(study, turn)) + len((context or "").encode()), 2 * len((context or "").encode())
                )
                if length > max_length:
                    turn = self._shown(study, turn)
                    processor.branch([turn], max_length, context)
                    branches = processor.branch([turn], None, context)["branches"]
                    length = max(len(branches), 2 * (branches.count(0) - frame.count(0)) if context else 0)
                lengths[kind].append(length)
        return {kind: (sum(length > max_length for length in found), len(found), max(found, default=0)) for kind, found in lengths.items()}

    def _costs(self, study: Study, cost: Callable[[list[Message]], int]) -> tuple[list[int], dict[str, int]]:
        """Return the tokens of a study's questions, and of the longest form of each thing that may be drawn."""
        asked = self.asked[study.id]
        turns = [exchange(question.text, question.answer) for question in asked]

        def shown(messages: list[Message]) -> int:
            return cost(self._shown(study, messages))

        questions, drawn = list(map(shown, turns)), {}
        if self.options.reports or not asked:
            drawn["report"] = max(shown(exchange(prompt, study.report)) for prompt in REPORT_PROMPTS)
        if self.options.closed and (spelled := [shown(_closed_turn(question)) for question in asked if _has_closed_form(question)]):
            drawn["closed"] = max(spelled)
        if self.options.follow_ups and len(turns) > 1:
            first, second = sorted(range(len(turns)), key=questions.__getitem__)[-2:]
            drawn["follow_up"] = max(shown(turns[first] + turns[second]), shown(turns[second] + turns[first]))
        return questions, drawn

    def _shown(self, study: Study, messages: list[Message]) -> list[Message]:
        """Return the messages in the form that the model learns."""
        return messages if self.answers is None else self.answers.pointing(study, messages)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        study = self.studies[self.rows[index].study]
        conversations = self.conversations(index)
        answers = {"conversations": conversations} if self.answers is None else self.answers.row(study, conversations)
        row: dict[str, Any] = {"id": study.id, **answers}
        if not self.with_image:
            return row | {"context": study.report}
        return row | ({"features": self.features(study)} if self.features is not None else self.image(study, index))

    def lengths(self) -> list[int]:
        """Return about how long each row of this epoch is: the bytes of its words, which grow with its tokens."""
        contexts = [0 if self.with_image else len(self.studies[row.study].report.encode()) for row in self.rows]
        return [context + sum(map(_byte_count, self.conversations(index))) for index, context in enumerate(contexts)]

    def conversations(self, index: int) -> list[list[Message]]:
        """Return the conversations of row `index` in this epoch."""
        row = self.rows[index]
        study = self.studies[row.study]
        asked = self.asked[study.id]
        random = stream((self.seed, self.epoch, row.study if self.packed else index))
        if not self.packed and asked[row.questions]:
            question = asked[row.questions][0]
            spelled = _has_closed_form(question) and random.random() < self.options.closed
            return [_closed_turn(question) if spelled else exchange(question.text, question.answer)]
        turns = [exchange(question.text, question.answer) for question in asked]
        kept = turns[row.questions]
        always, drawn = () if kept else row.drawn, {}
        if random.random() < self.options.reports or "report" in always:
            drawn["report"] = exchange(str(random.choice(REPORT_PROMPTS)), study.report)
        lettered = [question for question in asked if _has_closed_form(question)]
        if lettered and (random.random() < self.options.closed or "closed" in always):
            drawn["closed"] = _closed_turn(lettered[random.integers(len(lettered))])
        if len(turns) > 1 and (random.random() < self.options.follow_ups or "follow_up" in always):
            first, second = random.choice(len(turns), size=2, replace=False)
            drawn["follow_up"] = turns[first] + turns[second]
        return kept + [conversation for name, conversation in drawn.items() if name in row.drawn]


def _byte_count(messages: Sequence[Message]) -> int:
    """Return the bytes of the messages, never fewer than their tokens."""
    return sum(len(message["content"].encode()) for message in messages)


def _has_closed_form(question: Question) -> bool:
    return question.lettered and not question.yes_no


def _closed_turn(question: Question) -> list[Message]:
    return exchange(closed_prompt(question.text, question.choices), closed_answer(question.choices, question.answer))


class ConversationCollator:
    """Rows of a ConversationDataset -> the arguments of Med3DVLM.forward.

    Where every row holds one conversation, there are no "branches", and any language model and any attention takes the mask. "points" (B, K) are
    those of pointing tokens that are left where a conversation was cut: its first.

    Args:
        max_length: tokens of a conversation; longer ones are cut.
        loss_weighting: "token", or "conversation", by which every conversation counts alike: its labelled tokens share its weight.
    """

    def __init__(self, processor: Med3DVLMProcessor, max_length: int, loss_weighting: str = "token") -> None:
        if loss_weighting not in LOSS_WEIGHTINGS:
            raise ValueError(f"loss_weighting {loss_weighting!r} is unknown; known: {', '.join(LOSS_WEIGHTINGS)}")
        self.processor, self.max_length, self.loss_weighting = processor, max_length, loss_weighting

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        branched = [self.processor.branch(row["conversations"], self.max_length, row.get("context")) for row in rows]
        batch: dict[str, Any] = self.processor.pad(branched, left=False)
        branches = batch["branches"]
        if "points" in rows[0]:
            batch["masks"] = pad_sequence([row["masks"] for row in rows], batch_first=True)  # (B, G, D, H, W)
            pointed = (batch["input_ids"] == self.processor.pointing_token_id) & (batch["labels"] != IGNORED)
            kept = [
                [place for number, of_one in enumerate(row["points"], start=1) for place in of_one[: int(own[places == number].sum())]]
                for row, own, places in zip(rows, pointed, branches, strict=True)
            ]
            batch["points"] = pad_sequence([torch.tensor(own, dtype=torch.long) for own in kept], batch_first=True, padding_value=-1)
        if self.loss_weighting == "conversation":
            batch["answer_lengths"] = answer_lengths(batch["labels"], branches)
        if branches.max() <= 1:
            del batch["branches"], batch["position_ids"]  # they only count
        if "features" in rows[0]:
            batch["image_features"] = tuple(torch.stack(level) for level in zip(*(row["features"] for row in rows), strict=True))
        elif "volume" in rows[0]:
            batch |= stack_images(rows)
        return batch

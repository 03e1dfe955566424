"""Med3DVLMProcessor: prepare volumes and conversations for a Med3DVLM.

A conversation is a list of {"role": "user" | "assistant" | "system", "content": str}. The image stands once, before the first user message's
words; after tokenising, its one token becomes `num_image_tokens` placeholders. Labels cover the assistant's words and the token that ends its turn.
Only the chat template writes special tokens: where a message holds the text of one, such as "<|im_end|>", it is tokenised as any other words.

Shapes: B conversations, L tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from med3dvlm.models.portable import Portable, auto_map
from med3dvlm.special_tokens import only_words

IGNORED = -100  # the label that torch's cross entropy leaves out
# No characters (Unicode):
MARK = "\ufdd0"  # stands within the text of a special token that is to be read as words
POINT = "\ufdd1"  # stands in an assistant's message where it points
UNKNOWN = "\ufffd"  # stands for either of them in what users and data say
Message = dict[str, str]


def exchange(question: str, answer: str) -> list[Message]:
    """Return a conversation of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Med3DVLMProcessor(Portable, ProcessorMixin):
    """A VolumeProcessor and a tokenizer with a chat template.

    Args:
        num_image_tokens: placeholders a volume takes; equals the model's `config.num_image_tokens`.
        image_token: the placeholder, added to the tokenizer as a special token where it is new.
        pointing_token: with which an answer points, added likewise; None for a model that cannot point.
    """

    pointing_token: str | None = None
    pointing_token_id: int | None = None

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        num_image_tokens: int = 256,
        image_token: str = "<image>",
        chat_template: str | None = None,
        pointing_token: str | None = None,
    ) -> None:
        if tokenizer.chat_template is None and chat_template is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model's, or set one")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.auto_map = auto_map(AutoProcessor="Med3DVLMProcessor")
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = self._added(image_token)
        if pointing_token is not None:
            self.add_pointing(pointing_token)
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def _added(self, token: str) -> int:
        """Return the id of a special token, added if new."""
        if token not in self.tokenizer.all_special_tokens:
            self.tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
        return int(self.tokenizer.convert_tokens_to_ids(token))

    def add_pointing(self, token: str) -> int:
        """Add a pointing token, which replaces POINT in an assistant's message, and return its id."""
        self.pointing_token, self.pointing_token_id = token, self._added(token)
        return self.pointing_token_id

    def encode(
        self, messages: Sequence[Message], generate: bool = False, image: bool = True, max_length: int | None = None
    ) -> dict[str, list[int]]:
        """Encode one conversation to {"input_ids", "labels"}, each L long.

        Args:
            generate: end with the opening of the assistant's turn; nothing is cut.
            image: the conversation is about a volume.
            max_length: whole trailing turns, then trailing text, are cut to this many tokens; image tokens never. An answer that is cut has
                no token that ends it: that it ends there is not to be learned.

        Raises:
            ValueError: the image and the first question do not fit in `max_length`, or the chat template rewrites earlier turns.
        """
        placeholders = [self.image_token_id] * self.num_image_tokens if image else None
        coded, _ = self._encode(messages, generate, placeholders, max_length)
        return coded

    def _encode(
        self, messages: Sequence[Message], generate: bool, inserted: list[int] | None, max_length: int | None
    ) -> tuple[dict[str, list[int]], int]:
        """Encode the conversation with `inserted` in the image's place. Also returns how many tokens it has up to the end of that."""
        input_ids, labels = self._tokenize(messages, generate, inserted is not None)
        shared = 0
        if inserted is not None:
            place = input_ids.index(self.image_token_id)
            shared = place + len(inserted)
            input_ids[place : place + 1] = inserted
            labels[place : place + 1] = [IGNORED] * len(inserted)
        if max_length is None or len(input_ids) <= max_length or generate:
            return {"input_ids": input_ids, "labels": labels}, shared
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(turns) > 1:
            return self._encode(messages[: turns[-2] + 1], generate, inserted, max_length)
        answer = next((index for index, label in enumerate(labels) if label != IGNORED), len(labels))
        if answer >= max_length:
            raise ValueError(
                f"{max_length} tokens do not hold what stands before an answer: all up to the image or text that is asked about ({shared} tokens) "
                f"and the question ({answer - shared} tokens); raise max_length"
            )
        return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}, shared

    def _tokenize(self, messages: Sequence[Message], generate: bool, image: bool) -> tuple[list[int], list[int]]:
        """Return ids and labels with the image still one token, which stands before the first user message's words."""
        placed = [{**message, "content": self._marked(message["content"], message["role"])} for message in messages]
        first = next((message for message in placed if message["role"] == "user"), None)
        if image and first is None:
            raise ValueError("a conversation about a volume needs a user message, where the volume stands")
        if image and first is not None:
            first["content"] = self.image_token + first["content"]
        text = self._render(placed, generate)
        spans = self._assistant_spans(placed, text)
        ids, places = self._coded(text)
        labels = [
            token if any(_within(start, stop, begin, end) for begin, end in spans) else IGNORED
            for token, (start, stop) in zip(ids, places, strict=True)
        ]
        return ids, labels

    def _marked(self, words: str, role: str = "user") -> str:
        """Insert a MARK into texts of special tokens, and the assistant's pointing token in place of POINT."""
        marked = only_words(self.tokenizer, words.replace(MARK, UNKNOWN), MARK)
        return marked.replace(POINT, self.pointing_token if role == "assistant" and self.pointing_token else UNKNOWN)

    def _coded(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text and the characters of each. The text is cut at its MARKs, so that no token reaches across one."""
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        begin = 0
        for number, piece in enumerate(text.split(MARK)):
            # What does not begin the text follows a token, which is dropped again: many tokenizers put a space before a text.
            opening = self.image_token if number else ""
            coded = self.tokenizer(opening + piece, add_special_tokens=False, return_offsets_mapping=True)
            dropped, shift = int(number > 0), begin - len(opening)
            ids += coded["input_ids"][dropped:]
            places += [(start + shift, stop + shift) for start, stop in coded["offset_mapping"][dropped:]]
            begin += len(piece) + len(MARK)
        return ids, places

    def _render(self, messages: Sequence[Message], generate: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.chat_template, tokenize=False, add_generation_prompt=generate
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses a conversation: {error}") from None
        return text

    def _assistant_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Return the (start, end) characters of the assistant's words and turn ends in the rendered text."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before, through = self._render(messages[:index], True), self._render(messages[: index + 1], False).rstrip()
                if not (text.startswith(before) and text.startswith(through)):
                    raise ValueError(
                        "the chat template rewrites earlier turns, so the assistant's words cannot be found; set a plainer chat_template"
                    )
                spans.append((len(before), len(through)))
        return spans

    def branch(
        self, conversations: Sequence[Sequence[Message]], max_length: int | None = None, context: str | None = None
    ) -> dict[str, list[int]]:
        """Encode several conversations about one volume as one row: they share everything up to the image, and do not see each other.

        Gives `input_ids`, `labels`, `position_ids` (each branch continues after the image) and `branches` (0 for the shared part, then 1, 2, ...),
        from which `branch_mask` makes the attention mask. The image is encoded and attended to once, and a model trained so answers
        a question as if it were the first.

        Args:
            max_length: of each conversation.
            context: a text in the image's place, which is then learned as well: language modelling without a volume. It is cut to half of
                `max_length`.
        """
        if context is None:
            inserted = [self.image_token_id] * self.num_image_tokens
        else:
            inserted = self._coded(self._marked(context))[0][: None if max_length is None else max_length // 2]
        row: dict[str, list[int]] = {}
        for number, messages in enumerate(conversations, start=1):
            coded, shared = self._encode(messages, False, inserted, max_length)
            if not row:
                row = {key: values[:shared] for key, values in coded.items()}
                row |= {"position_ids": list(range(shared)), "branches": [0] * shared}
                if context is not None:
                    row["labels"] = list(row["input_ids"])
            if row["input_ids"][:shared] != coded["input_ids"][:shared]:
                raise ValueError(
                    "conversations about one volume must begin alike up to the image; give all of them the same system message"
                )
            rest = len(coded["input_ids"]) - shared
            row["input_ids"] += coded["input_ids"][shared:]
            row["labels"] += coded["labels"][shared:]
            row["position_ids"] += range(shared, shared + rest)
            row["branches"] += [number] * rest
        return row

    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        volumes: Any = None,
        generate: bool = True,
        max_length: int | None = None,
    ) -> BatchFeature:
        """Return a batch: `input_ids`, `attention_mask` (B, L), `pixel_values` (B, 1, D, H, W) where volumes are given, `labels` unless
        `generate`.

        Padding stands on the left for generation, on the right for training.
        """
        rows = [self.encode(messages, generate, volumes is not None, max_length) for messages in conversations]
        batch = self.pad(rows, left=generate)
        if generate:
            del batch["labels"]
        if volumes is not None:
            batch["pixel_values"] = self.image_processor(volumes)["pixel_values"]
        return BatchFeature(batch)

    def pad(self, rows: Sequence[dict[str, list[int]]], left: bool) -> dict[str, torch.Tensor]:
        """Pad rows of different length to tensors (B, L)."""
        length = max(len(row["input_ids"]) for row in rows)
        fillers = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED, "position_ids": 0, "branches": -1}
        batch: dict[str, list[list[int]]] = defaultdict(list)
        for row in rows:
            missing = length - len(row["input_ids"])
            for key, values in {**row, "attention_mask": [1] * len(row["input_ids"])}.items():
                filled = [fillers[key]] * missing
                batch[key].append(filled + values if left else values + filled)
        return {key: torch.tensor(value) for key, value in batch.items()}


def end_tokens(processor: Med3DVLMProcessor, model: Any) -> list[int]:
    """What ends an answer: the tokenizer's and the language model's end of text, and the token with which the chat template ends a turn."""
    known = model.language_model.generation_config.eos_token_id
    ends = {processor.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    labels = processor.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}], image=False)["labels"]
    last = next(label for label in reversed(labels) if label != IGNORED)
    added = processor.tokenizer.added_tokens_decoder
    if last in added and added[last].special:  # else the template ends turns with plain words
        ends.add(last)
    return sorted(end for end in ends if end is not None)


def _within(start: int, stop: int, begin: int, end: int) -> bool:
    """Return whether the characters of a token lie in a span. A tokenizer that trims its offsets gives a token of white space no characters."""
    return begin <= start and stop <= end and start < end and (start < stop or begin < start)


def answer_lengths(labels: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """Return for each labelled token (B, L) how many labelled tokens its conversation has, 0 for any other token.

    Only those that are predicted count, so not a row's first token. Divided by them, the losses of a conversation sum to their mean.
    """
    counted = labels != IGNORED
    counted[:, 0] = False
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    conversations = rows * (branches.max() + 1) + branches
    lengths = torch.zeros_like(labels)
    lengths[counted] = torch.bincount(conversations[counted])[conversations[counted]]
    return lengths


def branch_mask(branches: torch.Tensor) -> torch.Tensor:
    """Make (B, 1, L, L) from branch numbers (B, L), True where the token of a row may see that of a column.

    A token sees the shared part and its own branch, never what comes later. Padding (-1) sees its own kind, so that no row is empty.
    """
    query, key = branches[:, :, None], branches[:, None, :]
    earlier = torch.ones(branches.shape[1], branches.shape[1], dtype=torch.bool, device=branches.device).tril()
    return (((key == 0) | (key == query)) & earlier).unsqueeze(1)

"""Med3DVLMProcessor: volumes and conversations -> what the model takes.

A conversation is a list of {"role": "user" | "assistant" | "system", "content": str}. The image stands once, before the first user message's
words; after tokenising, its one token becomes `num_image_tokens` placeholders. Labels cover the assistant's words and the token that ends its turn.

Shapes: B conversations, L tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

IGNORED = -100  # the label that torch's cross entropy leaves out
Message = dict[str, str]


class Med3DVLMProcessor(ProcessorMixin):
    """A VolumeProcessor and a tokenizer with a chat template.

    Args:
        num_image_tokens: placeholders a volume takes; equals the model's `config.num_image_tokens`.
        image_token: the placeholder, added to the tokenizer as a special token where it is new.
    """

    def __init__(
        self, image_processor: Any, tokenizer: Any, num_image_tokens: int = 256, image_token: str = "<image>", chat_template: str | None = None
    ) -> None:
        if tokenizer.chat_template is None and chat_template is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model's, or set one")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        if image_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [image_token]})
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def encode(
        self, messages: Sequence[Message], generate: bool = False, image: bool = True, max_length: int | None = None
    ) -> dict[str, list[int]]:
        """One conversation -> {"input_ids", "labels"}, each L long.

        Args:
            generate: end with the opening of the assistant's turn.
            image: the conversation is about a volume.
            max_length: whole trailing turns, then trailing text, are cut to this many tokens; image tokens never.

        Raises:
            ValueError: the image and the first question do not fit in `max_length`, or the chat template rewrites earlier turns.
        """
        messages = [dict(message) for message in messages]
        if image:
            first = next((message for message in messages if message["role"] == "user"), None)
            if first is None:
                raise ValueError("a conversation about a volume needs a user message, where the volume stands")
            first["content"] = self.image_token + first["content"]
        text = self._render(messages, generate)
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = self._assistant_spans(messages, text)
        labels = [
            token if any(start < stop and begin <= start and stop <= end for begin, end in spans) else IGNORED
            for token, (start, stop) in zip(coded["input_ids"], coded["offset_mapping"], strict=True)
        ]
        input_ids = list(coded["input_ids"])
        placed = [index for index, token in enumerate(input_ids) if token == self.image_token_id]
        if len(placed) != int(image):
            raise ValueError(f"a conversation holds the image token {self.image_token} {int(image)} times, not {len(placed)}; take it out of the messages")
        for index in placed:
            input_ids[index : index + 1] = [self.image_token_id] * self.num_image_tokens
            labels[index : index + 1] = [IGNORED] * self.num_image_tokens
        if max_length is not None and len(input_ids) > max_length:
            last = input_ids[::-1].index(self.image_token_id) if image else 0
            if image and len(input_ids) - last >= max_length:
                raise ValueError(f"{max_length} tokens do not hold the image ({self.num_image_tokens} tokens) and a question; raise max_length")
            turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            if len(turns) > 1 and not generate:
                whole = [{**message, "content": message["content"].removeprefix(self.image_token)} for message in messages[: turns[-2] + 1]]
                return self.encode(whole, generate, image, max_length)
            input_ids, labels = input_ids[:max_length], labels[:max_length]
        return {"input_ids": input_ids, "labels": labels}

    def _render(self, messages: Sequence[Message], generate: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.chat_template, tokenize=False, add_generation_prompt=generate
        )
        return text

    def _assistant_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where in the rendered text the assistant's words and turn ends stand, as (first, past the last) character."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before, through = self._render(messages[:index], True), self._render(messages[: index + 1], False).rstrip()
                if not (text.startswith(before) and text.startswith(through)):
                    raise ValueError("the chat template rewrites earlier turns, so the assistant's words cannot be found; set a plainer chat_template")
                spans.append((len(before), len(through)))
        return spans

    def __call__(  # type: ignore[override]
        self,
        conversations: Sequence[Sequence[Message]],
        volumes: Any = None,
        generate: bool = True,
        max_length: int | None = None,
    ) -> BatchFeature:
        """A batch: `input_ids`, `attention_mask` (B, L), `pixel_values` (B, 1, D, H, W) where volumes are given, `labels` unless `generate`.

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
        """Rows of different length -> tensors (B, L)."""
        length = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            missing = length - len(row["input_ids"])
            full = {**row, "attention_mask": [1] * len(row["input_ids"])}
            for key, filler in (("input_ids", self.pad_token_id), ("attention_mask", 0), ("labels", IGNORED)):
                filled = [filler] * missing
                batch[key].append(filled + full[key] if left else full[key] + filled)
        return {key: torch.tensor(value) for key, value in batch.items()}

"""Answers that point: a sentence about a finding with a mask is followed by POINT, which points to that mask.

A sentence that is the one of a mask (`Mask.text`) points to that; any other to the masks of the findings that it states, of its side if it
names one. Several masks are one place, their union: a sentence points once.

Shapes: D, H, W voxels; G places of a study.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from med3dvlm.datasets.m3d_seg import side_in
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import SENTENCE_END
from med3dvlm.models.vlm_processor import POINT, UNKNOWN, Message
from med3dvlm.records import Mask, Study
from med3dvlm.reports.findings import find_mentions, finding_of

OPPOSITE = {"left": "right", "right": "left"}
finding_of_name = lru_cache(maxsize=1 << 12)(finding_of)


def named_masks(sentence: str, masks: Mapping[str, Mask]) -> tuple[str, ...]:
    """Return the names of those masks of findings that the sentence is about."""
    found = {name: mask for name, mask in masks.items() if mask.kind == "finding"}
    words = " ".join(sentence.split()).casefold()
    if own := [name for name, mask in found.items() if mask.text and " ".join(mask.text.split()).casefold() == words]:
        return tuple(own)
    stated = {mention.finding for mention in find_mentions(sentence) if mention.state != "absent"}
    other = OPPOSITE.get(side_in(sentence))
    return tuple(name for name, mask in found.items() if finding_of_name(name) in stated and not (other and mask.side == other))


def places(text: str, masks: Mapping[str, Mask]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the ends of the text's sentences that are about masks, with the names of those masks."""
    start = 0
    for end, following in (*(match.span() for match in SENTENCE_END.finditer(text)), (len(text.rstrip()), len(text))):
        if names := named_masks(text[start:end], masks):
            yield end, names
        start = following


class PointingAnswers:
    """Makes the answers about studies of prepared data point."""

    def __init__(self, data: PreparedData) -> None:
        self.data = data
        self._known: dict[tuple[str, str], list[tuple[int, tuple[str, ...]]]] = {}

    def _places(self, study: Study, text: str) -> list[tuple[int, tuple[str, ...]]]:
        if (study.id, text) not in self._known:
            masks = {name: study.masks[name] for name in self.data.mask_names(study)}
            self._known[study.id, text] = list(places(text, masks))
        return self._known[study.id, text]

    def pointing(self, study: Study, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with POINTs in the assistant's."""
        return [
            {**message, "content": self._pointed(study, message["content"])} if message["role"] == "assistant" else message
            for message in messages
        ]

    def _pointed(self, study: Study, text: str) -> str:
        parts, start = [], 0
        for end, _ in self._places(study, text):
            parts.append(text[start:end].replace(POINT, UNKNOWN) + POINT)
            start = end
        return "".join((*parts, text[start:].replace(POINT, UNKNOWN)))

    def row(self, study: Study, conversations: Sequence[Sequence[Message]]) -> dict[str, Any]:
        """Return the row's part about masks: "conversations" that point; "masks" (G, D, H, W) bool; "points", the masks' numbers for each
        conversation.
        """
        named = [
            [names for message in messages if message["role"] == "assistant" for _, names in self._places(study, message["content"])]
            for messages in conversations
        ]
        groups = list(dict.fromkeys(names for each in named for names in each))
        masks = [self.data.masks(study, names).any(dim=0) for names in groups]
        return {
            "conversations": [self.pointing(study, messages) for messages in conversations],
            "masks": torch.stack(masks) if masks else torch.zeros(0, *self.data.processor.size, dtype=torch.bool),
            "points": [[groups.index(names) for names in each] for each in named],
        }

"""The engine answers many as it would answer each alone: whatever joins or leaves the batch, and whatever was read before."""

import random
from typing import Any

import pytest
import torch

from med3dvlm import Med3DChat
from med3dvlm.inference.engine import Request
from med3dvlm.inference.transformers_engine import TransformersEngine
from tests import tiny_parts
from tests.random_chat import SIZE, build


def scans(chat: Med3DChat, count: int) -> list[Any]:
    return [chat.encode(torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(number))) for number in range(count)]


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.mark.parametrize("family", tiny_parts.FAMILIES)
def test_words_are_those_of_ask_alone_in_any_order(family: str) -> None:
    chat = build(family)
    known, order = scans(chat, 3), random.Random(1)
    questions = [
        "Which organ has a lesion?",
        "Is there a pleural effusion?",
        "Where?",
        "How large is the heart, and is it enlarged at all?",
    ]
    cases = [(scan, question, length) for scan in known for question in questions for length in (1, 7, 40)]
    alone = {case[1:] + (id(case[0]),): chat.ask(case[0], case[1], max_new_tokens=case[2]) for case in cases}
    assert len({answer.text for answer in alone.values()}) > 12
    engine = TransformersEngine(chat, slots=5, prefill_tokens=150)
    for _ in range(3):
        order.shuffle(cases)
        streams = []
        for scan, question, length in cases:
            streams += engine.generate([Request(scan, asked(question), length)])
            if order.random() < 0.3:
                streams[order.randrange(len(streams))].result(60)
        for case, stream in zip(cases, streams, strict=True):
            answer, wanted = stream.result(60), alone[case[1:] + (id(case[0]),)]
            assert answer.text == wanted.text
            assert len(answer.tokens) == wanted.tokens
            assert answer.confidence == pytest.approx(wanted.confidence, rel=1e-4)
    assert engine.stats()["reused_tokens"] > engine.stats()["prompt_tokens"]

"""The engine gives the answers of transformers' `generate`, whatever joins or leaves the batch and whatever is reused."""

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch

from med3dvlm import Med3DChat
from med3dvlm.inference.batching import Prefixes
from med3dvlm.inference.engine import Request, Writer
from med3dvlm.inference.transformers_engine import TransformersEngine
from med3dvlm.volume import Volume
from tests import tiny_parts
from tests.random_chat import SIZE, build

QUESTIONS = ("Which organ has a lesion?", "Is there a pleural effusion?", "Where?", "How large is the heart, and is it enlarged at all?")


def scans(chat: Med3DChat, count: int) -> list[Any]:
    return [chat.encode(torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(number))) for number in range(count)]


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def wait_for_end(engine: TransformersEngine) -> None:
    """Wait until the engine has nothing to do."""
    while engine._thread is not None and engine._thread.is_alive():
        engine._thread.join(20)


def alone(chat: Med3DChat, scan: Any, question: str, length: int) -> tuple[str, list[int], list[float]]:
    """Return text, tokens and log probabilities of transformers' `generate` with a batch of one."""
    ids, room = chat.prompt(question, None, length)
    said = chat.model.generate(
        torch.tensor([ids]), image_features=scan, max_new_tokens=room, return_dict_in_generate=True, output_logits=True
    )
    tokens = said.sequences[0].tolist()
    logprobs = [float(step[0].log_softmax(-1)[token]) for step, token in zip(said.logits, tokens, strict=True)]
    return chat.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(), tokens, logprobs


@pytest.mark.parametrize("family", tiny_parts.FAMILIES)
def test_answers_equal_generate_in_any_order(family: str) -> None:
    chat, order = build(family), random.Random(1)
    known = scans(chat, 3)
    cases = [(number, question, length) for number in range(3) for question in QUESTIONS for length in (1, 7, 40)]
    wanted = {case: alone(chat, known[case[0]], *case[1:]) for case in cases}
    assert len({text for text, _, _ in wanted.values()}) > 12
    engine = TransformersEngine(chat, slots=5, prefill_tokens=150)
    for _ in range(3):
        order.shuffle(cases)
        streams = []
        for number, question, length in cases:
            streams += engine.generate([Request(known[number], asked(question), length)])
            if order.random() < 0.3:
                streams[order.randrange(len(streams))].result(60)
        for case, stream in zip(cases, streams, strict=True):
            answer, (text, tokens, logprobs) = stream.result(60), wanted[case]
            assert answer.text == text and [token.id for token in answer.tokens] == tokens
            np.testing.assert_allclose([token.logprob for token in answer.tokens], logprobs, atol=1e-4)  # worst measured: 6e-6
            assert answer.finish == ("stop" if tokens[-1] in chat.ends else "length")
    assert engine.stats()["reused_tokens"] > engine.stats()["prompt_tokens"]


def test_a_short_answer_does_not_wait_for_a_long_one() -> None:
    chat = build("llama")
    chat.ends.clear()
    (scan, other), engine = scans(chat, 2), TransformersEngine(chat)
    (long,) = engine.generate([Request(scan, asked(QUESTIONS[0]), 300)])
    next(iter(long))
    (short,) = engine.generate([Request(other, asked(QUESTIONS[1]), 3)])
    assert len(short.result(60).tokens) == 3 and len(long.result(60).tokens) == 300
    assert short.result().seconds < 0.3 * long.result().seconds


def test_cancelled_and_late_answers_end_and_others_continue() -> None:
    chat = build("qwen2")
    chat.ends.clear()
    (scan,), engine = scans(chat, 1), TransformersEngine(chat, slots=2)
    stays, goes, late, waits = engine.generate(
        [Request(scan, asked(question), 200, seconds=seconds) for question, seconds in zip(QUESTIONS, (None, None, 0.0, None), strict=True)]
    )
    next(iter(goes))
    goes.cancel()
    assert goes.result(60).finish == "cancelled" and 0 < len(goes.result().tokens) < 200
    assert late.result(60).finish == "deadline" and late.result().tokens == ()
    for stream, question in ((stays, QUESTIONS[0]), (waits, QUESTIONS[3])):
        assert [token.id for token in stream.result(60).tokens] == alone(chat, scan, question, 200)[1][:200]
    (running,) = engine.generate([Request(scan, asked(QUESTIONS[0]), 400)])
    next(iter(running))
    engine.close()
    assert running.result(60).finish == "cancelled"
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([Request(scan, asked(QUESTIONS[0]))])


def test_samples_depend_on_the_seed_and_not_on_other_requests() -> None:
    chat = build("qwen2")
    (scan, other), engine = (tuple(level.double() for level in features) for features in scans(chat, 2)), TransformersEngine(chat)
    chat.model.double()  # in float32 a number drawn may lie between two roundings of a sum of probabilities

    def request(seed: int | None, temperature: float = 1.5) -> Request:
        return Request(scan, asked(QUESTIONS[0]), 20, temperature, 0.9, seed)

    by_seed = [engine.generate([request(seed)])[0].result(60).tokens for seed in range(5)]
    beside = engine.generate([*map(request, range(5)), *(Request(other, asked(question), 30, 2.0) for question in QUESTIONS)])
    for one, stream in zip(by_seed, beside, strict=False):
        assert [token.id for token in stream.result(60).tokens] == [token.id for token in one]
    assert len({tuple(token.id for token in tokens) for tokens in by_seed}) > 3
    drawn = set()
    for _ in range(2):  # without a seed, torch's own decides
        torch.manual_seed(7)
        drawn.add(engine.generate([request(None)])[0].result(60).text)
    assert len(drawn) == 1


def test_samples_follow_the_probabilities_of_the_model() -> None:
    """The first tokens of 2000 seeds are compared with the softmax of a forward pass, with temperature and top_p."""
    chat = build("qwen2")
    (scan,), engine = scans(chat, 1), TransformersEngine(chat, slots=64)
    ids, _ = chat.prompt(QUESTIONS[2], None, 1)
    logits = chat.model(torch.tensor([ids]), image_features=scan).logits[0, -1].detach().double()
    probabilities = (logits / 3).softmax(0).sort(descending=True)
    kept = probabilities.values.cumsum(0) - probabilities.values < 0.8
    expected = torch.zeros_like(logits)
    expected[probabilities.indices[kept]] = probabilities.values[kept] / probabilities.values[kept].sum()
    streams = engine.generate([Request(scan, asked(QUESTIONS[2]), 1, 3.0, 0.8, seed) for seed in range(2000)])
    counts = np.bincount([stream.result(60).tokens[0].id for stream in streams], minlength=len(logits)) / 2000
    assert counts[expected.numpy() == 0].sum() == 0
    assert 0.5 * np.abs(counts - expected.numpy()).sum() < 0.15  # total variation


def test_models_that_cannot_share_a_batch_answer_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("med3dvlm.inference.running_batch.packing_obstacle", lambda model: "it goes by the order of tokens")
    chat = build("gpt_neox")
    known, engine = scans(chat, 2), TransformersEngine(chat)
    streams = engine.generate([Request(scan, asked(question), 15) for scan in known for question in QUESTIONS])
    for stream, (scan, question) in zip(streams, [(scan, question) for scan in known for question in QUESTIONS], strict=True):
        assert [token.id for token in stream.result(60).tokens] == alone(chat, scan, question, 15)[1]
    (late,) = engine.generate([Request(known[0], asked(QUESTIONS[0]), 400, seconds=0.05)])
    assert late.result(60).finish in ("deadline", "stop")


def test_published_splice_and_sliding_windows() -> None:
    for settings in ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24, "use_sliding_window": True}, {}):
        chat = build("qwen2", **settings)
        if not settings:
            chat.model.config.image_splice = "published"
        known, engine = scans(chat, 2), TransformersEngine(chat)
        for _ in range(2):
            streams = engine.generate([Request(scan, asked(question), 25) for scan in known for question in QUESTIONS])
            for stream, (scan, question) in zip(streams, [(scan, question) for scan in known for question in QUESTIONS], strict=True):
                assert [token.id for token in stream.result(60).tokens] == alone(chat, scan, question, 25)[1]


def test_a_conversation_reuses_its_earlier_turns() -> None:
    chat = build("llama")
    (scan,), engine = scans(chat, 1), TransformersEngine(chat)
    (first,) = engine.generate([Request(scan, asked(QUESTIONS[0]), 10)])
    said = first.result(60)
    history = [*asked(QUESTIONS[0]), {"role": "assistant", "content": said.text}]
    (second,) = engine.generate([Request(scan, [*history, *asked(QUESTIONS[1])], 10)])
    assert said.reused_tokens == 0 and second.result(60).reused_tokens >= said.prompt_tokens
    (other,) = engine.generate([Request(scan, asked(QUESTIONS[3]), 10)])
    assert chat.processor.num_image_tokens < other.result(60).reused_tokens < said.prompt_tokens


def test_the_memory_of_reused_prefixes_is_bounded() -> None:
    kept, scan = Prefixes(3000), torch.zeros(4)
    for number in range(50):
        kept.add(scan, np.arange(number, number + 8), [[torch.zeros(2, 8, 4), torch.zeros(2, 8, 4)]])
        assert 0 < kept.nbytes <= 3000
    assert kept.find(scan, np.arange(49, 60))[1] == 8 and kept.find(scan, np.arange(8))[1] == 0
    assert kept.find(torch.zeros(4), np.arange(49, 60)) == (None, 0)
    chat = build("qwen2")
    engine = TransformersEngine(chat, prefix_bytes=20_000)
    for number in range(6):
        for stream in engine.generate([Request(scan, asked(f"{number}?"), 5) for scan in scans(chat, 3)]):
            stream.result(60)
    assert engine.stats()["prefix_bytes"] <= 20_000


def test_prefixes_are_kept_as_long_as_their_scan() -> None:
    chat = build("qwen2")
    engine, volume = TransformersEngine(chat), Volume(np.random.default_rng(0).normal(0, 300, SIZE).astype(np.int16), unit="HU")
    (other,), kept = scans(chat, 1), []
    for scan in (other, chat.encode(volume)):
        engine.generate([Request(scan, asked(QUESTIONS[0]), 5)])[0].result(60)
        wait_for_end(engine)
        kept.append(engine.stats()["prefix_bytes"])
    assert 0 < kept[0] < kept[1] and len(chat._encoded) == 1
    del scan
    assert engine.stats()["prefix_bytes"] == kept[1]  # the chat remembers the volume's
    del volume
    assert engine.stats()["prefix_bytes"] == kept[0] and not chat._encoded
    assert engine.generate([Request(other, asked(QUESTIONS[1]), 5)])[0].result(60).reused_tokens


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "must be the user's"),
        ({"temperature": float("nan")}, "must be 0 or more"),
        ({"top_p": 0.0}, "top_p"),
        ({"alternatives": 21}, "0 to 20"),
        ({"stop": ("",)}, "at least one character"),
    ],
)
def test_invalid_requests(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Request(**{"scan": "scan.nii", "messages": asked("?")} | change)


def test_an_invalid_request_raises_in_its_own_stream_only() -> None:
    chat = build("qwen2")
    (scan,), engine = scans(chat, 1), TransformersEngine(chat)
    good, empty, missing = engine.generate([Request(scan, asked("?"), 3), Request(scan, asked(" ")), Request("nowhere.nii", asked("?"))])
    assert good.result(60).tokens
    for stream, words in ((empty, "question is empty"), (missing, "no such file")):
        with pytest.raises(ValueError, match=words):
            list(stream)


def test_requests_waiting_for_the_encoder_end_when_the_engine_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, reading, go_on = build("qwen2"), threading.Event(), threading.Event()
    encode = chat.encode

    def slow(scan: Any) -> Any:
        reading.set()
        go_on.wait(20)
        return encode(scan)

    monkeypatch.setattr(chat, "encode", slow)
    engine = TransformersEngine(chat)
    streams = engine.generate([Request(torch.rand(1, *SIZE), asked("Where?"), 500) for _ in range(3)])
    assert reading.wait(20)
    closing = threading.Thread(target=engine.close)
    closing.start()
    closing.join(0.2)
    go_on.set()
    closing.join(20)
    assert [stream.result(20).finish for stream in streams] == ["cancelled"] * 3
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([Request(torch.rand(1, *SIZE), asked("Where?"))])


def test_an_unbatched_answer_ends_when_the_engine_is_closed() -> None:
    chat = build("qwen2")
    engine = TransformersEngine(chat)
    engine._batch.alone = True
    (stream,) = engine.generate([Request(scans(chat, 1)[0], asked("Where?"), 500)])
    next(iter(stream))
    engine.close()
    assert stream.result(60).finish == "cancelled"
    assert len(stream.result().tokens) < 500


def test_an_error_at_the_end_of_an_answer_ends_the_batch_but_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = build("qwen2")
    engine, scan = TransformersEngine(chat), scans(chat, 1)[0]
    with monkeypatch.context() as broken:
        broken.setattr(engine._batch, "_leave", lambda row: 1 / 0)
        (stream,) = engine.generate([Request(scan, asked("Where?"), 500, seconds=0.05)])
        stream.result(20)
        wait_for_end(engine)
    (stream,) = engine.generate([Request(scan, asked("Where?"), 3)])
    assert stream.result(20).text == chat.ask(scan, "Where?", max_new_tokens=3).text


def test_a_tiny_temperature_gives_the_likeliest_token() -> None:
    chat = build("qwen2")
    engine, scan = TransformersEngine(chat), scans(chat, 1)[0]
    (stream,) = engine.generate([Request(scan, asked("Where?"), 8, temperature=1e-300, seed=1)])
    assert stream.result(20).text == chat.ask(scan, "Where?", max_new_tokens=8).text


def test_an_error_of_one_row_ends_only_this_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer fails at the third token of one answer, and the features of one scan have a wrong shape."""
    chat = build("qwen2")
    chat.ends.clear()
    (scan, other), engine = scans(chat, 2), TransformersEngine(chat)
    wanted = [alone(chat, scan, question, 12)[1] for question in QUESTIONS]
    put = Writer.put

    def broken(writer: Writer, token: Any) -> bool:
        if writer.stream.request.messages[-1]["content"] == QUESTIONS[1] and len(writer.tokens) == 2:
            raise RuntimeError("no such text")
        return put(writer, token)

    monkeypatch.setattr(Writer, "put", broken)
    misfit = tuple(level[:, :, :-1] for level in other)
    *streams, wrong = engine.generate(
        [*(Request(scan, asked(question), 12) for question in QUESTIONS), Request(misfit, asked("Where?"), 12)]
    )
    for number, stream in enumerate(streams):
        if number == 1:
            with pytest.raises(RuntimeError, match="no such text"):
                stream.result(60)
        else:
            assert [token.id for token in stream.result(60).tokens] == wanted[number]
    with pytest.raises(RuntimeError):
        wrong.result(60)

"""The engine on a stand-in for a vLLM server: its answers equal those of the engine on transformers; errors get one sentence.

The last test asks vLLM itself, where MED3DVLM_VLLM_PYTHON names the interpreter of an environment that has it.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from med3dvlm import Med3DChat, cli
from med3dvlm.checkpoints.export import export_language_model, save_language_model
from med3dvlm.inference.engine import Request
from med3dvlm.inference.engines import start_engine
from med3dvlm.inference.vllm_engine import VllmEngine
from med3dvlm.inference.vllm_sources import EngineGone, Server
from tests import random_chat, vllm_stand_in

QUESTIONS = ("Which organ has a lesion?", "Is there a pleural effusion?", "Where?", "How large is the heart, and is it enlarged at all?")


def scan(number: int) -> torch.Tensor:
    return torch.rand(1, *random_chat.SIZE, generator=torch.Generator().manual_seed(number))


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def chat() -> Med3DChat:
    return random_chat.build("qwen2")


@pytest.fixture(scope="module")
def exported(chat: Med3DChat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    save_language_model(chat.model, chat.processor, folder)
    return folder


@pytest.fixture
def server(exported: Path) -> Iterator[SimpleNamespace]:
    with vllm_stand_in.serving(exported) as served:
        yield served


@pytest.fixture
def engine(chat: Med3DChat, server: SimpleNamespace) -> Iterator[VllmEngine]:
    made = VllmEngine(chat, Server(server.url))
    yield made
    made.close()


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_the_exported_language_model_has_equal_logits(family: str, tmp_path: Path) -> None:
    chat = random_chat.build(family)
    for part in (chat.model, chat.processor):
        part.save_pretrained(tmp_path / "model")
    export_language_model(tmp_path / "model", tmp_path / "exported")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "exported"), AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert type(model) is type(chat.model.language_model)
    assert sorted(path.suffix for path in (tmp_path / "exported").iterdir() if path.stat().st_size > 50_000) == [".safetensors"]
    ids, _ = chat.prompt(QUESTIONS[0], None, 8)
    with torch.no_grad():
        embeds = chat.model.embed(torch.tensor([ids]), chat.encode(scan(1)))
        ours = chat.model(torch.tensor([ids]), image_features=chat.encode(scan(1))).logits
        np.testing.assert_array_equal(model(inputs_embeds=embeds).logits, ours)
    assert model.generation_config.eos_token_id == chat.ends and not model.generation_config.do_sample
    words = tokenizer.apply_chat_template(asked("Where?"), add_generation_prompt=True, return_dict=False)
    assert words == chat.processor.encode(asked("Where?"), generate=True, image=False)["input_ids"]


def test_the_exported_tokenizer_has_no_tokens_beyond_the_model(tmp_path: Path) -> None:
    chat = random_chat.build("llama")
    chat.model.language_model.resize_token_embeddings(chat.processor.image_token_id)  # the placeholder lies beyond
    save_language_model(chat.model, chat.processor, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert max(tokenizer.get_vocab().values()) < chat.processor.image_token_id and "<image>" not in tokenizer.get_vocab()
    assert chat.processor.tokenizer("a <|im_start|>b")["input_ids"] == tokenizer("a <|im_start|>b")["input_ids"]


def test_answers_equal_those_of_the_engine_on_transformers(
    chat: Med3DChat, server: SimpleNamespace, engine: VllmEngine, monkeypatch
) -> None:
    encoded, encoder = [], chat.encoder
    monkeypatch.setattr(chat, "encoder", lambda pixels: encoded.append(1) or encoder(pixels))
    known = [chat.encode(scan(number)) for number in range(3)]
    requests = [Request(one, asked(question), 12, alternatives=3) for one in known for question in QUESTIONS]
    for ours, theirs in zip(chat.engine.generate(requests), engine.generate(requests), strict=True):
        wanted, said = ours.result(60), theirs.result(60)
        assert "".join(theirs) == said.text == wanted.text and said.finish == wanted.finish and said.prompt_tokens == wanted.prompt_tokens
        assert [token.id for token in said.tokens] == [token.id for token in wanted.tokens]
        for one, other in zip(said.tokens, wanted.tokens, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)  # worst measured: 2e-6
            assert [id for id, _ in one.alternatives] == [id for id, _ in other.alternatives]
    assert len(encoded) == 3 and engine.stats()["running"] == engine.stats()["waiting"] == 0
    assert {body["temperature"] for body in server.bodies} == {0.0} and server.bodies[-1]["stop_token_ids"] == chat.ends


def test_a_stop_text_ends_the_answer_and_the_request(chat: Med3DChat, server: SimpleNamespace, engine: VllmEngine) -> None:
    known = chat.encode(scan(1))
    whole = engine.generate([Request(known, asked(QUESTIONS[3]), 60)])[0].result(60).text
    stop = whole[len(whole) // 3 : len(whole) // 3 + 3]
    (stream,) = engine.generate([Request(known, asked(QUESTIONS[3]), 60, stop=(stop,))])
    assert "".join(stream) == whole[: whole.index(stop)].rstrip() and stream.result().finish == "stop"


def test_samples_repeat_with_their_seed(chat: Med3DChat, engine: VllmEngine) -> None:
    known = chat.encode(scan(1))
    texts = [
        engine.generate([Request(known, asked(QUESTIONS[0]), 10, temperature=1.5, seed=seed)])[0].result(60).text for seed in (1, 2, 3, 1)
    ]
    assert texts[0] == texts[3] and len(set(texts)) > 1


def test_cancelled_and_late_requests_are_ended_on_the_server(chat: Med3DChat, server: SimpleNamespace, monkeypatch) -> None:
    monkeypatch.setattr(chat, "ends", [])
    engine, known = VllmEngine(chat, Server(server.url)), chat.encode(scan(1))
    goes, late = engine.generate([Request(known, asked(QUESTIONS[0]), 400), Request(known, asked(QUESTIONS[1]), 400, seconds=0.3)])
    next(iter(goes))
    goes.cancel()
    assert goes.result(60).finish == "cancelled" and 0 < len(goes.result().tokens) < 400
    assert late.result(60).finish == "deadline"
    (running,) = engine.generate([Request(known, asked(QUESTIONS[0]), 400)])
    next(iter(running))
    engine.close()
    assert running.result(60).finish == "cancelled"
    ends = time.monotonic() + 20
    while server.left < 3:  # a connection that was closed is seen when the next token is sent
        assert time.monotonic() < ends
        time.sleep(0.02)
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([Request(known, asked(QUESTIONS[0]))])


def test_a_server_that_ends_during_an_answer(chat: Med3DChat, server: SimpleNamespace, engine: VllmEngine) -> None:
    known = chat.encode(scan(1))
    server.die_after = server.written + 4
    (stream,) = engine.generate([Request(known, asked(QUESTIONS[0]), 60)])
    with pytest.raises(EngineGone, match=r"The vLLM server at http://127.0.0.1:\d+ (went away in the middle of|ended) an answer"):
        list(stream)
    server.die_after = None
    assert engine.generate([Request(known, asked(QUESTIONS[0]), 5)])[0].result(60).tokens


def test_an_invalid_request_raises_in_its_own_stream_only(chat: Med3DChat, exported: Path) -> None:
    with vllm_stand_in.serving(exported, context=60) as server:
        engine = VllmEngine(chat, Server(server.url))
        good, empty, long = engine.generate([Request(chat.encode(scan(1)), asked(text), 500) for text in ("Where?", " ", "why " * 30)])
        assert good.result(60).finish == "length" and good.result().prompt_tokens + len(good.result().tokens) == 60
        for stream, words in ((empty, "question is empty"), (long, "takes 60")):
            with pytest.raises(ValueError, match=words):
                stream.result(60)
        engine.close()


@pytest.mark.parametrize("case", ["nobody", "no embeddings", "another width", "other weights", "no key", "no vLLM", "no address"])
def test_a_server_that_cannot_be_used_is_refused_before_the_first_request(
    case: str, chat: Med3DChat, exported: Path, tmp_path: Path
) -> None:
    words = {
        "nobody": r"at http://127.0.0.1:\d+ does not answer \(ConnectError\); start one with: vllm serve",
        "no embeddings": "does not take embeddings; start it with --enable-prompt-embeds",
        "another width": f"serves '{tmp_path}', which is not this model's language model: its embeddings are not 32 wide",
        "other weights": "is not this model's language model: the log probabilities of its next words differ by",
        "no key": "needs a key; put it into the environment variable VLLM_API_KEY",
        "no vLLM": r"refuses the request \(404\)",
        "no address": "'127.0.0.1:8000' is no address of a vLLM server",
    }[case]
    folder, settings = exported, {"no embeddings": {"prompt_embeds": False}, "no key": {"key": "secret"}}.get(case, {})
    if case in ("another width", "other weights"):
        other = random_chat.build("llama")
        for parameter in other.model.language_model.parameters():
            parameter.data *= 1.2
        folder = tmp_path
        if case == "another width":
            other.model.language_model = AutoModelForCausalLM.from_config(
                type(other.model.language_model.config)(**other.model.language_model.config.to_dict() | {"hidden_size": 48, "head_dim": 24})
            )
        save_language_model(other.model, other.processor, folder)
    with vllm_stand_in.serving(folder, **settings) as server:
        url = {"no vLLM": f"{server.url}/elsewhere", "no address": "127.0.0.1:8000"}.get(case, server.url)
        if case == "nobody":
            server.stop()
            url = "http://127.0.0.1:9"
        with pytest.raises((ValueError, EngineGone), match=words) as raised:
            VllmEngine(chat, Server(url))
    assert "\n" not in str(raised.value)


def test_a_key_is_sent(chat: Med3DChat, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with vllm_stand_in.serving(exported, key="secret") as server:
        VllmEngine(chat, Server(server.url)).close()


def test_the_choice_of_the_engine(chat: Med3DChat, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "engine", chat.engine)
    assert start_engine(chat, None, None) is chat.engine
    with pytest.raises(ValueError, match="leave out one of the two"):
        start_engine(chat, "transformers", server.url)
    with pytest.raises(ValueError, match="vllm is not installed here; install it by: pip install vllm"):
        start_engine(chat, "vllm", None)
    wanted = chat.ask(scan(2), QUESTIONS[0], max_new_tokens=12)
    engine = start_engine(chat, None, f"{server.url}/v1/")
    assert chat.ask(scan(2), QUESTIONS[0], max_new_tokens=12).text == wanted.text and len(server.bodies) > 3
    engine.close()


def test_the_command_line_asks_a_server(chat: Med3DChat, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in (chat.model, chat.processor):
        part.save_pretrained(tmp_path / "model")
    nibabel.save(
        nibabel.Nifti1Image(np.random.default_rng(0).normal(0, 300, (30, 20, 10)).astype(np.int16), np.eye(4)), tmp_path / "scan.nii"
    )
    words = ["ask", str(tmp_path / "model"), str(tmp_path / "scan.nii"), QUESTIONS[0], "--max-new-tokens", "9"]
    assert cli.main(words) == 0
    wanted = capsys.readouterr().out
    with vllm_stand_in.serving(exported) as server:
        assert cli.main([*words, "--vllm-url", server.url]) == 0
        assert capsys.readouterr().out == wanted and len(server.bodies) == 4
    assert cli.main([*words, "--engine", "vllm"]) == 2 and "vllm is not installed here" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "alone")]) == 0
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {path.name for path in exported.iterdir()}
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "alone")]) == 2 and "would be overwritten" in capsys.readouterr().err

"""The server by OpenAI's client: answers equal to `ask`, whole and streamed, alone and concurrently."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from med3dvlm import read_volume
from med3dvlm.prompts import REPORT_PROMPTS, RESEARCH_NOTICE
from med3dvlm.reports.findings import FINDINGS_CT_RATE, finding_states
from med3dvlm.search import Embedder

from .conftest import about, data_url, serving

QUESTIONS = ("Which organ has a lesion?", "Is there an effusion?", "Where is it, and how large?")


def test_whole_and_streamed_answers_equal_ask(server, client: openai.OpenAI, upload: Callable[[int], str], scan) -> None:
    id, chat = upload(1), server.chat
    history = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Left."}]
    wanted = chat.ask(read_volume(scan(1)), QUESTIONS[0], max_new_tokens=20)
    answer = client.chat.completions.create(model="tiny", messages=about(id, QUESTIONS[0]), max_tokens=20)
    assert answer.choices[0].message.content == wanted.text and wanted.text
    assert answer.usage.completion_tokens == wanted.tokens
    assert answer.usage.prompt_tokens == len(chat.prompt(QUESTIONS[0], None, 20)[0])
    assert answer.choices[0].finish_reason == ("length" if wanted.tokens == 20 else "stop")
    assert answer.med3dvlm["notice"] == RESEARCH_NOTICE
    assert answer.med3dvlm["confidence"] == pytest.approx(wanted.confidence, abs=1e-3)
    wanted = chat.ask(read_volume(scan(1)), QUESTIONS[1], history, max_new_tokens=20)
    messages = [*about(id, history[0]["content"]), history[1], {"role": "user", "content": QUESTIONS[1]}]
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 20}
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == wanted.text
    assert len(chunks) > 6
    assert chunks[-2].choices[0].finish_reason and chunks[-1].usage.completion_tokens == wanted.tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > chat.processor.num_image_tokens


def test_scans_in_every_kind_of_message_part(client: openai.OpenAI, upload, scan) -> None:
    id, data = upload(2), data_url(scan(2))
    parts = [
        {"type": "scan", "scan": {"id": id}},
        {"type": "scan", "scan": {"url": data}},
        {"type": "image_url", "image_url": {"url": f"scan:{id}"}},
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "file", "file": {"file_id": id}},
        {"type": "file", "file": {"file_data": data.partition(",")[2], "filename": "a.nii.gz"}},
    ]
    texts = set()
    for part in parts:
        messages = [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}, part]}]
        texts.add(client.chat.completions.create(model="tiny", messages=messages, max_tokens=12).choices[0].message.content)
    assert len(texts) == 1


def test_logprobs_equal_a_plain_loop(server, client: openai.OpenAI, upload, scan) -> None:
    id, chat = upload(3), server.chat
    answer = client.chat.completions.create(
        model="tiny", messages=about(id, QUESTIONS[0]), max_tokens=6, logprobs=True, top_logprobs=3
    ).choices[0]
    ids, features = chat.prompt(QUESTIONS[0], None, 6)[0], chat.encode(read_volume(scan(3)))
    for token in answer.logprobs.content:
        with torch.no_grad():
            steps = chat.model(torch.tensor([ids]), image_features=features).logits[0, -1].log_softmax(-1)
        values, likeliest = steps.topk(3)
        np.testing.assert_allclose([each.logprob for each in token.top_logprobs], values, rtol=1e-4)
        assert token.logprob == token.top_logprobs[0].logprob
        assert token.token == chat.processor.tokenizer.decode(likeliest[:1])
        ids = [*ids, int(likeliest[0])]


def test_concurrent_clients_get_the_answers_of_single_ones(server, client: openai.OpenAI, upload) -> None:
    ids = [upload(number) for number in range(4)]
    cases = [(id, question, length) for id in ids for question in QUESTIONS for length in (5, 30)]

    def ask(case: tuple[str, str, int]) -> str:
        messages = about(case[0], case[1])
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=case[2]).choices[0].message.content or ""

    alone = [ask(case) for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        assert list(pool.map(ask, cases)) == alone
    assert len(set(alone)) > 8


def test_samples_depend_on_the_seed_alone(client: openai.OpenAI, upload) -> None:
    id = upload(1)

    def draw(seed: int) -> str:
        answer = client.chat.completions.create(model="tiny", messages=about(id, "Why?"), max_tokens=12, temperature=2, seed=seed)
        return answer.choices[0].message.content or ""

    seeds = [*range(6)] * 2
    alone = [draw(seed) for seed in seeds[:6]]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(draw, seeds)) == alone * 2
    assert len(set(alone)) > 3


def test_a_stop_text_ends_the_answer_before_it(server, client: openai.OpenAI, upload) -> None:
    id = upload(1)
    whole = client.chat.completions.create(model="tiny", messages=about(id, QUESTIONS[2]), max_tokens=30).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="tiny", messages=about(id, QUESTIONS[2]), max_tokens=30, stop=[stop, "@@@"], stream=stream
        )
        said = "".join(chunk.choices[0].delta.content or "" for chunk in answer) if stream else answer.choices[0].message.content
        assert said == whole[: whole.index(stop)].rstrip()


def test_reports_findings_embeddings_and_models(server, client: openai.OpenAI, upload, scan) -> None:
    id, chat = upload(5), server.chat
    with httpx.Client(base_url=server.address, trust_env=False, timeout=60) as http:
        report = http.post("/v1/reports", json={"scan": {"id": id}, "max_tokens": 30}).json()
        assert report["text"] == chat.ask(read_volume(scan(5)), REPORT_PROMPTS[0], max_new_tokens=30).text
        assert report["notice"] == RESEARCH_NOTICE and report["usage"]["completion_tokens"] == 30
        found = http.post("/v1/findings", json={"scan": {"id": id}, "max_tokens": 30}).json()
        assert found["findings"] == finding_states(report["text"]) and found["probabilities"] is None
        text = "There is a pleural effusion. No cardiomegaly."
        stated = http.post("/v1/findings", json={"text": text}).json()
        assert stated["findings"] == {"pleural_effusion": "present", "cardiomegaly": "absent"}
        healthy = http.get("/healthz")
        assert healthy.json()["status"] == "ok" and healthy.headers["X-Research-Notice"] == RESEARCH_NOTICE
        counted = http.get("/metrics").text
    assert 'med3dvlm_requests_total{path="/v1/reports",status="200"} 1.0' in counted
    assert "med3dvlm_generated_tokens_total" in counted and "med3dvlm_first_token_seconds_bucket" in counted
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    embedded = client.embeddings.create(model="tiny", input=[{"type": "scan", "scan": {"id": id}}]).data[0].embedding  # type: ignore[list-item]
    levels = chat.encode(read_volume(scan(5)))
    np.testing.assert_allclose(embedded, torch.cat([level.mean(1) for level in levels], 1)[0], rtol=1e-5)


def test_findings_have_probabilities_and_texts_embeddings_with_a_contrastive_model(tiny_models, tmp_path: Path, scan) -> None:
    embedder = Embedder(tiny_models.clip, "cpu")
    with serving(tmp_path, embedder=embedder) as served, httpx.Client(base_url=served.address, trust_env=False, timeout=60) as http:
        with scan(5).open("rb") as file:
            id = http.post("/v1/scans", files={"file": ("a.nii.gz", file)}).json()["id"]
        found = http.post("/v1/findings", json={"scan": {"id": id}, "max_tokens": 3}).json()["probabilities"]
        texts = ["There is a pleural effusion.", "Normal."]
        sent = http.post("/v1/embeddings", json={"input": [*texts, {"type": "scan", "scan": {"id": id}}]}).json()["data"]
    *words, image = (np.array(each["embedding"]) for each in sent)
    np.testing.assert_allclose(words, embedder.texts(texts), rtol=1e-5)
    volume = embedder.volumes(embedder.processor.image_processor(read_volume(scan(5)))["pixel_values"])[0]
    np.testing.assert_allclose(image, volume, rtol=1e-5)
    # Of each finding, by hand: the softmax of two prompts, at the model's temperature
    assert list(found) == list(FINDINGS_CT_RATE)
    for name in FINDINGS_CT_RATE[::6]:
        spelled = name.replace("_", " ").capitalize()
        pair = embedder.texts([f"{spelled} is present.", f"{spelled} is not present."]).double() @ volume.double()
        scale = embedder.model.logit_scale.exp().item()
        assert found[name] == pytest.approx(float((scale * pair).softmax(0)[0]), abs=1e-5)

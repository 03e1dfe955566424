"""Clients that disconnect, and servers that are stopped or killed: no answer continues and no file is left."""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import openai
import pytest

from med3dvlm import read_volume
from med3dvlm.checkpoints.export import save_language_model
from med3dvlm.serving.server import PRIVATE
from tests import launching, random_chat, vllm_stand_in

from .conftest import about, serving


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_leaves_the_batch(server, client: openai.OpenAI, upload, stream: bool) -> None:
    id, steps = upload(0), []

    def slow(*_: object) -> None:
        steps.append(time.sleep(0.02))

    handle = server.chat.model.language_model.model.register_forward_pre_hook(slow)
    try:
        body = {"messages": about(id, "Where?"), "max_tokens": 300, "stream": stream, "temperature": 2, "seed": 3}
        with httpx.Client(base_url=server.address, trust_env=False, timeout=httpx.Timeout(60, read=60 if stream else 0.5)) as http:
            if stream:
                with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                    lines = answer.iter_lines()
                    for _ in range(6):
                        next(lines)
                    assert server.engine.stats()["running"] == 1
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post("/v1/chat/completions", json=body)
        wait_for(lambda: server.engine.stats()["running"] == 0)
        assert 2 < len(steps) < 100
    finally:
        handle.remove()
    assert client.chat.completions.create(model="tiny", messages=about(id, "Where?"), max_tokens=3).choices


PROGRAM = """
import sys, time, torch
from med3dvlm import programs
from med3dvlm.inference import running_batch
choose = running_batch.choose
def slow(*arguments):
    time.sleep(0.02)
    return choose(*arguments)
running_batch.choose = slow
sys.exit(programs.run("med3dvlm.serving.server", sys.argv[1:], "med3dvlm serve"))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_server_that_is_stopped_while_answering(tmp_path: Path, scan, free_port: str, how: signal.Signals) -> None:
    """It ends the answer with an error and deletes its folder; the folder of a killed server is deleted by the next."""
    chat = random_chat.build("qwen2")
    chat.ends = []
    for part in (chat.model, chat.processor):
        part.save_pretrained(tmp_path / "model")
    temporary, log = tmp_path / "temporary", tmp_path / "log"
    temporary.mkdir()

    def start() -> BaseProcess:
        words = ["-c", PROGRAM, tmp_path / "model", "--port", free_port, "--name", "tiny"]
        process = launching.start(*words, log=log, TMPDIR=str(temporary))

        def up() -> bool:
            assert process.is_alive(), log.read_text()
            try:
                return httpx.get(f"http://127.0.0.1:{free_port}/healthz", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(up)
        return process

    process = start()
    assert "serves tiny on" in log.read_text()
    (folder,) = temporary.glob(f"{PRIVATE}*")
    with httpx.Client(base_url=f"http://127.0.0.1:{free_port}", trust_env=False, timeout=60) as http:
        with scan(0).open("rb") as file:
            id = http.post("/v1/scans", files={"file": ("Doe_Jane.nii.gz", file)}).json()["id"]
        assert list(folder.iterdir()) == []
        body = {"messages": about(id, "Where?"), "max_tokens": 250, "stream": True, "temperature": 2, "seed": 3}
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            said = [next(lines) for _ in range(6)]
            if how is signal.SIGKILL:
                (folder / "Doe_Jane.dcm").touch()
            os.kill(process.pid, how)
            if how is not signal.SIGKILL:
                said += list(lines)
                assert "The server is being stopped" in "".join(said) and "[DONE]" not in "".join(said)
    process.join(60)
    assert process.exitcode == (-how if how is signal.SIGKILL else 0)
    if how is signal.SIGKILL:
        assert folder.exists()
        process = start()
        assert not folder.exists()
        process.terminate()
        process.join(60)
    assert "Traceback" not in log.read_text() and "Where" not in log.read_text()
    assert not list(temporary.glob(f"{PRIVATE}*")) and tempfile.gettempdir() != str(temporary)


def test_a_vllm_server_that_ends_and_returns(tmp_path: Path, scan) -> None:
    """The server answers by a vLLM server, returns an error when that has ended, and continues when it is back."""
    chat = random_chat.build("qwen2")
    save_language_model(chat.model, chat.processor, tmp_path / "exported")
    with vllm_stand_in.serving(tmp_path / "exported") as elsewhere, serving(tmp_path, chat=chat, vllm_url=elsewhere.url) as served:
        with httpx.Client(base_url=served.address, trust_env=False, timeout=60) as http, scan(0).open("rb") as file:
            id = http.post("/v1/scans", files={"file": ("a.nii.gz", file)}).json()["id"]
            body = {"messages": about(id, "Where?"), "max_tokens": 9}
            wanted = chat.ask(read_volume(scan(0)), "Where?", max_new_tokens=9).text
            assert http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == wanted
            elsewhere.die_after = elsewhere.written + 3
            gone = http.post("/v1/chat/completions", json=body)
            assert gone.status_code == 503 and "ask again when it is back" in gone.text and elsewhere.url not in gone.text
            assert "engine_gone" in http.post("/v1/chat/completions", json=body | {"stream": True}).text
            elsewhere.die_after = None
            assert http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == wanted

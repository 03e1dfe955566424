"""The server on a free port of this machine, with a small random model, and scans to send."""

import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import openai
import pytest
import uvicorn

from med3dvlm.inference import vllm_sources
from med3dvlm.inference.engine import Engine
from med3dvlm.inference.transformers_engine import TransformersEngine
from med3dvlm.inference.vllm_engine import VllmEngine
from med3dvlm.serving.server import Server, build
from tests import random_chat


@contextmanager
def serving(folder: Path, chat: Any = None, vllm_url: str | None = None, **settings: Any) -> Iterator[SimpleNamespace]:
    """Run a server with these settings of `build`; yield its parts and its address."""
    chat = chat or random_chat.build("qwen2")
    engine: Engine = TransformersEngine(chat, 8) if vllm_url is None else VllmEngine(chat, vllm_sources.Server(vllm_url))
    app = build(chat, engine, folder, "tiny", **settings)
    server = Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False), engine)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        address = f"http://127.0.0.1:{port}"
        yield SimpleNamespace(chat=chat, engine=engine, folder=folder, server=server, address=address, port=port)
    finally:
        server.should_exit = True
        thread.join(20)
        engine.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    with serving(tmp_path_factory.mktemp("uploads")) as served:
        yield served


@pytest.fixture
def client(server: SimpleNamespace) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """scan(number) writes a NIfTI in Hounsfield units, different for each number, with a patient's name in its file name."""

    def write(number: int) -> Path:
        array = np.random.default_rng(number).integers(-1000, 1000, (30, 20, 10 + number % 7)).astype(np.int16)
        path = tmp_path_factory.mktemp("scans") / "Doe_Jane.nii.gz"
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.5, 1.0])), path)
        return path

    return write


@pytest.fixture
def upload(server: SimpleNamespace, scan: Callable[[int], Path]) -> Callable[[int], str]:
    """upload(number) sends a scan to the server and returns its id."""
    import httpx

    def send(number: int = 0) -> str:
        with scan(number).open("rb") as file:
            answer = httpx.post(f"{server.address}/v1/scans", files={"file": ("Doe_Jane.nii.gz", file)}, trust_env=False, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    return send


def data_url(path: Path) -> str:
    return f"data:application/gzip;base64,{base64.b64encode(path.read_bytes()).decode()}"


def about(id: str, question: str) -> list[dict[str, Any]]:
    """Return the messages of a question about a scan."""
    return [{"role": "user", "content": [{"type": "scan", "scan": {"id": id}}, {"type": "text", "text": question}]}]

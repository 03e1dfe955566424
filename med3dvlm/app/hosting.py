"""Start-up steps shared by all servers: check the port, load the model, make a private folder."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

HERE_ONLY = ("127.0.0.1", "localhost", "::1")


@contextmanager
def private(prefix: str) -> Iterator[Path]:
    """Make a temporary folder for this user alone and delete it at the end. Its name holds `prefix` and the process id, by which folders of
    killed servers are found and deleted too.
    """
    for stale in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        process = stale.name.removeprefix(prefix).partition("-")[0]
        if process.isdigit() and stale.stat().st_uid == os.getuid() and not psutil.pid_exists(int(process)):
            shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as folder:
        yield Path(folder)


def check_free(host: str, port: int) -> None:
    """Raise ValueError where nothing can listen on this host and port."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port} is not a port; ports go from 1 to 65535.")
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ValueError(f"Nothing can listen on {host}, port {port} ({error.strerror}); name another one by --port.") from None


def load(model: Path, quantize: str | None = None) -> Any:
    """Load the model. Raises FileNotFoundError or ValueError for a folder without one, or with another kind of model."""
    if model.is_file():
        raise FileNotFoundError(f"{model} is a file; give the directory of a trained model.")
    if not model.is_dir():
        raise FileNotFoundError(f"There is no model directory {model}; train one with `make demo`.")
    if not any(path.suffix in (".safetensors", ".bin") for path in model.iterdir()):
        raise FileNotFoundError(f"{model} holds no weights (*.safetensors); give a trained model.")
    from med3dvlm.allocator import keep_freed_memory
    from med3dvlm.inference.chat import Med3DChat

    keep_freed_memory()
    return Med3DChat.from_pretrained(model, quantize=quantize)

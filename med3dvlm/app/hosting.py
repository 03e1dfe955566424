"""What every server of ours does first: find a free port, load the model, and have a private folder that goes with it."""

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
    """A temporary folder for this user alone, deleted at the end. Its name begins with `prefix` and the process, so that what a server
    that was killed left of its own is found, and deleted, too."""
    for stale in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        process = stale.name.removeprefix(prefix).partition("-")[0]
        if process.isdigit() and stale.stat().st_uid == os.getuid() and not psutil.pid_exists(int(process)):
            shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as folder:
        yield Path(folder)


def check_free(host: str, port: int) -> None:
    """Raises ValueError, one sentence, where nothing can listen there."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port} is not a port; ports go from 1 to 65535.")
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ValueError(f"Nothing can listen on {host}, port {port} ({error.strerror}); name another one by --port.") from None


def load(model: Path) -> Any:
    """The model, loaded once. Raises FileNotFoundError or ValueError, one sentence, for a directory without one or of another kind."""
    if model.is_file():
        raise FileNotFoundError(f"{model} is a file; give the directory of a trained model.")
    if not model.is_dir():
        raise FileNotFoundError(f"There is no model directory {model}; train one with `make demo`.")
    if not any(path.suffix in (".safetensors", ".bin") for path in model.iterdir()):
        raise FileNotFoundError(f"{model} holds no weights (*.safetensors); give a trained model.")
    from med3dvlm.allocator import keep_freed_memory
    from med3dvlm.inference.chat import Med3DChat

    keep_freed_memory()
    return Med3DChat.from_pretrained(model)

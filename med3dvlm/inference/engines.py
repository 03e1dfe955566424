"""Which engine answers: `--engine` and `--vllm-url` of every command that asks a model. Imports at its top only what starts at once."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from med3dvlm.inference.chat import Med3DChat
    from med3dvlm.inference.engine import Engine

ENGINES = ("transformers", "vllm")


def add_engine(add: Callable[..., argparse.Action]) -> None:
    """Add the options of the engine by a parser's `add_argument`."""
    add("--engine", choices=ENGINES, help="what generates (default: transformers, or vllm where --vllm-url is given)")
    add("--vllm-url", metavar="URL", help="a vLLM server of this model's language model (`med3dvlm export`), as http://127.0.0.1:8000")
    add("--quantize", metavar="METHOD", help="hold the language model in 8 or 4 bits: int8 or nf4 (default: as it is stored)")


def check_engine(engine: str | None, url: str | None, quantize: str | None = None) -> None:
    """Raise ValueError, one sentence, where the options cannot be: before a model is loaded."""
    if url is not None:
        from med3dvlm.inference.vllm_sources import check_url

        check_url(url)
        if engine == "transformers":
            raise ValueError("--vllm-url names a vLLM server, which --engine transformers does not ask; leave out one of the two.")
    elif engine == "vllm":
        from med3dvlm.inference.vllm_sources import check_installed

        check_installed()
    if quantize is not None:
        from med3dvlm.models.quantized import require_quantization

        if url is not None or engine == "vllm":
            raise ValueError(
                "--quantize is for the transformers engine, while vLLM quantises by its own options; leave out one of the two."
            )
        require_quantization(quantize)


def start_engine(chat: "Med3DChat", engine: str | None, url: str | None, slots: int | None = None, **options: Any) -> "Engine":
    """Start an engine and make a chat answer with it.

    Args:
        engine: of ENGINES; by default vllm where there is a URL.
        url: of a vLLM server; without, vLLM runs in this process, on a copy of the language model in a temporary folder.
        slots: answers that are written at a time, which vLLM decides for itself.
        options: of vLLM in this process, see AsyncEngineArgs.
    """
    check_engine(engine, url)
    if url is not None:
        from med3dvlm.inference.vllm_engine import VllmEngine
        from med3dvlm.inference.vllm_sources import Server

        chat.engine = VllmEngine(chat, Server(url))
    elif engine == "vllm":
        from med3dvlm.checkpoints.export import save_language_model
        from med3dvlm.inference.vllm_engine import VllmEngine
        from med3dvlm.inference.vllm_sources import Local

        with tempfile.TemporaryDirectory(prefix="med3dvlm-vllm-") as folder:
            save_language_model(chat.model, chat.processor, Path(folder))
            chat.engine = VllmEngine(chat, Local(Path(folder), chat.model.dtype, **options))  # it has read the folder then
    elif slots is not None:
        from med3dvlm.inference.transformers_engine import TransformersEngine

        chat.engine = TransformersEngine(chat, slots)
    return chat.engine

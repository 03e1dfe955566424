"""Turn an engine's stream into an answer over HTTP: whole, or piece by piece, and ended when the client goes away."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from med3dvlm.app.turns import error_message, log
from med3dvlm.inference.engine import Delta, Engine, Generation, Request, Stream
from med3dvlm.serving.errors import Refused, unusable
from med3dvlm.serving.metrics import Metrics
from med3dvlm.serving.openai import FINISH, about, logprobs, usage
from med3dvlm.serving.places import Pointer

GONE = Refused(503, "The language model's server does not answer; ask again when it is back.", code="engine_gone")
STOPPED = Refused(503, "The server is being stopped before the answer is complete; ask again when it is back.", code="server_stopped")
News = tuple[list[Delta], Generation | BaseException | None]


class Answers:
    """Asks the engine, unless `max_waiting` requests wait already."""

    def __init__(self, engine: Engine, metrics: Metrics, max_waiting: int) -> None:
        self.engine, self.metrics, self.max_waiting = engine, metrics, max_waiting

    async def ask(self, request: Request) -> Stream:
        """Submit a request to the engine; raises Refused where too many wait."""
        if self.engine.stats()["waiting"] >= self.max_waiting:
            raise Refused(429, f"{self.max_waiting} requests wait already; try again in a moment.", code="queue_full")
        try:
            (stream,) = await run_in_threadpool(self.engine.generate, [request])
        except RuntimeError:  # it is closed
            raise STOPPED from None
        return stream

    async def follow(self, http: HttpRequest, stream: Stream) -> AsyncIterator[News]:
        """Yield new parts as they come, then the outcome. The answer ends when the client goes away, or the loop is left."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(changed.set)

        async def gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass
            stream.cancel()

        watching = asyncio.create_task(gone())
        stream.listen(tell)
        try:
            while True:
                await changed.wait()
                changed.clear()
                news, outcome = stream.take()
                if news or outcome is not None:
                    yield news, outcome
                if outcome is not None:
                    return
        finally:
            watching.cancel()
            stream.cancel()

    def checked(self, outcome: Generation | BaseException) -> Generation:
        """Return the answer. Raises Refused where there is none."""
        if isinstance(outcome, ValueError):
            raise unusable(outcome, "messages") from None
        if isinstance(outcome, ConnectionError):
            log(outcome)
            raise GONE from None
        if isinstance(outcome, Exception):
            raise Refused(500, error_message(outcome)) from None
        if isinstance(outcome, BaseException):
            raise outcome
        self.metrics.answered(outcome)
        if outcome.finish == "cancelled":
            raise STOPPED
        return outcome

    async def whole(self, http: HttpRequest, request: Request) -> Generation:
        """Return the whole answer. Raises Refused where there is none."""
        outcome = None
        async for news in self.follow(http, await self.ask(request)):
            outcome = news[1]
        assert outcome is not None
        return self.checked(outcome)


class Completion:
    """One chat completion in OpenAI's form."""

    def __init__(self, answers: Answers, model: str, tokenizer: Any, ends: Sequence[int], pointer: Pointer) -> None:
        self.answers, self.model, self.tokenizer, self.ends, self.pointer = answers, model, tokenizer, ends, pointer
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    async def whole(self, http: HttpRequest, request: Request, with_logprobs: bool) -> dict[str, Any]:
        answer = await self.answers.whole(http, request)
        listed = logprobs(answer.tokens, self.tokenizer, self.ends) if with_logprobs else None
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": listed, "finish_reason": FINISH[answer.finish]}
        return self._body("chat.completion", [choice]) | {"usage": usage(answer), "med3dvlm": await self._about(request, answer)}

    async def streamed(self, http: HttpRequest, request: Request, with_logprobs: bool, with_usage: bool) -> Response:
        """Return server-sent events. An error in the request is raised before the first."""
        news = self.answers.follow(http, await self.answers.ask(request))
        first = await anext(news)
        if isinstance(first[1], BaseException) or (first[1] is not None and first[1].finish == "cancelled"):
            self.answers.checked(first[1])
        events = self._events(request, first, news, with_logprobs, with_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def _about(self, request: Request, answer: Generation) -> dict[str, Any]:
        return about(answer, self.pointer.scan.outside) | await self.pointer.places(request, answer)

    async def _events(
        self, request: Request, first: News, rest: AsyncIterator[News], with_logprobs: bool, with_usage: bool
    ) -> AsyncIterator[str]:
        try:
            yield self._event({"role": "assistant", "content": ""})
            news: News | None = first
            while news is not None:
                deltas, outcome = news
                for delta in deltas:
                    listed = logprobs(delta.tokens, self.tokenizer, self.ends) if with_logprobs else None
                    if delta.text or (listed and listed["content"]):
                        yield self._event({"content": delta.text}, listed)
                if outcome is not None:
                    answer = self.answers.checked(outcome)
                    yield self._event({}, finish=FINISH[answer.finish], more={"med3dvlm": await self._about(request, answer)})
                    if with_usage:
                        yield _sent(self._body("chat.completion.chunk", []) | {"usage": usage(answer)})
                    yield "data: [DONE]\n\n"
                news = await anext(rest, None)
        except Refused as refused:
            yield _sent(refused.body())
        finally:
            await rest.aclose()  # type: ignore[attr-defined]

    def _event(
        self, delta: dict[str, Any], listed: dict[str, Any] | None = None, finish: str | None = None, more: dict[str, Any] | None = None
    ) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": listed, "finish_reason": finish}
        return _sent(self._body("chat.completion.chunk", [choice]) | (more or {}))

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _sent(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

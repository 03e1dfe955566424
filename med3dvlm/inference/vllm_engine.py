"""The engine on vLLM, for many users: our encoder and projector make the embeddings of a prompt, vLLM writes the answer.

    chat.engine = VllmEngine(chat, Server("http://127.0.0.1:8000"))      # vllm serve FOLDER --enable-prompt-embeds, of med3dvlm export
    chat.engine = VllmEngine(chat, Local(folder, chat.model.dtype))      # vLLM in this process

Scans are encoded once, here; batches, memory and the reuse of what was read are vLLM's. Greedy words are those of the other engine up to near-ties;
drawn ones are as reproducible as vLLM's seeds are, and differ from the other engine's.

Shapes: L tokens of a prompt; E width of the language model; V vocabulary.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from med3dvlm.inference.engine import Generation, Request, Stream, Writer, seed_of
from med3dvlm.inference.vllm_sources import Asked, EngineGone, EngineRefused, Source
from med3dvlm.prompts import REPORT_PROMPTS

if TYPE_CHECKING:
    from med3dvlm.inference.chat import Med3DChat

PATIENCE = 0.1  # seconds after which it is seen that an answer is to end, while no token comes
PROBES = ("Hello.", "Which organ has a lesion?", REPORT_PROMPTS[0])
PROBED = 5  # likeliest tokens that are compared after each of them
MAX_DIFFERENCE = 0.5  # of their log probabilities, in the mean: quantised weights differ by less, another model's by more


class VllmEngine:
    """Answers with a Med3DChat's encoder and projector, and the language model of a source.

    Raises:
        EngineGone: the source does not answer.
        ValueError: it takes no embeddings, or is another model than the chat's.
    """

    def __init__(self, chat: "Med3DChat", source: Source) -> None:
        self.chat, self.source = chat, source
        self._lock = Lock()
        self._closed = False
        self._running: dict[Stream, Future[None]] = {}
        self._counts = {"prompt_tokens": 0, "reused_tokens": 0, "generated_tokens": 0}
        self._writing: WeakSet[Stream] = WeakSet()  # those that have a token
        self._reading = ThreadPoolExecutor(1, "med3dvlm-read")  # the encoder's memory for one scan at a time
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="med3dvlm-vllm", daemon=True)
        self._thread.start()
        try:
            self._do(self._begin())
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Sequence[Request]) -> list[Stream]:
        """Return a stream for each request immediately. An error of a request is raised by its own stream."""
        streams = [Stream(request) for request in requests]
        for stream in streams:
            with self._lock:
                if self._closed:
                    raise RuntimeError("The engine is closed.")
                self._running[stream] = asyncio.run_coroutine_threadsafe(self._answer(stream), self._loop)
        return streams

    def stats(self) -> dict[str, float]:
        """Return the number of requests that have their first token and that wait for it, and of tokens read and generated so far."""
        with self._lock:
            unended = [stream for stream in self._running if not stream.wait(0)]
        running = sum(stream in self._writing for stream in unended)
        return {"running": running, "waiting": len(unended) - running, **self._counts}

    def close(self) -> None:
        """End all answers, as if they were cancelled, and take no more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            running = dict(self._running)
        for stream in running:
            stream.cancel()
        for future in running.values():
            future.result()
        self._reading.shutdown()
        self._do(self.source.close())
        self._do(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _begin(self) -> None:
        await self.source.start()
        await self._compare()

    async def _answer(self, stream: Stream) -> None:
        try:
            ids, asked = await self._loop.run_in_executor(self._reading, self._prepare, stream)
            if finish := stream.ended_early:
                stream.finish(Generation("", (), finish, len(ids), seconds=time.perf_counter() - stream.began))
                return
            self._counts["prompt_tokens"] += len(ids)
            await self._follow(stream, Writer(stream, self.chat.processor.tokenizer, self.chat.ends, asked.max_tokens, len(ids)), asked)
        except Exception as error:  # noqa: BLE001  raised where the stream is read
            stream.finish(error)
        finally:
            self._writing.discard(stream)
            with self._lock:
                self._running.pop(stream, None)

    async def _follow(self, stream: Stream, writer: Writer, asked: Asked) -> None:
        """Hand the tokens on until the answer ends, or nobody wants it any more."""
        tokens = self.source.tokens(asked)
        coming = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(_next(tokens))
                await asyncio.wait({coming}, timeout=PATIENCE)
                if finish := stream.ended_early:
                    writer.end(finish)
                    return
                if not coming.done():
                    continue
                news, coming = coming.result(), None
                if news is None:
                    raise self._cut()
                for token in news:
                    self._writing.add(stream)
                    self._counts["generated_tokens"] += 1
                    if writer.put(token):
                        return
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.wait({coming})
            await tokens.aclose()  # type: ignore[attr-defined]  # which ends it there, too

    def _prepare(self, stream: Stream) -> tuple[list[int], Asked]:
        request = stream.request
        ids, room = self.chat.prompt(request.messages[-1]["content"], request.messages[:-1], request.max_new_tokens)
        if len(ids) >= self.source.context:
            raise ValueError(
                f"The image and the question are {len(ids)} tokens but {self.source.name} takes {self.source.context} (its --max-model-len); "
                "ask a shorter question."
            )
        if stream.ended_early:
            return ids, Asked(torch.empty(0, 0), 1, [])
        embeds = self._embedded(ids, self.chat.encode(request.scan))
        room = min(room, self.source.context - len(ids))
        seed = seed_of(request) % 2**63
        return ids, Asked(embeds, room, self.chat.ends, request.temperature, request.top_p, seed, request.alternatives)

    @torch.no_grad()
    def _embedded(self, ids: list[int], features: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the embeddings (L, E) of a prompt, with the image's in place of its placeholders."""
        model = self.chat.model
        image = None if features is None else (features[0].to(model.device), features[1].to(model.device))
        return model.embed(torch.tensor([ids], device=model.device), image)[0].cpu()

    async def _compare(self) -> None:
        """Raise ValueError where the source's language model is not the chat's: by width, and by what it would say next."""
        model, encode = self.chat.model, self.chat.processor.encode
        differences = []
        for probe in PROBES:
            ids = encode([{"role": "user", "content": probe}], generate=True, image=False)["input_ids"]
            try:
                tokens = [
                    token
                    async for news in self.source.tokens(Asked(self._embedded(ids, None), 1, [], alternatives=PROBED))
                    for token in news
                ]
            except EngineRefused as error:
                if "hidden_size" not in str(error):
                    raise
                raise ValueError(self._another(f"its embeddings are not {model.config.language_width} wide")) from None
            if not tokens:
                raise self._cut()
            with torch.no_grad():
                own = model(torch.tensor([ids], device=model.device)).logits[0, -1].float().log_softmax(-1)  # (V,)
            known = [(id, logprob) for id, logprob in tokens[0].alternatives if id < len(own)]
            if len(known) < len(tokens[0].alternatives):
                raise ValueError(self._another(f"its vocabulary is larger than {len(own)}"))
            differences += [abs(logprob - float(own[id])) for id, logprob in known]
        if (mean := sum(differences) / len(differences)) > MAX_DIFFERENCE:
            raise ValueError(self._another(f"the log probabilities of its next words differ by {mean:.2g}"))

    def _cut(self) -> EngineGone:
        return EngineGone(
            f"{self.source.name[0].upper()}{self.source.name[1:]} ended an answer before its end; see its log, and ask again."
        )

    def _another(self, reason: str) -> str:
        name = f"{self.source.name} serves {served!r}, which" if (served := getattr(self.source, "model", "")) else f"{self.source.name}"
        return (
            f"{name[0].upper()}{name[1:]} is not this model's language model: {reason}; start it on the folder that `med3dvlm export` writes of "
            "this model."
        )


async def _next(tokens: Any) -> Any:
    """Return the next item of an iterator, None at its end."""
    return await anext(tokens, None)

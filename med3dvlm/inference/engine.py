"""The interface of all engines: requests in, streams of words out.

    engine = TransformersEngine(chat)                        # or another `Engine`
    streams = engine.generate([Request("scan.nii.gz", [{"role": "user", "content": "Which organ has a lesion?"}])])
    for piece in streams[0]: ...                             # words as they come; streams[0].cancel() ends it
    streams[0].result().text                                 # the whole answer, its tokens, and why it ended

Requests that are given together, or at different times, are answered together, and each as if it were alone.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Condition
from typing import Any, Literal, Protocol

import torch
from tokenizers.decoders import DecodeStream

from med3dvlm.inference.out_of_distribution import Features
from med3dvlm.models.vlm_processor import Message
from med3dvlm.preprocessing import Scan

MAX_ALTERNATIVES = 20
Finish = Literal["stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True)
class Request:
    """A question about a scan, and how to answer it.

    Args:
        scan: a path, a Volume, a prepared tensor, or what `Med3DChat.encode` gave.
        messages: {"role": "system" | "user" | "assistant", "content"}; the last is the question. The oldest turns go where space is short.
        max_new_tokens: at most so many; then the answer ends with "length".
        temperature: 0 takes the likeliest token; above, tokens are drawn, and seldom ones the more often the higher it is.
        top_p: drawn from the fewest tokens that together have this probability.
        seed: of the draws, which do not depend on what else is answered; by default taken from torch's own generator.
        stop: texts before which the answer ends.
        alternatives: how many of the likeliest tokens are listed at each place.
        seconds: from now until the answer ends as it is, with "deadline".

    Raises:
        ValueError: a value is not allowed; one sentence.
    """

    scan: Scan | Features
    messages: Sequence[Message]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    alternatives: int = 0
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "user":
            raise ValueError("The last message must be the user's, which asks something about the scan.")
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            raise ValueError(f"temperature {self.temperature:g} must be 0 or more and top_p {self.top_p:g} above 0 and at most 1.")
        if not 0 <= self.alternatives <= MAX_ALTERNATIVES:
            raise ValueError(f"{self.alternatives} likeliest tokens are asked for but 0 to {MAX_ALTERNATIVES} can be listed.")
        if any(not text for text in self.stop):
            raise ValueError("A text that ends the answer is empty; give at least one character.")


@dataclass(frozen=True)
class Token:
    """A generated token and its log probability: the model's own, before temperature and top-p change it. `alternatives`: the likeliest."""

    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """The new part of an answer: words, which may be "" while they are not yet certain, and their tokens."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Generation:
    """A whole answer.

    `finish` is "stop" where the model, or a text of `stop`, ended it, "length" at `max_new_tokens` or the end of the model's context.
    `prompt_tokens` counts what was read, the image's tokens included, `reused_tokens` those of them that were known from an earlier request.
    `first_seconds` and `seconds` are from asking to the first token and to the end.
    """

    text: str
    tokens: tuple[Token, ...]
    finish: Finish
    prompt_tokens: int
    reused_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def confidence(self) -> float:
        """Return the geometric mean of the tokens' probabilities."""
        return math.exp(sum(token.logprob for token in self.tokens) / max(1, len(self.tokens)))


class Stream:
    """One request's answer while it is written. Iterating yields pieces of text, which joined are the answer's; errors are raised there too."""

    def __init__(self, request: Request) -> None:
        self.request, self.began = request, time.perf_counter()
        self.cancelled = False
        self._changed = Condition()
        self._new: deque[Delta] = deque()
        self._outcome: Generation | BaseException | None = None
        self._listener: Callable[[], object] | None = None

    def __iter__(self) -> Iterator[str]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._outcome is not None)
            news, outcome = self.take()
            yield from (delta.text for delta in news if delta.text)
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is not None:
                return

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end. Returns whether it came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._outcome is not None, timeout)

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the end. Raises what went wrong, or TimeoutError."""
        if not self.wait(timeout):
            raise TimeoutError(f"There is no answer after {timeout:g} seconds.")
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def cancel(self) -> None:
        """Leave the running batch at the next token; the answer ends as it is, with "cancelled"."""
        self.cancelled = True

    def take(self) -> tuple[list[Delta], Generation | BaseException | None]:
        """Return the new parts without waiting, and the outcome once there is one."""
        with self._changed:
            news = list(self._new)
            self._new.clear()
            return news, self._outcome

    def listen(self, listener: Callable[[], object]) -> None:
        """Call `listener`, from the engine's thread and without arguments, whenever there is something new; at once where there is already."""
        with self._changed:
            self._listener = listener
        listener()

    @property
    def ended_early(self) -> Finish | None:
        """Return the reason to end the answer now, if there is one."""
        late = self.request.seconds is not None and time.perf_counter() - self.began > self.request.seconds
        return "cancelled" if self.cancelled else "deadline" if late else None

    # For engines

    def put(self, delta: Delta) -> None:
        with self._changed:
            self._new.append(delta)
        self._tell()

    def finish(self, outcome: Generation | BaseException) -> None:
        with self._changed:
            if self._outcome is not None:
                return
            self._outcome = outcome
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
            listener = self._listener
        if listener is not None:
            listener()


class Engine(Protocol):
    """Answers many requests at a time. `stats` are numbers for monitoring: "running", "waiting" and what the engine counts."""

    def generate(self, requests: Sequence[Request]) -> list[Stream]:
        """Return a stream for each request, at once. An error in one of them is raised by its own stream."""
        ...

    def stats(self) -> dict[str, float]: ...

    def close(self) -> None:
        """End all answers as if they were cancelled, and take no more."""
        ...


class Writer:
    """Turns the tokens of a stream into text, and knows when the answer ends.

    Args:
        ends: the tokens that end an answer.
        room: how many tokens it may have.
        prompt_tokens, reused_tokens: for the Generation.
    """

    def __init__(self, stream: Stream, tokenizer: Any, ends: Sequence[int], room: int, prompt_tokens: int, reused_tokens: int = 0) -> None:
        self.stream, self.tokenizer, self.ends, self.room = stream, tokenizer, frozenset(ends), room
        self.prompt_tokens, self.reused_tokens = prompt_tokens, reused_tokens
        self.tokens: list[Token] = []
        self._decoder, self._text, self._given, self._cut = DecodeStream(skip_special_tokens=True), "", 0, False
        self._first_seconds = 0.0

    def put(self, token: Token) -> bool:
        """Take the next token. Returns whether it ends the answer."""
        if not self.tokens:
            self._first_seconds = time.perf_counter() - self.stream.began
        self.tokens.append(token)
        self._text += self._decoder.step(self.tokenizer._tokenizer, token.id) or ""
        found = [place for text in self.stream.request.stop if (place := self._text.find(text)) >= 0]
        if found:
            self._text, self._cut = self._text[: min(found)], True
        ended: Finish | None = "stop" if found or token.id in self.ends else "length" if len(self.tokens) >= self.room else None
        if ended is None:
            self.stream.put(Delta(self._piece(self._held()), (token,)))
        else:
            self.end(ended, (token,))
        return ended is not None

    def end(self, finish: Finish, last: tuple[Token, ...] = ()) -> None:
        """Emit the remaining words, and the whole answer."""
        if not self._cut:
            ids = [token.id for token in self.tokens]
            self._text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if (piece := self._piece(0)) or last:
            self.stream.put(Delta(piece, last))
        seconds = time.perf_counter() - self.stream.began
        whole = (self._text.strip(), tuple(self.tokens), finish, self.prompt_tokens, self.reused_tokens, self._first_seconds, seconds)
        self.stream.finish(Generation(*whole))

    def _piece(self, held: int) -> str:
        """Return the words that were not emitted yet: without the blanks around the answer, and without its last `held` characters."""
        words = self._text[: len(self._text) - held].rstrip()
        if not self._given:
            self._given = len(self._text) - len(self._text.lstrip())
        piece, self._given = words[self._given :], max(self._given, len(words))
        return piece

    def _held(self) -> int:
        """Return how many characters at the end may begin a text that ends the answer."""
        begun = (n for text in self.stream.request.stop for n in range(1, len(text)) if self._text.endswith(text[:n]))
        return max(begun, default=0)


def seed_of(request: Request) -> int:
    """Return the request's seed, or one from torch's own generator."""
    return int(torch.randint(2**62, ())) if request.seed is None else request.seed

"""A question and what became of it; and what is said, and noted, of an error."""

import logging
import threading
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

LOW_CONFIDENCE = 0.5
BROKEN = "Something went wrong here. Try again; with a large scan the machine may be short of memory."
MALFORMED = (
    "This call does not fit: a value is missing, of another kind, or a path that was not sent to this server. med3dvlm/app/api.py says how the "
    "functions are called."
)


def sentence(error: Exception) -> str:
    """What is said of an error where the user looks: the words of a ValueError, which say what is wrong with what was given."""
    if isinstance(error, ValueError):
        return str(error)
    log(error)
    return BROKEN


def log(error: Exception) -> None:
    """Note kind and place of an error and nothing else: its words may quote a question or name a scan."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    logger.error("%s in %s", type(error).__name__, f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "?")


@dataclass(eq=False)
class Turn:
    """A question and what became of it. `state`: waiting, writing, done, stopped or failed (`answer` then says why)."""

    question: str
    answer: str = ""
    state: str = "waiting"
    seconds: float | None = None
    tokens: int | None = None
    confidence: float | None = None
    places: tuple[Any, ...] = ()  # that the answer points to and that were not drawn yet
    unlike: bool = False  # the scan is unlike the training data, where confidence means little
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def open(self) -> bool:
        return self.state in ("waiting", "writing")

    def shown(self) -> dict[str, Any]:
        """For the page and for programs."""
        names = ("question", "answer", "state", "open", "seconds", "tokens", "confidence", "unlike")
        return {name: getattr(self, name) for name in names} | {"low": self.confidence is not None and self.confidence < LOW_CONFIDENCE}


def history(turns: list[Turn]) -> list[dict[str, str]]:
    """What the model is told was said before: answered and stopped turns, not failed ones."""
    messages = []
    for turn in turns:
        if turn.state in ("done", "stopped") and turn.answer.strip():
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    return messages

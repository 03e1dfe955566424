"""A question and its answer; how errors are shown and logged."""

import logging
import threading
from dataclasses import dataclass, field
from typing import Any

from med3dvlm.programs import user_message
from med3dvlm.prompts import REPORT_PROMPTS
from med3dvlm.volume import Volume

logger = logging.getLogger(__name__)

LOW_CONFIDENCE = 0.5
BROKEN = "Something went wrong here. Try again; with a large scan the machine may be short of memory."
MALFORMED = "A value of this call is missing, of a wrong type, or a path of no file that was uploaded here; med3dvlm/app/api.py describes the calls."


def error_message(error: Exception) -> str:
    """Return the sentence that the user sees for an error: the text of a ValueError of ours, which says what is wrong with the input.
    A library's may quote what nobody else may read."""
    if isinstance(error, ValueError) and user_message(error) is not None:
        return str(error)
    log(error)
    return BROKEN


def log(error: Exception) -> None:
    """Log kind and place of an error and nothing else: its words may quote a question or name a scan."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    logger.error("%s in %s", type(error).__name__, f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "?")


@dataclass(eq=False)
class Turn:
    """A question and its answer. `state`: waiting, writing, done, stopped or failed (`answer` then says why)."""

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
        """Return the turn for the page and for programs."""
        names = ("question", "answer", "state", "open", "seconds", "tokens", "confidence", "unlike")
        return {name: getattr(self, name) for name in names} | {"low": self.confidence is not None and self.confidence < LOW_CONFIDENCE}

    def draft_status(self, edited: bool) -> str:
        """Describe the turn as a draft of the report, which a person may have `edited`; "" where there is nothing to say."""
        if self.state == "stopped":
            return "Stopped before its end: the draft is incomplete."
        if edited and self.state != "failed":
            return "Changed by hand since it was drafted."
        if self.confidence is None:
            return ""
        doubt = ", which is low" if self.shown()["low"] else ""
        doubt += ", on a scan unlike the training data" if self.unlike else ""
        return f"Drafted in {self.seconds:.1f} s, {self.tokens} tokens, with a confidence of {100 * self.confidence:.0f} %{doubt}."


def history(turns: list[Turn]) -> list[dict[str, str]]:
    """Return the conversation so far for the model: answered and stopped turns, not failed ones."""
    messages = []
    for turn in turns:
        if turn.state in ("done", "stopped") and turn.answer.strip():
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    return messages


def suggested_questions(volume: Volume, asked: set[str]) -> list[str]:
    """Return questions that suit the scan and were not asked yet: contrast for CT alone, the plane where the file does not state it."""
    questions = [REPORT_PROMPTS[0], "Which organ is abnormal?", "What abnormality is seen?"]
    if volume.unit == "HU":
        questions.append("Which contrast phase is this?")
    if volume.plane is None or (volume.oblique or 0) >= 1:
        questions.append("Which plane is this scan?")
    return [question for question in questions if question not in asked][:4]

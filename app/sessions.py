"""Who is at the desk: for each browser session its scan, its conversation, its report; nothing of one is seen by another.

Nothing here knows the page. A session ends when its page is closed, or when too many are open and it rested longest; its memory goes then.
"""

import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from scans import OpenScan
from viewer import Overlay

from med3dvlm.reporting import KeyImage

logger = logging.getLogger(__name__)

MOST_SESSIONS = 64
MOST_CHARACTERS = 4000  # of a question, about 700 words
LOW_CONFIDENCE = 0.5
NO_SCAN = "Please open a scan first: drop its file on the viewer, or take an example."
NO_QUESTION = "Please type a question first."
NO_ANSWER = "The model gave no answer; please ask in other words."
BUSY = "An answer is being written; wait for it or stop it."
BROKEN = "Something went wrong here. Try again; with a large scan the machine may be short of memory."


MALFORMED = (
    "This call does not fit: a value is missing, of another kind, or a path that was not sent to this server. app/programs.py says how the "
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
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def open(self) -> bool:
        return self.state in ("waiting", "writing")

    def shown(self) -> dict[str, Any]:
        """For the page and for programs."""
        names = ("question", "answer", "state", "open", "seconds", "tokens", "confidence")
        return {name: getattr(self, name) for name in names} | {"low": self.confidence is not None and self.confidence < LOW_CONFIDENCE}


@dataclass(eq=False)
class Session:
    """One desk. `token` is the secret under which its browser fetches what belongs to it."""

    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    scan: OpenScan | None = None
    number: int = 0  # of the scan, so that nothing of an old one is taken for the new one's
    features: Any = None  # the encoder's, of this scan
    turns: list[Turn] = field(default_factory=list)
    overlay: Overlay | None = None  # on the viewer
    overlays: int = 0  # so far, which numbers them
    draft: Turn | None = None  # of the report, as the model writes it
    report: str = ""  # as it stands in the field
    key_images: dict[int, KeyImage] = field(default_factory=dict)  # that go with the report, by number
    marked: int = 0  # of them so far, which numbers them
    saved: str = ""  # the report as it was saved last
    warned: str = ""  # the changed report of which a person was told that a draft would replace it
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def put(self, scan: OpenScan) -> None:
        """A new scan: whatever was said about the one before ends and goes."""
        with self._lock:
            self.close()
            self.scan = scan

    def clear(self) -> None:
        """A new conversation about the same scan."""
        self.stop()
        self.turns, self.overlay = [], None

    def stop(self) -> None:
        """End the answer that is being written, if one is."""
        if waiting := self.claim():
            waiting.state = "stopped"
        for turn in self.turns:
            turn.stop.set()

    def stop_draft(self) -> None:
        """The same for the report."""
        if self.draft is not None:
            self.draft.stop.set()

    def lay(self, scan: OpenScan, overlay: Overlay) -> None:
        """Put it on the viewer, unless another scan was opened meanwhile."""
        with self._lock:
            if self.scan is scan:
                self.overlay = overlay
                self.overlays += 1

    def write(self, draft: Turn, report: str) -> bool:
        """What a draft has come to is the report, unless another one was begun or another scan opened; whether it is."""
        with self._lock:
            if self.draft is draft:
                self.report = report
            return self.draft is draft

    @property
    def author(self) -> str:
        """Who wrote the report, a key of `reporting.NOTICES`."""
        if self.draft is None or not self.draft.answer.strip() or self.draft.state == "failed":
            return "hand"
        return "model, changed by hand" if self.edited else "model"

    @property
    def edited(self) -> bool:
        """Whether the report is a person's: not what the draft came to. A draft's own words may arrive late, while and after it is written."""
        if self.draft is not None and (self.draft.open or self.report == self.draft.answer):
            return False
        return bool(self.report.strip())

    def close(self) -> None:
        """Everything of the scan goes, whatever is being written ends."""
        with self._lock:
            self.number += 1
            self.clear()
            self.stop_draft()
            self.scan = self.features = self.draft = self.overlay = None
            self.report = self.warned = self.saved = ""
            self.key_images = {}

    def pose(self, question: str) -> Turn:
        """The next turn, still waiting for its answer.

        Raises:
            ValueError: there is no scan or no question, the question is too long, or an answer is still being written; one sentence.
        """
        question = question.strip()
        if self.scan is None:
            raise ValueError(NO_SCAN)
        if not question:
            raise ValueError(NO_QUESTION)
        if len(question) > MOST_CHARACTERS:
            raise ValueError(f"The question has {len(question)} characters but at most {MOST_CHARACTERS} are taken; ask a shorter one.")
        if self.turns and self.turns[-1].open:
            raise ValueError(BUSY)
        self.turns.append(Turn(question))
        return self.turns[-1]

    def pose_again(self, question: str | None = None) -> Turn:
        """The last question once more, or another one in its place. Raises ValueError as `pose` does."""
        if not self.turns:
            raise ValueError(NO_QUESTION)
        if self.turns[-1].open:
            raise ValueError(BUSY)
        last = self.turns.pop()
        try:
            return self.pose(last.question if question is None else question)
        except ValueError:
            self.turns.append(last)
            raise

    def claim(self) -> Turn | None:
        """The turn that waits for an answer, now being written by whoever called; None where none waits."""
        with self._lock:
            turn = self.turns[-1] if self.turns else None
            if turn is None or turn.state != "waiting":
                return None
            turn.state = "writing"
            return turn

    def answer(self, chat: Any, turn: Turn, **sampling: Any) -> Iterator[Turn]:
        """Let the model write a claimed turn's answer; yields it at first and after each piece. It ends when the turn is told to stop."""
        yield turn
        earlier = self.turns[: self.turns.index(turn)] if turn in self.turns else []
        try:
            yield from self._write(chat, turn, history(earlier), **sampling)
        except Exception as error:  # noqa: BLE001  told in a sentence, the program's own mistakes in the log, too
            turn.state, turn.answer = "failed", sentence(error)
        except BaseException:  # a page that went away: the turn must not stay open
            turn.state = "failed"
            raise
        yield turn

    def _write(self, chat: Any, turn: Turn, earlier: list[dict[str, str]], **sampling: Any) -> Iterator[Turn]:
        pieces = chat.stream(self.encoded(chat), turn.question, history=earlier, **sampling)
        try:
            while not turn.stop.is_set():
                turn.answer += next(pieces)
                yield turn
            turn.state = "stopped"
        except StopIteration as end:
            said = end.value
            if not turn.answer.strip():
                raise ValueError(NO_ANSWER) from None
            turn.seconds, turn.tokens, turn.confidence, turn.state = said.seconds, said.tokens, said.confidence, "done"
        finally:
            pieces.close()

    def encoded(self, chat: Any) -> Any:
        """The scan as the language model gets it, computed once."""
        with self._lock:
            scan, features = self.scan, self.features
        if scan is None:
            raise ValueError(NO_SCAN)
        if features is None:
            features = chat.encode(scan.volume)
            with self._lock:
                if self.scan is scan:
                    self.features = features
        return features


def history(turns: list[Turn]) -> list[dict[str, str]]:
    """What the model is told was said before: answered and stopped turns, not failed ones."""
    messages = []
    for turn in turns:
        if turn.state in ("done", "stopped") and turn.answer.strip():
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    return messages


class Sessions:
    """All desks, by the name that Gradio gives a browser session."""

    def __init__(self, most: int = MOST_SESSIONS) -> None:
        self._by_name: OrderedDict[str, Session] = OrderedDict()
        self._most, self._lock = most, threading.Lock()

    def of(self, name: str) -> Session:
        """The session of that name, a new one at its first sign of life; above `most`, the one that rested longest is closed."""
        with self._lock:
            session = self._by_name.setdefault(name, Session())
            self._by_name.move_to_end(name)
            surplus = self._by_name.popitem(last=False)[1] if len(self._by_name) > self._most else None
        if surplus is not None:
            surplus.close()
        return session

    def by_token(self, token: str) -> Session | None:
        with self._lock:
            sessions = list(self._by_name.values())
        return next((session for session in sessions if secrets.compare_digest(session.token.encode(), token.encode())), None)

    def bytes_with(self, session: Session, scan: OpenScan) -> int:
        """What all open scans take once the session has this one; a scan that several share counts once."""
        with self._lock:
            others = [other.scan for other in self._by_name.values() if other is not session and other.scan is not None]
        return sum({id(each): each.nbytes for each in (scan, *others)}.values())

    def close(self, name: str) -> None:
        with self._lock:
            session = self._by_name.pop(name, None)
        if session is not None:
            session.close()

    def __len__(self) -> int:
        return len(self._by_name)

"""One person's workstation: the open scan, the conversation about it, the report. This module knows nothing of the page."""

import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from med3dvlm.app.masks import MAX_MASKS, Mask
from med3dvlm.app.scans import OpenScan, Undecided
from med3dvlm.app.turns import Turn, error_message, history
from med3dvlm.app.viewer import Overlay
from med3dvlm.reports.draft import KeyImage

MAX_CHARACTERS = 4000  # of a question, about 700 words
NO_SCAN = "Please open a scan first: drop its file on the viewer, or take an example."
NO_QUESTION = "Please type a question first."
NO_ANSWER = "The model gave no answer; please ask in other words."
BUSY = "An answer is being written; wait for it or stop it."


@dataclass(eq=False)
class Session:
    """The state of one workstation. `token` is the secret under which its browser fetches the session's data."""

    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    scan: OpenScan | None = None
    undecided: Undecided | None = None  # an upload of which a series has to be chosen
    number: int = 0  # number of the open scan, so that results of an earlier scan are not taken for this one's
    features: Any = None  # the encoder's, of this scan
    turns: list[Turn] = field(default_factory=list)
    overlay: Overlay | None = None  # on the viewer
    overlays: int = 0  # made so far; the number of the next
    masks: dict[int, Mask] = field(default_factory=dict)  # of findings, by number
    masks_made: int = 0  # so far; the number of the next
    target: int | None = None  # the number of the mask that the planes go to
    draft: Turn | None = None  # of the report, as the model writes it
    report: str = ""  # as it stands in the field
    key_images: dict[int, KeyImage] = field(default_factory=dict)  # that go with the report, by number
    marked: int = 0  # key images so far; the number of the next
    saved: str = ""  # the report as it was saved last
    before: str = ""  # the report that a draft replaces
    warned: str = ""  # the changed report of which a person was told that a draft would replace it
    page: bool = False  # a browser shows it, or did before it left; else a program's
    owner: str | None = None  # the account of who sees the page
    seen: float = field(default_factory=time.monotonic)  # the last sign of life
    left: float | None = None  # when the page was closed, loaded again or cut off
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def open(self, scan: OpenScan) -> None:
        """Open a new scan; everything about the one before ends and is deleted."""
        with self._lock:
            self.close()
            self.scan = scan

    def clear(self) -> None:
        """Begin a new conversation about the same scan."""
        self.stop()
        self.turns, self.overlay = [], None

    def stop(self) -> None:
        """End the answer that is being written, if one is."""
        if waiting := self.claim():
            waiting.state = "stopped"
        for turn in self.turns:
            turn.stop.set()

    def stop_draft(self) -> None:
        """Stop the report that is being drafted, if one is."""
        if self.draft is not None:
            self.draft.stop.set()

    def set_overlay(self, scan: OpenScan, overlay: Overlay) -> None:
        """Put it on the viewer, unless another scan was opened meanwhile."""
        with self._lock:
            if self.scan is scan:
                self.overlay = overlay
                self.overlays += 1

    def add_mask(self, scan: OpenScan, mask: Mask) -> None:
        """Put a mask on the viewer in the place of one of the same name, unless another scan was opened meanwhile.

        Raises:
            ValueError: there are too many; one sentence.
        """
        with self._lock:
            if self.scan is not scan:
                return
            name = mask.found.name.casefold()
            kept = {number: each for number, each in self.masks.items() if each.found.name.casefold() != name}
            if len(kept) >= MAX_MASKS:
                raise ValueError(f"At most {MAX_MASKS} findings are shown on a scan; remove one first.")
            self.masks_made += 1
            self.masks = kept | {self.masks_made: mask}

    def set_draft(self, draft: Turn, report: str) -> bool:
        """Make the text of this draft the report, unless another draft was begun or another scan opened. Returns whether it did."""
        with self._lock:
            if self.draft is draft:
                self.report = report
            return self.draft is draft

    @property
    def author(self) -> str:
        """Return who wrote the report, a key of `reports.draft.NOTICES`."""
        if self.draft is None or not self.draft.answer.strip() or self.draft.state == "failed":
            return "hand"
        return "model, changed by hand" if self.edited else "model"

    @property
    def edited(self) -> bool:
        """Return whether a person changed the report. A draft's own words may arrive late, while and after it is written."""
        if self.draft is not None and (self.draft.open or self.report == self.draft.answer):
            return False
        return bool(self.report.strip())

    @property
    def unsaved(self) -> bool:
        """Return whether a person wrote or changed the report and did not save it."""
        return self.edited and self.report != self.saved

    def set_report(self, report: str) -> None:
        """Take the text of the field as the report. While a draft is written its own words come back, some of them late; a person's own text
        ends the draft.
        """
        with self._lock:
            draft = self.draft
            if draft is not None and draft.open:
                if report == self.before or draft.answer.startswith(report):
                    return
                draft.stop.set()
                self.draft = replace(draft, state="stopped")  # the writer's own is not this one any more
            self.report = report

    def disconnect(self) -> None:
        """Stop what is being written: the page is gone, for a while or for good."""
        self.stop()
        self.stop_draft()
        for turn in (*self.turns, *([self.draft] if self.draft else [])):
            if turn.open:
                turn.state = "stopped"
        self.left = time.monotonic()

    def close(self) -> None:
        """Delete everything about the scan and end whatever is being written."""
        with self._lock:
            self.number += 1
            self.clear()
            self.stop_draft()
            self.scan = self.undecided = self.features = self.draft = self.overlay = None
            self.report = self.warned = self.saved = self.before = ""
            self.key_images, self.masks, self.target = {}, {}, None

    def ask(self, question: str) -> Turn:
        """Add a turn, which waits for its answer.

        Raises:
            ValueError: there is no scan or no question, the question is too long, or an answer is still being written; one sentence.
        """
        question = question.strip()
        if self.scan is None:
            raise ValueError(NO_SCAN)
        if not question:
            raise ValueError(NO_QUESTION)
        if len(question) > MAX_CHARACTERS:
            raise ValueError(f"The question has {len(question)} characters but at most {MAX_CHARACTERS} are taken; ask a shorter one.")
        if self.turns and self.turns[-1].open:
            raise ValueError(BUSY)
        self.turns.append(Turn(question))
        return self.turns[-1]

    def ask_again(self, question: str | None = None) -> Turn:
        """Ask the last question again, or another one in its place. Raises ValueError as `ask` does."""
        if not self.turns:
            raise ValueError(NO_QUESTION)
        if self.turns[-1].open:
            raise ValueError(BUSY)
        last = self.turns.pop()
        try:
            return self.ask(last.question if question is None else question)
        except ValueError:
            self.turns.append(last)
            raise

    def claim(self) -> Turn | None:
        """Take the turn that waits for an answer, so that only the caller writes it; None where none waits."""
        with self._lock:
            turn = self.turns[-1] if self.turns else None
            if turn is None or turn.state != "waiting":
                return None
            turn.state = "writing"
            return turn

    def answer(self, chat: Any, turn: Turn, **sampling: Any) -> Iterator[Turn]:
        """Let the model write the answer of a claimed turn; yields it at first and after each piece. It ends when the turn is told to stop."""
        yield turn
        earlier = self.turns[: self.turns.index(turn)] if turn in self.turns else []
        try:
            yield from self._write(chat, turn, history(earlier), **sampling)
        except Exception as error:  # noqa: BLE001  told in a sentence, the program's own mistakes in the log, too
            turn.state, turn.answer = "failed", error_message(error)
        except BaseException:  # a page that went away: the turn must not stay open
            turn.state = "stopped"
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
            written = end.value
            if not turn.answer.strip():
                raise ValueError(NO_ANSWER) from None
            turn.seconds, turn.tokens, turn.confidence, turn.state = written.seconds, written.tokens, written.confidence, "done"
            turn.places = written.places
        finally:
            pieces.close()

    def encoded(self, chat: Any) -> Any:
        """Return the encoder's features of the scan, computed once."""
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

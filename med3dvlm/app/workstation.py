"""The actions of the workstation, which the page and programs call: open a scan, ask, stop, ask again, clear.

Every function takes the Session that it acts for and returns plain data for the page's components.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import psutil

from med3dvlm.app.analysis import Analysis, Case, Cells
from med3dvlm.app.key_images import MAX_KEY_IMAGES, key_image
from med3dvlm.app.masks import for_viewer, names_to_segment, pack, readable, segment_findings, stated
from med3dvlm.app.masks import save as save_masks
from med3dvlm.app.scans import OpenScan, UndecidedError, example, read_series, read_uploads, series_choices
from med3dvlm.app.session import BUSY, MAX_CHARACTERS, NO_SCAN, Session
from med3dvlm.app.sessions import Sessions
from med3dvlm.app.turns import Turn, error_message, history, suggested_questions
from med3dvlm.app.viewer import overlay
from med3dvlm.prompts import REPORT_PROMPTS
from med3dvlm.reports.draft import KeyImage, origin, read_report, report_dicom, report_json, report_markdown, report_text, report_zip
from med3dvlm.volume import VolumeError

MAX_BYTES = 4 * 2**30  # of an upload
MAX_REPORT = 20_000  # characters
EXPLAINED = (
    "The geometric mean of the probabilities that the model gave to the words it wrote. It measures how sure the model is of its words, "
    "not whether they are true. Below 50 %, the model gave a typical word less probability than all other words together. "
    "On a scan unlike the training data it means little."
)
SAVES = {"txt": "Text", "md": "Markdown", "json": "JSON", "zip": "Zip with key images", "dcm": "DICOM Structured Report"}
SECONDS_BETWEEN = 0.05  # at least, between two states of an answer that are sent to the page


@dataclass(eq=False)
class Workstation:
    """All actions behind the page. `chat` has `encode`, `stream` and `out_of_distribution` as Med3DChat has; `model` is its name on the page."""

    chat: Any
    model: str = "model"
    max_bytes: int = MAX_BYTES
    analysis: Analysis = Analysis()
    room: int = psutil.virtual_memory().total // 2  # bytes for the scans of all sessions together
    sessions: Sessions = field(default_factory=Sessions)
    # Gradio names an upload by its content: two sessions that send the same file share one path, and the first to read it deletes it. The
    # second gets the first one's scan, which nothing changes, while that is alive.
    _read: WeakValueDictionary[tuple[str, ...], OpenScan] = field(default_factory=WeakValueDictionary)
    _reading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def straighten(self) -> bool:
        """Return whether the model's processor straightens scans. They are then straightened when read, so that overlays match the picture."""
        processor = getattr(self.chat, "processor", None)  # a stand-in has none
        return processor is not None and processor.image_processor.straighten

    def open_uploads(self, session: Session, uploads: Sequence[str], keep: bool = False) -> OpenScan:
        """Open the uploaded scan in the session. Raises VolumeError; the scan that was open then stays, and where a series has to be chosen,
        `open_series` opens it.

        `keep`: the files stay for others who send them alike, until `sweep` takes them.
        """
        if not uploads:
            raise VolumeError("No file was sent; choose one.")
        key = tuple(sorted(set(uploads)))
        paths = [Path(upload) for upload in key]
        with self._reading:
            scan = self._read.get(key)
            if scan is None:
                if not all(path.exists() for path in paths):
                    raise VolumeError("The upload is not complete; send it again.")
                try:
                    self._read[key] = scan = read_uploads(paths, self.max_bytes, keep, self.straighten)
                except UndecidedError as error:
                    session.undecided = error.study
                    raise
            elif not keep:
                for path in paths:
                    path.unlink(missing_ok=True)
            self._put(session, scan)
        return scan

    def open_series(self, session: Session, number: int) -> OpenScan:
        """Open a series of the undecided study, or else another one of the open study, by its number in `volume.series`. Raises VolumeError as
        `open_uploads` does.
        """
        study = session.undecided or session.scan
        if study is None or study.upload is None:
            raise VolumeError("No DICOM study is open, so there is no other series; open a study first.")
        with self._reading:
            scan = read_series(study.upload, number, self.straighten)
            self._put(session, scan)
        return scan

    def _put(self, session: Session, scan: OpenScan) -> None:
        while self.sessions.bytes_with(session, scan) > self.room and self.sessions.close_gone():
            pass
        if self.sessions.bytes_with(session, scan) > self.room:
            raise VolumeError(
                f"The scan needs {scan.nbytes / 2**30:.1f} GiB of memory, and the scans that are open leave less than that; "
                "close another page, or crop the scan."
            )
        session.open(scan)

    def open_example(self, session: Session, name: str) -> OpenScan:
        """Open one of `scans.EXAMPLES`. Raises VolumeError for another name."""
        scan = example(name)
        session.open(scan)
        return scan

    def notice(self, session: Session) -> str:
        """Return the model's own warning about the scan: out of distribution, or not usable; else ""."""
        if session.scan is None:
            return ""
        try:
            known = self.chat.out_of_distribution(session.encoded(self.chat))
        except Exception as error:  # noqa: BLE001  told in a sentence
            return error_message(error)
        return (known and known.message) or ""

    def answer(self, session: Session, **sampling: float) -> Iterator[Turn]:
        """Write the answer to the question that waits, if any; yields it as it grows, in steps that an eye can follow."""
        turn = session.claim()
        if turn is None:
            return
        shown = 0.0
        for _ in session.answer(self.chat, turn, **sampling):
            if turn not in session.turns:  # cleared, or another scan was opened
                continue
            turn.unlike = turn.state == "done" and bool(self.notice(session))
            if not turn.open or time.monotonic() - shown > SECONDS_BETWEEN:
                shown = time.monotonic()
                yield turn

    def draft_report(self, session: Session, report: str | None = None) -> Iterator[Turn]:
        """Let the model write the report; yields it as it grows, and it becomes the session's report in place of what stood there.

        `report` is what stands in the field, where a person may have written something that is still on its way.

        Raises:
            ValueError: there is no scan, a draft is being written already, or a person changed the report and did not save it: the
                second call replaces it.
        """
        if session.scan is None:
            raise ValueError(NO_SCAN)
        if session.draft is not None and session.draft.open:
            raise ValueError(BUSY)
        if report is not None:
            self.edit_report(session, report)
        if session.unsaved and session.warned != session.report:
            session.warned = session.report
            raise ValueError("The report was changed by hand and not saved. Save it first, or draft once more to replace it.")
        session.before = before = session.report
        shown = 0.0
        session.draft = turn = Turn(REPORT_PROMPTS[0], state="writing")
        for _ in session.answer(self.chat, turn):
            turn.unlike = turn.state == "done" and bool(self.notice(session))
            if not turn.open or time.monotonic() - shown > SECONDS_BETWEEN:
                shown = time.monotonic()
                if session.set_draft(turn, before if turn.state == "failed" else turn.answer):
                    yield turn

    def edit_report(self, session: Session, report: str) -> None:
        """Take the text of the field as the report (see `Session.set_report`). Raises ValueError where it is too long."""
        if report == session.report:
            return
        if len(report) > MAX_REPORT:
            raise ValueError(f"The report has {len(report)} characters but at most {MAX_REPORT} are taken; shorten it.")
        session.set_report(report)

    def report_notes(self, session: Session) -> tuple[str, ...]:
        """Return what a reader of the report has to know about the scan and the origin of the draft."""
        scan, draft = session.scan, session.draft
        notes = [f"About the scan: {warning}" for warning in scan.warnings] if scan is not None else []
        if session.author == "hand":
            return tuple(notes)
        notes += [outside] if (outside := self.notice(session)) else []
        if draft is not None and draft.state == "stopped":
            notes.append("Incomplete: the draft was stopped before its end.")
        if session.author == "model" and draft is not None and draft.confidence is not None:
            notes.append(f"The model's confidence in its words: {100 * draft.confidence:.0f} %. It does not say whether they are true.")
        return tuple(notes)

    def report_data(self, session: Session, problem: str = "") -> dict[str, Any]:
        """Return what report.js shows below the report: sections, findings, files to save, key images [label, address, number]. `problem` is
        a sentence about the last action.
        """
        draft = session.draft
        if draft is not None and draft.state == "failed":
            problem = problem or draft.answer
        shown = {
            "pictures": [[image.label, f"workstation/{session.token}/picture/{number}", number] for number, image in session.key_images.items()],
            "segmenter": self.analysis.segment is not None,
            "line": "" if draft is None else draft.draft_status(session.edited), "problem": problem,
            "open": draft is not None and draft.open, "unsaved": session.unsaved,
        }  # fmt: skip
        try:
            report = read_report(session.report)
        except ValueError:  # nothing written yet
            return shown | {"sections": [], "findings": [], "saves": []}
        saves = [[label, f"workstation/{session.token}/report/{kind}", f"report.{kind}"] for kind, label in SAVES.items()]
        if session.scan is None or session.scan.files is None:
            del saves[list(SAVES).index("dcm")]
        findings = [[readable(name), state] for name, state in report.findings.items()]
        return shown | {"sections": [section.heading for section in report.sections], "findings": findings, "saves": saves}

    def explain(self, session: Session, number: int) -> None:
        """Overlay the saliency of the answer of that number. Raises ValueError where that is impossible."""
        scan, turns = session.scan, session.turns
        if scan is None or self.analysis.explain is None or not 0 <= number < len(turns) or not turns[number].answer:
            raise ValueError("There is no answer of this number to explain; ask first.")
        turn = turns[number]
        cells = self.analysis.explain(scan.volume, turn.question, turn.answer, history(turns[:number]))
        self._set_overlay(session, scan, cells, f"What moved the answer to “{turn.question}”")

    def find_phrase(self, session: Session, phrase: str) -> None:
        """Overlay where the scan resembles the phrase. Raises ValueError as `explain` does."""
        scan = session.scan
        if scan is None or self.analysis.find is None:
            raise ValueError(NO_SCAN)
        if len(phrase) > MAX_CHARACTERS:
            raise ValueError(f"The phrase has {len(phrase)} characters but at most {MAX_CHARACTERS} are taken; shorten it.")
        self._set_overlay(session, scan, self.analysis.find(scan.volume, phrase), f"Where the scan resembles “{phrase.strip()}”")

    def _set_overlay(self, session: Session, scan: OpenScan, cells: Cells, label: str) -> None:
        session.set_overlay(scan, overlay(scan.volume, scan.picture, *cells, label))

    def segment(self, session: Session, phrase: str) -> None:
        """Overlay masks of a phrase, or if it is empty of the findings that the report states. The planes go to the first that was found.
        Raises ValueError as `explain` does.
        """
        scan = session.scan
        if scan is None or self.analysis.segment is None:
            raise ValueError(NO_SCAN)
        before = session.masks_made
        for mask in segment_findings(self.analysis.segment, scan, names_to_segment(phrase, session.report)):
            session.add_mask(scan, mask)
        self._go_to_new(session, scan, before)

    def show_places(self, session: Session) -> bool:
        """Put on the viewer what the last answer, or the draft of the report, points to, if that is new; whether it was.

        The planes go to the first place that was found. Raises ValueError as `explain` does.
        """
        turn = next((each for each in (*session.turns[-1:], session.draft) if each is not None and each.places), None)
        scan = session.scan
        if turn is None or scan is None:
            return False
        places, turn.places = turn.places, ()
        before = session.masks_made
        for found in self.chat.masks(scan.volume, places):
            session.add_mask(scan, pack(found, scan))
        self._go_to_new(session, scan, before)
        return True

    def _go_to_new(self, session: Session, scan: OpenScan, before: int) -> None:
        """Move the planes to the first mask after the number `before` that was found, unless another scan was opened meanwhile."""
        if session.scan is scan:
            session.target = next((number for number, mask in session.masks.items() if number > before and mask.found.found), None)

    def remove_mask(self, session: Session, number: int) -> None:
        """Remove the mask of that number from the viewer."""
        session.masks.pop(number, None)

    def save_masks(self, session: Session, kind: str) -> bytes:
        """Return the masks as a file of one of the kinds in `masks.SAVES`. Raises ValueError where that is impossible."""
        if session.scan is None:
            raise ValueError(NO_SCAN)
        return save_masks(list(session.masks.values()), session.scan, kind, self.model)

    def similar_cases(self, session: Session) -> list[Case]:
        """Return the cases of the index that the scan resembles. Raises ValueError as `explain` does."""
        if session.scan is None or self.analysis.similar is None:
            raise ValueError(NO_SCAN)
        return self.analysis.similar(session.scan.volume)

    def add_key_image(self, session: Session, plane: str, index: int, window: tuple[float, float]) -> KeyImage:
        """Mark a slice as seen in the viewer: of "axial", "coronal" or "sagittal" number `index` from 0, shown from window[0] to window[1].

        Raises:
            ValueError: there is no scan, no such slice, or there are too many; one sentence.
        """
        scan = session.scan
        if scan is None:
            raise ValueError(NO_SCAN)
        if len(session.key_images) >= MAX_KEY_IMAGES:
            raise ValueError(f"A report takes at most {MAX_KEY_IMAGES} key images; remove one first.")
        image = key_image(scan, plane, index, window)
        session.marked += 1
        session.key_images[session.marked] = image
        return image

    def remove_key_image(self, session: Session, number: int) -> None:
        """Remove the key image of that number from the report."""
        session.key_images.pop(number, None)

    def save_report(self, session: Session, kind: str, text: str) -> bytes:
        """Return the report, of which `text` stands in the field, as a file of one of the kinds in SAVES. Raises ValueError where that is
        impossible.
        """
        if session.draft is not None and session.draft.open:
            raise ValueError("The report is being drafted; wait for it or stop it.")
        self.edit_report(session, text)
        scan, author = session.scan, session.author
        source = {} if scan is None else origin(scan.volume, None if author == "hand" else self.model)
        pictures = tuple(session.key_images.values())
        report = read_report(session.report, self.report_notes(session), author=author, origin=source, key_images=pictures)
        session.saved = session.report
        if kind == "dcm":
            if scan is None or scan.files is None:
                raise ValueError("A DICOM report needs a DICOM scan, and this scan is not DICOM; save the report as text.")
            return report_dicom(report, scan.files, scan.series, "The scan")
        if kind == "zip":
            return report_zip(report)
        return {"txt": report_text, "md": report_markdown, "json": report_json}[kind](report).encode()

    def conversation_data(self, session: Session, problem: str = "") -> dict[str, Any]:
        """Return the conversation for conversation.js; `problem` is a sentence about the last action."""
        marks = self.analysis.segment is not None  # findings of an answer, which a click segments
        turns = [turn.shown() | {"stated": stated(turn.answer) if marks and not turn.open else []} for turn in session.turns]
        scan = session.scan
        busy = bool(session.turns) and session.turns[-1].open
        suggestions = [] if scan is None or busy else suggested_questions(scan.volume, {turn.question for turn in session.turns})
        return {
            "turns": turns, "suggestions": suggestions, "problem": problem, "explained": EXPLAINED, "scan": scan is not None,
            "grounded": self.analysis.explain is not None,
        }  # fmt: skip

    def viewer_data(self, session: Session) -> dict[str, Any]:
        """Return the viewer's value for viewer.js."""
        scan, heat, address = session.scan, session.overlay, f"workstation/{session.token}"
        return {
            "scan": scan and {"url": f"{address}/scan/{session.number}", **scan.picture.facts},
            "series": series_choices(scan, session.undecided),
            "overlay": heat and {"url": f"{address}/overlay/{session.overlays}", **heat.facts},
            "segmenter": self.analysis.segment is not None,
            "target": session.target,
            **for_viewer(dict(session.masks), address, dicom=scan is not None and scan.files is not None),
        }

"""Event handlers of the page: each calls the workstation and returns new values for the components that change.

Every event gets its own session from the request. An error becomes a sentence where the user looks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from med3dvlm.app.api import session_of
from med3dvlm.app.layout import Layout, file
from med3dvlm.app.markup import alert, case_cards, no_alert, scan_facts
from med3dvlm.app.scans import OpenScan
from med3dvlm.app.session import Session
from med3dvlm.app.turns import error_message
from med3dvlm.app.workstation import Workstation

HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
AT_ONCE: dict[str, Any] = HIDDEN | {"queue": False}
# A step that Gradio would leave out, because the one before still runs, is another scan's or another question's.
EACH: dict[str, Any] = {"trigger_mode": "multiple"}


@dataclass(frozen=True)
class Events:
    """Base of all event handlers. `model_queue`: how many of them may use the model at a time."""

    workstation: Workstation
    page: Layout
    model_queue: dict[str, Any]

    def session(self, request: gr.Request) -> Session:
        return session_of(self.workstation, request)

    def show_places(self, request: gr.Request) -> tuple[Any, Any]:
        """Draw the places that a new answer or draft points to."""
        session = self.session(request)
        try:
            return gr.skip(), self.workstation.viewer_data(session) if self.workstation.show_places(session) else gr.skip()
        except Exception as error:  # noqa: BLE001  told in a sentence
            return alert("error", error_message(error)), self.workstation.viewer_data(session)

    @property
    def of_scan(self) -> list[Any]:
        """Return the components that show the open scan."""
        page = self.page
        scan, report = page.scan, page.report
        return [scan.status, scan.viewer, scan.facts, page.conversation.log, page.notice, report.text, report.summary, page.cases.found]

    def shown(self, session: Session) -> dict[Any, Any]:
        """Return the values of those components for the session's scan."""
        scan, workstation = session.scan, self.workstation
        assert scan is not None
        values = [
            alert("warning", " ".join(scan.warnings)), workstation.viewer_data(session), scan_facts(scan),
            workstation.conversation_data(session), no_alert(), session.report, workstation.report_data(session), "",
        ]  # fmt: skip
        return dict(zip(self.of_scan, values, strict=True))


class PageEvents(Events):
    """Handlers for loading and leaving the page."""

    def connect(self, blocks: gr.Blocks) -> None:
        token = self.page.token
        blocks.load(self.page_load, token, [token, *self.of_scan], js=file("page_load.js"), **AT_ONCE)
        blocks.unload(self.page_unload)

    def page_load(self, token: str, request: gr.Request) -> dict[Any, Any]:
        try:
            session = self.workstation.sessions.connect(request.session_hash or "", token or "", request.username)
        except ValueError as error:
            return {self.page.scan.status: alert("error", str(error))}
        return {self.page.token: session.token} | (self.shown(session) if session.scan is not None else {})

    def page_unload(self, request: gr.Request) -> None:
        self.workstation.sessions.disconnect(request.session_hash or "")


class ScanEvents(Events):
    """Handlers for opening a scan and for overlays on it."""

    def connect(self) -> None:
        scan, changed = self.page.scan, [self.page.scan.loader, *self.of_scan]
        opens: dict[str, Any] = {
            "concurrency_id": "read", "concurrency_limit": 1, "show_progress_on": scan.status, "show_progress": "minimal",
            "api_visibility": "private", **EACH,
        }  # fmt: skip
        hidden = {**HIDDEN, **self.model_queue}
        openers: list[tuple[Any, Any, Any]] = [(scan.loader.upload, self.open_files, scan.loader)]
        openers += [(button.click, self.open_example, button) for button in scan.examples]
        for event, act, given in openers:
            waiting = event(lambda: alert("busy", "Waiting until another scan is read"), None, scan.status, **AT_ONCE)
            waiting.then(act, given, changed, **opens).then(self.check, None, self.page.notice, **EACH, **hidden)
        switched = scan.viewer.option_select(self.open_series, None, changed, **opens)
        switched.then(self.check, None, self.page.notice, **EACH, **hidden)
        overlaid = [scan.status, scan.viewer]
        self.page.conversation.log.select(self.explain_answer, None, overlaid, **hidden)
        if self.workstation.analysis.segment is None:
            scan.phrase.submit(self.find_phrase, scan.phrase, overlaid, **hidden)
        else:
            scan.phrase.submit(self.find_findings, scan.phrase, [*overlaid, scan.phrase], **hidden)
        scan.viewer.submit(self.find_named, None, overlaid, **hidden)
        scan.viewer.delete(self.remove_mask, None, scan.viewer, **AT_ONCE)
        scan.viewer.select(self.add_key_image, None, [scan.status, self.page.report.summary], **AT_ONCE)
        self.page.cases.search.click(
            self.find_cases, None, self.page.cases.found, show_progress="minimal", api_visibility="private", **self.model_queue
        )

    def open_files(self, uploads: list[str] | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
        yield from self._open(lambda session: self.workstation.open_uploads(session, uploads or []), request)

    def open_example(self, name: str, request: gr.Request) -> Iterator[dict[Any, Any]]:
        yield from self._open(lambda session: self.workstation.open_example(session, name), request)

    def open_series(self, event: gr.EventData, request: gr.Request) -> Iterator[dict[Any, Any]]:
        number = int(event.value)
        yield from self._open(lambda session: self.workstation.open_series(session, number), request)

    def _open(self, act: Callable[[Session], OpenScan], request: gr.Request) -> Iterator[dict[Any, Any]]:
        session, scan = self.session(request), self.page.scan
        yield {scan.status: alert("busy", "Reading the scan"), scan.loader: None}
        try:
            act(session)
        except Exception as error:  # noqa: BLE001  told in a sentence; the scan that was open stays open
            yield {scan.status: alert("error", error_message(error)), scan.viewer: self.workstation.viewer_data(session)}
            return
        yield self.shown(session)

    def check(self, request: gr.Request) -> Any:
        """Show above the tabs whether the scan is out of distribution."""
        session = self.session(request)
        scan, words = session.scan, self.workstation.notice(session)
        return alert("warning", words) if session.scan is scan else gr.skip()  # else another scan was opened meanwhile

    def explain_answer(self, event: gr.EventData, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        number = int(event.value)
        yield from self._show("Computing the overlay", lambda session: self.workstation.explain(session, number), request)

    def find_phrase(self, words: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        yield from self._show("Computing the overlay", lambda session: self.workstation.find_phrase(session, words), request)

    def find_findings(self, words: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Draw masks of what is typed, or of the findings that the report states; the field is emptied afterwards."""
        for status, viewer in self._show("Segmenting findings", lambda session: self.workstation.segment(session, words), request):
            yield status, viewer, gr.skip() if status["visible"] else ""

    def find_named(self, event: gr.EventData, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Draw the mask of a finding that was clicked in the report or in an answer."""
        name = str(event.value)
        yield from self._show(f"Segmenting {name}", lambda session: self.workstation.segment(session, name), request)

    def remove_mask(self, event: gr.EventData, request: gr.Request) -> dict[str, Any]:
        session = self.session(request)
        self.workstation.remove_mask(session, int(event.value))
        return self.workstation.viewer_data(session)

    def _show(self, busy: str, act: Callable[[Session], None], request: gr.Request) -> Iterator[tuple[Any, ...]]:
        session = self.session(request)
        yield alert("busy", busy), self.workstation.viewer_data(session)
        try:
            act(session)
            yield no_alert(), self.workstation.viewer_data(session)
        except Exception as error:  # noqa: BLE001  told in a sentence
            yield alert("error", error_message(error)), self.workstation.viewer_data(session)

    def find_cases(self, request: gr.Request) -> Any:
        session = self.session(request)
        scan = session.scan
        try:
            found = case_cards(self.workstation.similar_cases(session))
        except Exception as error:  # noqa: BLE001  told in a sentence
            found = alert("error", error_message(error))["value"]
        return found if session.scan is scan else gr.skip()  # else another scan was opened meanwhile

    def add_key_image(self, event: gr.EventData, request: gr.Request) -> tuple[Any, Any]:
        session = self.session(request)
        try:
            low, high = event.value["window"]
            self.workstation.add_key_image(session, event.value["plane"], int(event.value["index"]), (float(low), float(high)))
        except ValueError as error:
            return alert("error", str(error)), gr.skip()
        return no_alert(), self.workstation.report_data(session)


class ConversationEvents(Events):
    """Handlers for asking, stopping and repeating questions."""

    def connect(self) -> None:
        region, log = self.page.conversation, self.page.conversation.log
        asking = [
            region.question.submit(self.ask, region.question, [region.question, log], **AT_ONCE),
            log.example_select(self.ask_suggested, None, log, **AT_ONCE),
            log.retry(self.retry, None, log, **AT_ONCE),
            log.edit(self.edit, None, log, **AT_ONCE),
        ]
        for step in asking:
            answered = step.then(
                self.answer, [region.temperature, region.top_p], log, show_progress_on=region.progress, show_progress="minimal",
                api_visibility="private", **EACH, **self.model_queue,
            )  # fmt: skip
            answered.then(self.show_places, None, [self.page.scan.status, self.page.scan.viewer], **EACH, **HIDDEN, **self.model_queue)
        log.stop(self.stop, None, log, **AT_ONCE)
        region.clear.click(self.clear, None, [log, self.page.scan.viewer], **AT_ONCE)

    def ask(self, words: str, request: gr.Request) -> tuple[str, dict[str, Any]]:
        """Ask the question and empty the field."""
        data = self._ask(lambda session: session.ask(words), request)
        return words if data["problem"] else "", data

    def ask_suggested(self, event: gr.EventData, request: gr.Request) -> dict[str, Any]:
        return self._ask(lambda session: session.ask(str(event.value)), request)

    def retry(self, request: gr.Request) -> dict[str, Any]:
        return self._ask(lambda session: session.ask_again(), request)

    def edit(self, event: gr.EventData, request: gr.Request) -> dict[str, Any]:
        return self._ask(lambda session: session.ask_again(str(event.value)), request)

    def _ask(self, act: Callable[[Session], Any], request: gr.Request) -> dict[str, Any]:
        session, problem = self.session(request), ""
        try:
            act(session)
        except ValueError as error:
            problem = str(error)
        return self.workstation.conversation_data(session, problem)

    def answer(self, temperature: float, top_p: float, request: gr.Request) -> Iterator[dict[str, Any]]:
        session = self.session(request)
        for _ in self.workstation.answer(session, temperature=temperature, top_p=top_p):
            yield self.workstation.conversation_data(session)
        yield gr.skip()  # where nothing waits for an answer, what was said about the question stays

    def stop(self, request: gr.Request) -> Any:
        session = self.session(request)
        session.stop()
        # While the answer is being written, its writer says how it ended; this, arriving later, would say that it is still written.
        return gr.skip() if session.turns and session.turns[-1].open else self.workstation.conversation_data(session)

    def clear(self, request: gr.Request) -> tuple[dict[str, Any], ...]:
        session = self.session(request)
        session.clear()
        return self.workstation.conversation_data(session), self.workstation.viewer_data(session)


class ReportEvents(Events):
    """Handlers for drafting, editing and illustrating the report."""

    def connect(self) -> None:
        region, summary = self.page.report, self.page.report.summary
        drafted = region.draft.click(
            self.draft, region.text, [region.text, summary], show_progress_on=summary, api_visibility="private", **self.model_queue
        )
        drafted.then(self.show_places, None, [self.page.scan.status, self.page.scan.viewer], **EACH, **HIDDEN, **self.model_queue)
        region.stop.click(self.stop, None, None, **AT_ONCE)
        # `input` leaves out what is deleted or pasted
        region.text.change(self.edit, region.text, summary, trigger_mode="always_last", **AT_ONCE)
        summary.select(self.remove_key_image, None, summary, **AT_ONCE)

    def draft(self, words: str, request: gr.Request) -> Iterator[tuple[str, dict[str, Any]]]:
        session = self.session(request)
        try:
            for _ in self.workstation.draft_report(session, words):
                yield session.report, self.workstation.report_data(session)
        except ValueError as error:
            yield session.report, self.workstation.report_data(session, str(error))

    def stop(self, request: gr.Request) -> None:
        self.session(request).stop_draft()

    def edit(self, words: str, request: gr.Request) -> dict[str, Any]:
        session, problem = self.session(request), ""
        try:
            self.workstation.edit_report(session, words)
        except ValueError as error:
            problem = str(error)
        return self.workstation.report_data(session, problem)

    def remove_key_image(self, event: gr.EventData, request: gr.Request) -> dict[str, Any]:
        session = self.session(request)
        self.workstation.remove_key_image(session, int(event.value))
        return self.workstation.report_data(session)

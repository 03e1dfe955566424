"""The page: what stands where, and which function of the workstation each control calls."""

import base64
import html
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from med3dvlm.app.insight import Case
from med3dvlm.app.programs import endpoints, sent, session_of
from med3dvlm.app.scans import EXAMPLES, OpenScan
from med3dvlm.app.sessions import Session
from med3dvlm.app.turns import MALFORMED, log, sentence
from med3dvlm.app.workstation import MOST_REPORT, Workstation
from med3dvlm.prompts import RESEARCH_NOTICE

HERE = Path(__file__).parent
# The browser's own fonts: a theme's may come from a font server.
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
THEME = gr.themes.Base(primary_hue="sky", secondary_hue="sky", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"])
LOG_OUT = '<a class="log-out" href="logout">Log out</a>'
VIEWER = ("common.js", "voxels.js", "pane.js", "measure.js", "hands.js", "play.js", "study.js", "viewer.js")  # of one scope, in this order
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
AT_ONCE: dict[str, Any] = HIDDEN | {"queue": False}


def file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8-sig")


def files(*names: str) -> str:
    """Scripts that run one after the other in one scope."""
    return "".join(file(name) for name in names)


def bar(kind: str, text: str) -> dict[str, Any]:
    """A line that the user should not miss, or none for empty `text`; `kind` is "error", "warning" or "busy"."""
    return gr.update(value=f'<div class="bar {kind}" role="alert">{html.escape(text)}</div>', visible=bool(text))


def described(scan: OpenScan) -> str:
    """Facts and warnings of a scan as HTML."""
    rows = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in scan.facts.items())
    doubts = "".join(f"<li>{html.escape(warning)}</li>" for warning in scan.warnings)
    return f'<dl class="facts">{rows}</dl>' + (f'<ul class="doubts">{doubts}</ul>' if doubts else "")


def compared(cases: list[Case]) -> str:
    """Similar cases as HTML, the nearest first."""
    cards = []
    for case in cases:
        image = ""
        if case.picture is not None:
            buffer = io.BytesIO()
            Image.fromarray(case.picture).save(buffer, "png")
            image = f'<img alt="middle slice" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        cards.append(f"<article>{image}<div><b>similarity {case.similarity:.4f}</b><p>{html.escape(case.report)}</p></div></article>")
    return f'<div class="cases">{"".join(cards)}</div>'


class Page(gr.Blocks):
    """Blocks that tell a caller in a sentence what Gradio would print, with the question in it, and answer by null."""

    async def process_api(self, *args: Any, **more: Any) -> dict[str, Any]:
        try:
            return await super().process_api(*args, **more)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:  # noqa: BLE001  told in a sentence
            log(error)
            raise gr.Error(MALFORMED, print_exception=False) from None


def build(workstation: Workstation, parallel: int = 2, accounts: bool = False) -> gr.Blocks:
    """The page around the workstation; `parallel` answers are written at a time, the others wait in a queue. With `accounts` people can log out."""

    def of(request: gr.Request) -> Session:
        return session_of(workstation, request)

    with Page(title="Med3DVLM", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as blocks:
        gr.HTML(
            f'<header class="masthead"><h1>Med3DVLM</h1><span class="model">{html.escape(workstation.model)}</span>'
            f'<span class="research" role="note">{RESEARCH_NOTICE}</span>'
            f"{LOG_OUT if accounts else ''}</header>"
        )
        ticket = gr.Textbox(visible="hidden", elem_id="ticket")
        with gr.Row(elem_id="workstation", equal_height=False):
            with gr.Column(scale=7, min_width=520, elem_id="left"):
                with gr.Row(elem_id="open", equal_height=True):
                    loader = sent(gr.File(label="Open a scan", file_count="multiple", height=76, elem_id="loader", scale=5, min_width=220))
                    with gr.Column(scale=2, min_width=200, elem_id="examples"):
                        examples = [gr.Button(name, size="sm", variant="secondary") for name in EXAMPLES]
                status = gr.HTML(visible=False, elem_id="status")
                viewer = gr.HTML(
                    workstation.view(Session()), html_template=file("viewer.html"), js_on_load=files(*VIEWER),
                    apply_default_css=False, elem_id="viewer",
                )  # fmt: skip
                with gr.Row(elem_id="finding", visible=workstation.insight.find is not None):
                    phrase = gr.Textbox(
                        show_label=False, label="A finding to look for", placeholder="Where does the scan resemble … (a finding, in words)",
                        submit_btn="Show", lines=1, max_lines=1, container=False, elem_id="phrase", max_length=200,
                    )  # fmt: skip
                facts = gr.HTML(elem_id="facts")
            with gr.Column(scale=4, min_width=340, elem_id="right"):
                notice = gr.HTML(visible=False, elem_id="notice")
                with gr.Tabs():
                    with gr.Tab("Conversation", id="conversation"):
                        talk = gr.HTML(
                            workstation.talk(Session()), html_template=file("conversation.html"), js_on_load=files("common.js", "conversation.js"),
                            apply_default_css=False, elem_id="talk",
                        )  # fmt: skip
                        question = gr.Textbox(
                            show_label=False, placeholder="Ask about the scan", submit_btn="Ask", lines=1, max_lines=5, elem_id="question",
                            container=False, label="Your question",
                        )  # fmt: skip
                        with gr.Row(elem_id="below"):
                            queue = gr.HTML('<span class="ready"></span>', elem_id="queue")
                            clear = gr.Button("Clear conversation", size="sm", variant="secondary", scale=0, min_width=150, elem_id="clear")
                        with gr.Accordion("Sampling", open=False, elem_id="sampling"):
                            temperature = gr.Slider(
                                0, 1.5, 0, step=0.1, label="Temperature", buttons=[],
                                info="0 takes the most likely word each time: the same question gets the same answer",
                            )  # fmt: skip
                            top_p = gr.Slider(
                                0.05,
                                1,
                                1,
                                step=0.05,
                                label="Top-p",
                                info="Words are drawn from the most likely ones, which together have this probability",
                                buttons=[],
                            )
                    with gr.Tab("Report", id="report", render_children=True):
                        with gr.Row(elem_id="drafting"):
                            draft = gr.Button("Draft the report", variant="primary", size="md", elem_id="draft")
                            end = gr.Button("Stop", variant="secondary", size="md", scale=0, min_width=90, elem_id="end-draft")
                        report = gr.Textbox(
                            show_label=False, label="Report", lines=14, max_lines=30, container=False, elem_id="report", max_length=MOST_REPORT,
                            placeholder="Let the model draft the report, then edit it here; or write it yourself.",
                        )  # fmt: skip
                        reading = gr.HTML(
                            workstation.reading(Session()), html_template=file("report.html"), js_on_load=files("common.js", "report.js"),
                            apply_default_css=False, elem_id="reading",
                        )  # fmt: skip
                    with gr.Tab("Similar cases", id="cases", visible=workstation.insight.similar is not None):
                        search = gr.Button("Find similar cases", variant="primary", size="md", elem_id="search")
                        cases = gr.HTML(elem_id="cases")

        opened = [status, viewer, facts, talk, notice, report, reading, cases]

        def shown(session: Session) -> dict[Any, Any]:
            scan = session.scan
            assert scan is not None
            return {
                status: bar("warning", " ".join(scan.warnings)),
                viewer: workstation.view(session), facts: described(scan), talk: workstation.talk(session), notice: bar("busy", ""),
                report: session.report, reading: workstation.reading(session), cases: "",
            }  # fmt: skip

        def opening(act: Callable[[Session], OpenScan], request: gr.Request) -> Iterator[dict[Any, Any]]:
            session = of(request)
            yield {status: bar("busy", "Reading the scan"), loader: None}
            try:
                act(session)
            except Exception as error:  # noqa: BLE001  told in a sentence; the scan that was open stays open
                yield {status: bar("error", sentence(error))}
                return
            yield shown(session)

        def read(uploads: list[str] | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
            yield from opening(lambda session: workstation.open_uploads(session, uploads or []), request)

        def take(name: str, request: gr.Request) -> Iterator[dict[Any, Any]]:
            yield from opening(lambda session: workstation.open_example(session, name), request)

        def switch(event: gr.EventData, request: gr.Request) -> Iterator[dict[Any, Any]]:
            number = int(event.value)
            yield from opening(lambda session: workstation.open_series(session, number), request)

        def look(request: gr.Request) -> Any:
            session = of(request)
            scan, words = session.scan, workstation.notice(session)
            return bar("warning", words) if session.scan is scan else gr.skip()  # else another scan was opened meanwhile

        def pose(act: Callable[[Session], Any], words: str, request: gr.Request) -> tuple[str, dict[str, Any]]:
            session = of(request)
            try:
                act(session)
            except ValueError as error:
                return words, workstation.talk(session, str(error))
            return "", workstation.talk(session)

        def ask(words: str, request: gr.Request) -> tuple[str, dict[str, Any]]:
            return pose(lambda session: session.pose(words), words, request)

        def suggested(event: gr.EventData, request: gr.Request) -> dict[str, Any]:
            return pose(lambda session: session.pose(str(event.value)), "", request)[1]

        def again(request: gr.Request) -> dict[str, Any]:
            return pose(lambda session: session.pose_again(), "", request)[1]

        def changed(event: gr.EventData, request: gr.Request) -> dict[str, Any]:
            return pose(lambda session: session.pose_again(str(event.value)), "", request)[1]

        def answer(temperature: float, top_p: float, request: gr.Request) -> Iterator[dict[str, Any]]:
            session = of(request)
            for _ in workstation.answer(session, temperature=temperature, top_p=top_p):
                yield workstation.talk(session)
            yield gr.skip()  # where nothing waits for an answer, what was said about the question stays

        def stop(request: gr.Request) -> Any:
            session = of(request)
            session.stop()
            # While the answer is being written, its writer says how it ended; this, arriving later, would say that it is still written.
            return gr.skip() if session.turns and session.turns[-1].open else workstation.talk(session)

        def empty(request: gr.Request) -> tuple[dict[str, Any], ...]:
            of(request).clear()
            return workstation.talk(of(request)), workstation.view(of(request))

        def write(words: str, request: gr.Request) -> Iterator[tuple[str, dict[str, Any]]]:
            session = of(request)
            try:
                for _ in workstation.draft(session, words):
                    yield session.report, workstation.reading(session)
            except ValueError as error:
                yield session.report, workstation.reading(session, str(error))

        def rewrite(words: str, request: gr.Request) -> dict[str, Any]:
            session, problem = of(request), ""
            try:
                workstation.rewrite(session, words)
            except ValueError as error:
                problem = str(error)
            return workstation.reading(session, problem)

        def explain(event: gr.EventData, request: gr.Request) -> Iterator[tuple[Any, ...]]:
            yield from covering(lambda session: workstation.explain(session, int(event.value)), request)

        def find(words: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
            yield from covering(lambda session: workstation.find(session, words), request)

        def covering(act: Callable[[Session], None], request: gr.Request) -> Iterator[tuple[Any, ...]]:
            session = of(request)
            yield bar("busy", "Computing the overlay"), workstation.view(session)
            try:
                act(session)
                yield bar("busy", ""), workstation.view(session)
            except Exception as error:  # noqa: BLE001  told in a sentence
                yield bar("error", sentence(error)), workstation.view(session)

        def resemble(request: gr.Request) -> Any:
            session = of(request)
            scan = session.scan
            try:
                found = compared(workstation.similar(session))
            except Exception as error:  # noqa: BLE001  told in a sentence
                found = bar("error", sentence(error))["value"]
            return found if session.scan is scan else gr.skip()  # else another scan was opened meanwhile

        def mark(event: gr.EventData, request: gr.Request) -> tuple[Any, Any]:
            session = of(request)
            try:
                low, high = event.value["window"]
                workstation.add_key_image(session, event.value["plane"], int(event.value["index"]), (float(low), float(high)))
            except ValueError as error:
                return bar("error", str(error)), gr.skip()
            return bar("busy", ""), workstation.reading(session)

        def unmark(event: gr.EventData, request: gr.Request) -> dict[str, Any]:
            workstation.remove_key_image(of(request), int(event.value))
            return workstation.reading(of(request))

        def end_draft(request: gr.Request) -> None:
            of(request).stop_draft()

        def arrive(token: str, request: gr.Request) -> dict[Any, Any]:
            try:
                session = workstation.sessions.arrive(request.session_hash or "", token or "", request.username)
            except ValueError as error:
                return {status: bar("error", str(error))}
            return {ticket: session.token} | (shown(session) if session.scan is not None else {})

        def leave(request: gr.Request) -> None:
            workstation.sessions.leave(request.session_hash or "")

        # "multiple": a step that Gradio would leave out, because the one before still runs, is another scan's or another question's
        opens: dict[str, Any] = {
            "concurrency_id": "read", "concurrency_limit": 1, "show_progress_on": status, "show_progress": "minimal",
            "api_visibility": "private", "trigger_mode": "multiple",
        }  # fmt: skip
        modelling: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": parallel}
        endpoints(workstation, modelling)  # before the page's own events, which would take their names
        for event, act, given in [(loader.upload, read, loader), *((button.click, take, button) for button in examples)]:
            waiting = event(lambda: bar("busy", "Waiting until another scan is read"), None, status, **AT_ONCE)
            waiting.then(act, given, [loader, *opened], **opens).then(look, None, notice, trigger_mode="multiple", **modelling, **HIDDEN)
        switched = viewer.option_select(switch, None, [loader, *opened], **opens)
        switched.then(look, None, notice, trigger_mode="multiple", **modelling, **HIDDEN)
        asking = [
            question.submit(ask, question, [question, talk], **AT_ONCE),
            talk.example_select(suggested, None, talk, **AT_ONCE),
            talk.retry(again, None, talk, **AT_ONCE),
            talk.edit(changed, None, talk, **AT_ONCE),
        ]
        for step in asking:
            step.then(
                answer, [temperature, top_p], talk, show_progress_on=queue, show_progress="minimal", api_visibility="private",
                trigger_mode="multiple", **modelling,
            )  # fmt: skip
        talk.stop(stop, None, talk, **AT_ONCE)
        clear.click(empty, None, [talk, viewer], **AT_ONCE)
        draft.click(write, report, [report, reading], show_progress_on=reading, api_visibility="private", **modelling)
        looking: dict[str, Any] = {**HIDDEN, **modelling}
        talk.select(explain, None, [status, viewer], **looking)
        phrase.submit(find, phrase, [status, viewer], **looking)
        viewer.select(mark, None, [status, reading], **AT_ONCE)
        reading.select(unmark, None, reading, **AT_ONCE)
        search.click(resemble, None, cases, show_progress="minimal", api_visibility="private", **modelling)
        end.click(end_draft, None, None, **AT_ONCE)
        report.change(rewrite, report, reading, trigger_mode="always_last", **AT_ONCE)  # `input` leaves out what is deleted or pasted
        blocks.load(arrive, ticket, [ticket, *opened], js=file("arrive.js"), **AT_ONCE)
        blocks.unload(leave)
    blocks.queue(api_open=False)  # nobody passes by the queue
    return blocks

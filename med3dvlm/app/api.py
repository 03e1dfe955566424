"""The workstation for programs: named endpoints that gradio_client calls.

    from gradio_client import Client, handle_file
    client = Client("http://127.0.0.1:7860")
    client.predict([handle_file("scan.nii.gz")], api_name="/open")          # what was read
    client.predict("Which organ is abnormal?", api_name="/ask")             # question, answer, confidence, seconds, ...
    for state in client.submit("And where?", api_name="/ask"): ...          # the same while it is written
    client.predict(handle_file("scan.nii.gz"), "Which organ is abnormal?", api_name="/answer")  # both in one, nothing is kept

`/open` also lists the series of a study, as [number, what it is, whether it is open]; `/series` opens another one by its number, also
where `/open` is refused because none is the scan beyond doubt.
A Client is a session of its own, as a browser's page is. `/answer` and `/report` belong to none; mcp_tools.py offers the same to agents.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from med3dvlm.app.scans import series_choices
from med3dvlm.app.session import Session
from med3dvlm.app.turns import MALFORMED, error_message
from med3dvlm.app.workstation import Workstation
from med3dvlm.prompts import REPORT_PROMPTS, RESEARCH_NOTICE


def uploaded_only(files: gr.File) -> gr.File:
    """Return the same component, made to refuse addresses, which Gradio would fetch."""
    move = files.async_move_resource_to_block_cache

    async def take(place: str | Path | None) -> str | None:
        if place is not None and "://" in str(place):
            raise gr.Error("Send the file itself: this server fetches nothing from an address.", print_exception=False)
        return await move(place)

    files.async_move_resource_to_block_cache = take  # type: ignore[assignment, method-assign]
    return files


def session_of(workstation: Workstation, request: gr.Request) -> Session:
    """Return the caller's session. Raises gr.Error for a call that names none, since all such calls would share one."""
    if not request.session_hash:
        raise gr.Error("The call names no session; give a session_hash, as gradio_client does.", print_exception=False)
    with sentences():
        return workstation.sessions.get(request.session_hash)


def endpoints(workstation: Workstation, modelling: dict[str, Any]) -> None:
    """Add the endpoints to the Blocks that is being built. `modelling`: how many of them may use the model at a time."""

    def of(request: gr.Request) -> Session:
        return session_of(workstation, request)

    def description(session: Session) -> dict[str, Any]:
        scan = session.scan
        return {"facts": scan.facts, "warnings": scan.warnings, "series": series_choices(scan, None)} if scan else {}

    def open_scan(files: list[str] | None, request: gr.Request) -> dict[str, Any]:
        with sentences():
            workstation.open_uploads(of(request), files or [])
        return description(of(request))

    def example(name: str, request: gr.Request) -> dict[str, Any]:
        with sentences():
            workstation.open_example(of(request), name)
        return description(of(request))

    def series(number: float | None, request: gr.Request) -> dict[str, Any]:
        if number is None or number != int(number):
            raise gr.Error(MALFORMED, print_exception=False)
        with sentences():
            workstation.open_series(of(request), int(number))
        return description(of(request))

    def notice(request: gr.Request) -> str:
        return workstation.notice(of(request))

    def ask(question: str, request: gr.Request) -> Iterator[dict[str, Any]]:
        yield from sample(question, 0, 1, request)

    def sample(question: str, temperature: float, top_p: float, request: gr.Request) -> Iterator[dict[str, Any]]:
        session = of(request)
        if None in (question, temperature, top_p):
            raise gr.Error(MALFORMED, print_exception=False)
        with sentences():
            turn = session.ask(question)
        for _ in workstation.answer(session, temperature=temperature, top_p=top_p):
            yield turn.shown()
        yield turn.shown()

    def stop(request: gr.Request) -> None:
        of(request).stop()

    def clear(request: gr.Request) -> None:
        of(request).clear()

    def answer(scan: str | None, question: str) -> dict[str, Any]:
        """Answer a question about one scan: a NIfTI, NRRD or MHA file, or a zip of a DICOM series. Research software only."""
        with sentences():
            return once(workstation, Session(), [scan] if scan else [], question)

    def report(scan: str | None) -> dict[str, Any]:
        """Draft the report of one scan: a NIfTI, NRRD or MHA file, or a zip of a DICOM series. Research software only."""
        return answer(scan, REPORT_PROMPTS[0])

    with gr.Column(visible=False):
        files, scan = uploaded_only(gr.File(file_count="multiple", label="Files of a scan")), uploaded_only(gr.File(label="Scan"))
        question, result = gr.Textbox(label="Question"), gr.JSON(label="Answer")
        temperature, top_p = gr.Number(0, label="Temperature"), gr.Number(1, label="Top-p")
        number = gr.Number(label="Series")
        name, words, button = gr.Textbox(label="Example"), gr.Textbox(label="Notice"), gr.Button()
    session_only: dict[str, Any] = {"api_visibility": "undocumented"}
    reading: dict[str, Any] = {"concurrency_id": "read"}
    button.click(open_scan, files, result, api_name="open", **reading, **session_only)
    button.click(example, name, result, api_name="example", **reading, **session_only)
    button.click(series, number, result, api_name="series", **reading, **session_only)
    button.click(notice, None, words, api_name="notice", **modelling, **session_only)
    button.click(ask, question, result, api_name="ask", **modelling, **session_only)
    button.click(sample, [question, temperature, top_p], result, api_name="sample", **modelling, **session_only)
    button.click(stop, None, None, api_name="stop", queue=False, **session_only)
    button.click(clear, None, None, api_name="clear", queue=False, **session_only)
    button.click(answer, [scan, question], result, api_name="answer", **modelling)
    button.click(report, scan, result, api_name="report", **modelling)


def once(workstation: Workstation, session: Session, uploads: list[str], question: str, keep: bool = True) -> dict[str, Any]:
    """Open a scan, ask, and close it again; `keep` as in `Workstation.open_uploads`. Raises ValueError where there is no answer."""
    try:
        workstation.open_uploads(session, uploads, keep)
        turn = session.ask(question)
        for _ in workstation.answer(session):
            pass
        if turn.state == "failed":
            raise ValueError(turn.answer)
        return turn.shown() | {"outside_training_data": workstation.notice(session), "notice": RESEARCH_NOTICE}
    finally:
        session.close()


@contextmanager
def sentences() -> Iterator[None]:
    """Turn errors into gr.Error with one sentence, which reaches the caller; Gradio hides others."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  told in a sentence
        raise gr.Error(error_message(error), print_exception=False) from None

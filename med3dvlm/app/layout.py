"""The components of the page by region; events.py says what they do."""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from med3dvlm.app.api import uploaded_only
from med3dvlm.app.scans import EXAMPLES
from med3dvlm.app.session import Session
from med3dvlm.app.workstation import MAX_REPORT, Workstation
from med3dvlm.prompts import RESEARCH_NOTICE

HERE = Path(__file__).parent
# The browser's own fonts: a theme's may come from a font server.
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
THEME = gr.themes.Base(primary_hue="sky", secondary_hue="sky", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"])
LOG_OUT = '<a class="log-out" href="logout">Log out</a>'
VIEWER = (
    "voxels.js",
    "pane.js",
    "measure.js",
    "masks.js",
    "input.js",
    "cine.js",
    "series.js",
    "viewer.js",
)  # they share a scope, in this order


def file(name: str) -> str:
    """Return the text of a file beside this one."""
    return (HERE / name).read_text(encoding="utf-8-sig")


def custom_html(name: str, value: dict[str, Any], elem_id: str, scripts: tuple[str, ...]) -> gr.HTML:
    """Make a component of our own: the template `name`.html, and scripts that run one after the other in one scope and draw `value`."""
    script = "".join(file(each) for each in ("common.js", *scripts))
    return gr.HTML(value, html_template=file(f"{name}.html"), js_on_load=script, apply_default_css=False, elem_id=elem_id)


@dataclass(frozen=True)
class ScanRegion:
    """The left column: open a scan, view it, search in it."""

    loader: gr.File
    examples: list[gr.Button]
    status: gr.HTML
    viewer: gr.HTML
    phrase: gr.Textbox
    facts: gr.HTML


@dataclass(frozen=True)
class ConversationRegion:
    """The tab with questions and answers."""

    log: gr.HTML
    question: gr.Textbox
    progress: gr.HTML
    clear: gr.Button
    temperature: gr.Slider
    top_p: gr.Slider


@dataclass(frozen=True)
class ReportRegion:
    """The tab with the report and its summary."""

    draft: gr.Button
    stop: gr.Button
    text: gr.Textbox
    summary: gr.HTML


@dataclass(frozen=True)
class CasesRegion:
    """The tab with similar cases."""

    search: gr.Button
    found: gr.HTML


@dataclass(frozen=True)
class Layout:
    """All regions, the hidden field with the session's token, and the notice above the tabs."""

    token: gr.Textbox
    scan: ScanRegion
    notice: gr.HTML
    conversation: ConversationRegion
    report: ReportRegion
    cases: CasesRegion


def lay_out(workstation: Workstation, accounts: bool) -> Layout:
    """Create all components inside the Blocks that is being built. With `accounts` there is a link to log out."""
    header(workstation.model, accounts)
    token = gr.Textbox(visible="hidden", elem_id="ticket")
    with gr.Row(elem_id="workstation", equal_height=False):
        with gr.Column(scale=7, min_width=520, elem_id="left"):
            scan = scan_region(workstation)
        with gr.Column(scale=4, min_width=340, elem_id="right"):
            notice = gr.HTML(visible=False, elem_id="notice")
            with gr.Tabs():
                with gr.Tab("Conversation", id="conversation"):
                    conversation = conversation_region(workstation)
                with gr.Tab("Report", id="report", render_children=True):
                    report = report_region(workstation)
                with gr.Tab("Similar cases", id="cases", visible=workstation.analysis.similar is not None):
                    cases = cases_region()
    return Layout(token, scan, notice, conversation, report, cases)


def header(model: str, accounts: bool) -> None:
    gr.HTML(
        f'<header class="masthead"><h1>Med3DVLM</h1><span class="model">{html.escape(model)}</span>'
        f'<span class="research" role="note">{RESEARCH_NOTICE}</span>'
        f"{LOG_OUT if accounts else ''}</header>"
    )


def scan_region(workstation: Workstation) -> ScanRegion:
    with gr.Row(elem_id="open", equal_height=True):
        loader = gr.File(label="Open a scan", file_count="multiple", height=76, elem_id="loader", scale=5, min_width=220)
        with gr.Column(scale=2, min_width=200, elem_id="examples"):
            examples = [gr.Button(name, size="sm", variant="secondary") for name in EXAMPLES]
    status = gr.HTML(visible=False, elem_id="status")
    viewer = custom_html("viewer", workstation.viewer_data(Session()), "viewer", VIEWER)
    analysis = workstation.analysis
    asks, act = "Where does the scan resemble … (a finding, in words)", "Show"
    if analysis.segment is not None:
        asks, act = "A finding in words; empty: those that the report states", "Find findings"
    with gr.Row(elem_id="finding", visible=analysis.find is not None or analysis.segment is not None):
        phrase = gr.Textbox(
            show_label=False, label="A finding to look for", placeholder=asks, submit_btn=act, lines=1, max_lines=1,
            container=False, elem_id="phrase", max_length=200,
        )  # fmt: skip
    facts = gr.HTML(elem_id="facts")
    return ScanRegion(uploaded_only(loader), examples, status, viewer, phrase, facts)


def conversation_region(workstation: Workstation) -> ConversationRegion:
    log = custom_html("conversation", workstation.conversation_data(Session()), "talk", ("conversation.js",))
    question = gr.Textbox(
        show_label=False, placeholder="Ask about the scan", submit_btn="Ask", lines=1, max_lines=5, elem_id="question",
        container=False, label="Your question",
    )  # fmt: skip
    with gr.Row(elem_id="below"):
        progress = gr.HTML('<span class="ready"></span>', elem_id="queue")
        clear = gr.Button("Clear conversation", size="sm", variant="secondary", scale=0, min_width=150, elem_id="clear")
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        temperature = gr.Slider(
            0, 1.5, 0, step=0.1, label="Temperature", buttons=[],
            info="0 takes the most likely word each time: the same question gets the same answer",
        )  # fmt: skip
        top_p = gr.Slider(
            0.05, 1, 1, step=0.05, label="Top-p", buttons=[],
            info="Words are drawn from the most likely ones, which together have this probability",
        )  # fmt: skip
    return ConversationRegion(log, question, progress, clear, temperature, top_p)


def report_region(workstation: Workstation) -> ReportRegion:
    with gr.Row(elem_id="drafting"):
        draft = gr.Button("Draft the report", variant="primary", size="md", elem_id="draft")
        stop = gr.Button("Stop", variant="secondary", size="md", scale=0, min_width=90, elem_id="end-draft")
    text = gr.Textbox(
        show_label=False, label="Report", lines=14, max_lines=30, container=False, elem_id="report", max_length=MAX_REPORT,
        placeholder="Let the model draft the report, then edit it here; or write it yourself.",
    )  # fmt: skip
    summary = custom_html("report", workstation.report_data(Session()), "reading", ("report.js",))
    return ReportRegion(draft, stop, text, summary)


def cases_region() -> CasesRegion:
    search = gr.Button("Find similar cases", variant="primary", size="md", elem_id="search")
    return CasesRegion(search, gr.HTML(elem_id="cases"))

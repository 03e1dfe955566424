"""Small pieces of HTML: the line that tells of an error, the facts of a scan, similar cases. Every word from outside is escaped."""

import base64
import html
import io
from typing import Any

import gradio as gr
from PIL import Image

from med3dvlm.app.analysis import Case
from med3dvlm.app.scans import OpenScan


def alert(kind: str, text: str) -> dict[str, Any]:
    """Show one line of `kind` "error", "warning" or "busy"; an empty `text` hides it."""
    return gr.update(value=f'<div class="bar {kind}" role="alert">{html.escape(text)}</div>', visible=bool(text))


def no_alert() -> dict[str, Any]:
    """Hide the line."""
    return alert("busy", "")


def scan_facts(scan: OpenScan) -> str:
    """Return facts and warnings of a scan as HTML."""
    rows = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in scan.facts.items())
    doubts = "".join(f"<li>{html.escape(warning)}</li>" for warning in scan.warnings)
    return f'<dl class="facts">{rows}</dl>' + (f'<ul class="doubts">{doubts}</ul>' if doubts else "")


def case_cards(cases: list[Case]) -> str:
    """Return similar cases as HTML, the nearest first."""
    cards = []
    for case in cases:
        image = ""
        if case.picture is not None:
            buffer = io.BytesIO()
            Image.fromarray(case.picture).save(buffer, "png")
            image = f'<img alt="middle slice" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        cards.append(f"<article>{image}<div><b>similarity {case.similarity:.4f}</b><p>{html.escape(case.report)}</p></div></article>")
    return f'<div class="cases">{"".join(cards)}</div>'

"""A drafted report: its sections, the findings that it states, and the files that it can be saved as.

    report = read_report("Findings: A nodule of 8 mm in the right upper lobe. No pleural effusion. Impression: Nodule.")
    report.sections   # Findings, Impression
    report.findings   # {"lung_nodule": "present", "pleural_effusion": "absent"}
    report_markdown(report), report_dicom(report, "scan_dicom/")

Whatever it is saved as, it begins with the notice that it is research output and that nobody has verified it.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from med3dvlm.formats.dicom_report import structured_report
from med3dvlm.metrics.findings import finding_states
from med3dvlm.prompts import RESEARCH_NOTICE

UNVERIFIED = f"Draft by a model, verified by nobody. {RESEARCH_NOTICE}"
# Section -> the headings that open it, as reports have them
HEADINGS = {
    "History": (
        "history",
        "clinical (?:information|history|indication|data)",
        "indications?",
        "reason for (?:the )?(?:exam|examination|study)",
    ),
    "Technique": ("technique", "procedure", "examination"),
    "Comparison": ("comparisons?", "prior (?:studies|examinations?)"),
    "Findings": ("(?:study )?findings?", "results?", "report", "description", "discussion"),
    "Impression": ("impressions?", "opinion", "assessment"),
    "Conclusion": ("conclusions?",),
    "Recommendation": ("recommendations?",),
}
KNOWN = "|".join(heading for headings in HEADINGS.values() for heading in headings)
# A heading opens a line, alone or with a colon, perhaps in Markdown's signs; after a sentence it needs the colon.
HEADING = re.compile(
    rf"^[ \t#*_]*(?P<line>{KNOWN})[ \t]*[*_]*[ \t]*(?::[ \t]*[*_]*|$)|(?<=[.;!?])[ \t]+(?P<inline>{KNOWN})[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
MARKDOWN_SIGNS = re.compile(r"([\\`*_{}\[\]<>#|&])")


@dataclass(frozen=True)
class Section:
    """A key of `HEADINGS` and the words under it."""

    heading: str
    text: str


@dataclass(frozen=True)
class Report:
    """The sections in the order of the text, and for every finding that it names "present", "uncertain" or "absent".

    `notes` are sentences on how it came about, which stand before it in every file.
    """

    sections: tuple[Section, ...]
    findings: dict[str, str]
    notes: tuple[str, ...] = ()


def read_report(text: str, notes: tuple[str, ...] = ()) -> Report:
    """Cut a text at its headings. What stands before the first, or a text without any, is Findings; a heading that comes again goes on.

    Raises:
        ValueError: the text is empty.
    """
    text = CONTROL.sub("", text.replace("\r\n", "\n"))
    if not text.strip():
        raise ValueError("The report is empty; draft or write it first.")
    found = list(HEADING.finditer(text))
    starts = [0, *(match.end() for match in found)]
    ends = [*(match.start() for match in found), len(text)]
    headings = ["Findings", *(_section(match["line"] or match["inline"]) for match in found)]
    parts: dict[str, list[str]] = {}
    for heading, start, end in zip(headings, starts, ends, strict=True):
        if words := text[start:end].strip():
            parts.setdefault(heading, []).append(words)
    if not parts:
        raise ValueError("The report has headings but no words under them; draft or write it first.")
    return Report(tuple(Section(heading, "\n".join(words)) for heading, words in parts.items()), finding_states(text), notes)


def report_text(report: Report) -> str:
    """Plain text."""
    parts = ["\n".join([UNVERIFIED, *report.notes]), *(f"{section.heading.upper()}\n{section.text}" for section in report.sections)]
    if stated := _stated(report):
        parts.append("\n".join(["RECOGNISED IN THE TEXT", *stated]))
    return "\n\n".join(parts) + "\n"


def report_markdown(report: Report) -> str:
    """Markdown, in which signs in the report stand for themselves."""
    parts = ["# Report", "\n>\n".join(f"> {line}" for line in (UNVERIFIED, *map(_plain, report.notes)))]
    parts += [f"## {section.heading}\n\n{_plain(section.text)}" for section in report.sections]
    if stated := _stated(report):
        parts.append("\n".join(["## Recognised in the text", "", *(f"- {line}" for line in stated)]))
    return "\n\n".join(parts) + "\n"


def report_json(report: Report) -> str:
    """JSON: "notice", "sections" [{"heading", "text"}], "findings" {name: state}, "notes" [sentence]."""
    return json.dumps({"notice": UNVERIFIED, **asdict(report)}, indent=1, ensure_ascii=False) + "\n"


def report_dicom(report: Report, scan: str | os.PathLike[str], series: int | None = None) -> bytes:
    """A DICOM Structured Report, unverified, that belongs to the patient and study of the scan's own files, which must still be there.

    Args:
        scan, series: what `read_volume` was given.

    Raises:
        VolumeError: the scan is no DICOM or gone, or its files cannot be referred to; one sentence.
    """
    sections = [(section.heading, [section.text]) for section in report.sections]
    if stated := _stated(report):
        sections.append(("Summary", stated))
    return structured_report(
        Path(scan), os.fspath(scan), series, " ".join([UNVERIFIED, *report.notes]), sections, f"Med3DVLM {version('med3dvlm')}"
    )


def _section(heading: str) -> str:
    """The section that a matched heading opens."""
    return next(name for name, known in HEADINGS.items() if re.fullmatch("|".join(known), heading, re.IGNORECASE))


def _stated(report: Report) -> list[str]:
    """A line a finding: "pleural effusion: absent"."""
    return [f"{name.replace('_', ' ')}: {state}" for name, state in report.findings.items()]


def _plain(text: str) -> str:
    """Markdown that shows the text as it is."""
    return MARKDOWN_SIGNS.sub(r"\\\1", text)

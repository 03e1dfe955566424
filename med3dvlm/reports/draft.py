"""A drafted report: its sections, the findings that it states, and the files that it can be saved as.

    report = read_report("Findings: A nodule of 8 mm in the right upper lobe. No pleural effusion. Impression: Nodule.")
    report.sections   # Findings, Impression
    report.findings   # {"lung_nodule": "present", "pleural_effusion": "absent"}
    report_markdown(report), report_dicom(report, "scan_dicom/")

Whatever it is saved as, it begins with the notice that it is research output and that nobody has verified it, and with what
`origin` gives: when it was saved, by which model it was drafted, and of what scan. Nothing in it names the patient; a DICOM report,
which is filed with the patient's study, takes the identity from the scan's own files.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.reports.dicom_sr import structured_report
from med3dvlm.reports.findings import finding_states, headings
from med3dvlm.volume import Volume

NOTICES = {
    author: f"{words} Nobody has verified it. {RESEARCH_NOTICE}"
    for author, words in {
        "model": "Draft written by a model.",
        "model, changed by hand": "Draft written by a model and changed by hand.",
        "hand": "Written by hand, not by a model.",
    }.items()
}
UNVERIFIED = NOTICES["model"]
PRINTED = {
    "date": "Saved", "model": "Model", "modality": "Modality", "shape": "Size (slices x rows x columns)", "spacing": "Spacing (z, y, x) in mm",
    "orientation": "Orientation", "unit": "Unit", "sha256": "SHA-256 of the voxels",
}  # fmt: skip
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
MARKDOWN_SIGNS = re.compile(r"([\\`*_{}\[\]<>#|&])")


@dataclass(frozen=True)
class Section:
    """A heading (a key of `sections` in `reports/findings/rules.yaml`) and the words under it."""

    heading: str
    text: str


@dataclass(frozen=True)
class KeyImage:
    """A picture that is saved with a report: `label` says what `png` shows, `place` which slice (D, from 0) it is, if it is one."""

    label: str
    png: bytes = field(repr=False)
    place: int | None = None


@dataclass(frozen=True)
class Report:
    """A report: sections in the order of the text, and for every finding that it names "present", "uncertain" or "absent".

    `author` is a key of `NOTICES`; `origin` (see the function) and `notes`, sentences on how the report came about, stand before it
    in every file.
    """

    sections: tuple[Section, ...]
    findings: dict[str, str]
    notes: tuple[str, ...] = ()
    author: str = "model"
    origin: dict[str, Any] = field(default_factory=dict)
    key_images: tuple[KeyImage, ...] = ()


def origin(volume: Volume, model: str | None = None) -> dict[str, Any]:
    """Return when a report was saved, by which model it was drafted, and of what scan, as values for JSON; nothing that names a patient.

    `sha256` is that of the voxels: `hashlib.sha256(read_volume(scan).array.tobytes()).hexdigest()` finds the scan again.
    """
    when = {"date": datetime.now().astimezone().isoformat(timespec="seconds")}
    return when | ({"model": model} if model else {}) | scan_facts(volume)


def scan_facts(volume: Volume) -> dict[str, Any]:
    """Describe the scan, as `origin` does."""
    modality = volume.modality if volume.modality and re.fullmatch("[A-Z]{2,4}", volume.modality) else None
    return {
        "modality": modality or ("CT" if volume.unit == "HU" else "unknown"),
        "shape": list(volume.shape),
        "spacing": volume.spacing and [round(mm, 4) for mm in volume.spacing],
        "orientation": volume.orientation,
        "unit": volume.unit,
        "sha256": hashlib.sha256(np.ascontiguousarray(volume.array).data).hexdigest(),
    }


def read_report(text: str, notes: tuple[str, ...] = (), **more: Any) -> Report:
    """Cut a text at its headings. What stands before the first, or a text without any, is Findings; a heading that comes again goes on.

    `notes` and `more` (author, origin, key_images) are the report's fields of these names.

    Raises:
        ValueError: the text is empty.
    """
    text = CONTROL.sub("", text.replace("\r\n", "\n"))
    if not text.strip():
        raise ValueError("The report is empty; draft or write it first.")
    found = headings(text)
    starts = [0, *(heading.end for heading in found)]
    ends = [*(heading.start for heading in found), len(text)]
    names = ["Findings", *(heading.section for heading in found)]
    parts: dict[str, list[str]] = {}
    for heading, start, end in zip(names, starts, ends, strict=True):
        if words := text[start:end].strip():
            parts.setdefault(heading, []).append(words)
    if not parts:
        raise ValueError("The report has headings but no words under them; draft or write it first.")
    return Report(tuple(Section(heading, "\n".join(words)) for heading, words in parts.items()), finding_states(text), notes, **more)


def report_text(report: Report) -> str:
    """Return the report as plain text."""
    parts = ["\n".join(_before(report)), *(f"{section.heading.upper()}\n{section.text}" for section in report.sections)]
    if stated := _stated(report):
        parts.append("\n".join(["RECOGNISED IN THE TEXT", *stated]))
    if labels := _labels(report):
        parts.append("\n".join(["KEY IMAGES", *labels]))
    return "\n\n".join(parts) + "\n"


def report_markdown(report: Report) -> str:
    """Return the report as Markdown, with the text's own signs escaped."""
    parts = ["# Report", "\n>\n".join(f"> {_plain(line)}" for line in _before(report))]
    parts += [f"## {section.heading}\n\n{_plain(section.text)}" for section in report.sections]
    if stated := _stated(report):
        parts.append("\n".join(["## Recognised in the text", "", *(f"- {line}" for line in stated)]))
    if labels := _labels(report):
        parts.append("\n".join(["## Key images", "", *(f"- {_plain(line)}" for line in labels)]))
    return "\n\n".join(parts) + "\n"


def report_json(report: Report) -> str:
    """Return the report as JSON: "notice", "author", "origin" {...}, "notes" [sentence], "sections" [{"heading", "text"}], "findings" {name:
    state}, "key_images".
    """
    content = {
        "notice": NOTICES[report.author],
        "author": report.author,
        "origin": report.origin,
        "notes": report.notes,
        "sections": [{"heading": section.heading, "text": section.text} for section in report.sections],
        "findings": report.findings,
        "key_images": [{"label": image.label, "slice": image.place} for image in report.key_images],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def report_zip(report: Report) -> bytes:
    """Return a zip of the report as text, Markdown and JSON, and of its key images as key_image_1.png and so on."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("report.txt", report_text(report))
        archive.writestr("report.md", report_markdown(report))
        archive.writestr("report.json", report_json(report))
        for number, image in enumerate(report.key_images, start=1):
            archive.writestr(f"key_image_{number}.png", image.png)
    return stream.getvalue()


def report_dicom(report: Report, scan: str | os.PathLike[str], series: int | None = None, source: str | None = None) -> bytes:
    """Return an unverified DICOM Structured Report that belongs to the patient and study of the scan's own files, which must still exist.

    Args:
        scan, series: what `read_volume` was given.
        source: what messages call the scan (default: its path).

    Raises:
        VolumeError: the scan is not DICOM or gone, or its files cannot be referred to; one sentence.
    """
    sections = [(section.heading, [section.text]) for section in report.sections]
    if stated := _stated(report):
        sections.append(("Summary", stated))
    pictures = [(image.label, image.place) for image in report.key_images]
    software = f"Med3DVLM {version('med3dvlm')}"
    return structured_report(Path(scan), source or os.fspath(scan), series, "\n".join(_before(report)), sections, software, pictures)


def _before(report: Report) -> list[str]:
    """Return the lines before the report: the notice, its origin, the notes."""
    lines = []
    for name, value in report.origin.items():
        if value is not None:
            lines.append(f"{PRINTED.get(name, name)}: {' x '.join(f'{part:g}' for part in value) if isinstance(value, list) else value}")
    return [NOTICES[report.author], *lines, *report.notes]


def _labels(report: Report) -> list[str]:
    """Return a line for each key image."""
    return [f"{number}: {image.label}" for number, image in enumerate(report.key_images, start=1)]


def _stated(report: Report) -> list[str]:
    """Return a line for each finding: "pleural effusion: absent"."""
    return [f"{name.replace('_', ' ')}: {state}" for name, state in report.findings.items()]


def _plain(text: str) -> str:
    """Escape a text for Markdown."""
    return MARKDOWN_SIGNS.sub(r"\\\1", text)

"""Drafted reports: sections by their headings, findings with their state, and saved files."""

import hashlib
import io
import json
import re
import zipfile
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

from med3dvlm.reports.dicom_sr import CODES
from med3dvlm.reports.draft import (
    UNVERIFIED,
    KeyImage,
    Report,
    Section,
    origin,
    read_report,
    report_json,
    report_markdown,
    report_text,
    report_zip,
)
from med3dvlm.volume import Volume

PLAIN = "Axial CT of the chest. Lung nodule of 18 mm in the left upper lobe. No pleural effusion or emphysema."


def sections(text: str) -> list[tuple[str, str]]:
    return [(section.heading, section.text) for section in read_report(text).sections]


def test_a_text_without_headings_is_findings() -> None:
    assert sections(PLAIN) == [("Findings", PLAIN)]
    assert read_report(PLAIN).findings == {"lung_nodule": "present", "pleural_effusion": "absent", "emphysema": "absent"}


@pytest.mark.parametrize(
    "text",
    [
        "Findings: A nodule.\nImpression: Benign.",
        "FINDINGS:\nA nodule.\n\nIMPRESSION:\nBenign.\n",
        "Findings\nA nodule.\nImpression\nBenign.",
        "**Findings:** A nodule.\n**Impression**: Benign.",
        "## Findings\nA nodule.\n\n## Impression\nBenign.",
        "Findings: A nodule. Impression: Benign.",
        "Findings : A nodule.\r\nIMPRESSIONS : Benign.",
        "A nodule.\nOpinion: Benign.",
    ],
)
def test_headings_in_every_form(text: str) -> None:
    assert sections(text) == [("Findings", "A nodule."), ("Impression", "Benign.")]


def test_every_known_heading_opens_its_section() -> None:
    written = {
        "History": ["History", "Clinical information", "Clinical history", "Indication", "Reason for the examination"],
        "Technique": ["Technique", "Procedure"],
        "Comparison": ["Comparison", "Prior studies"],
        "Findings": ["Findings", "Study findings", "Result", "Report", "Description"],
        "Impression": ["Impression", "Impressions", "Opinion", "Assessment"],
        "Conclusion": ["Conclusion", "Conclusions"],
        "Recommendation": ["Recommendation", "Recommendations"],
    }
    assert set(written) == set(CODES) - {"Summary"}
    for heading, forms in written.items():
        for form in forms:
            assert sections(f"{form}: Words.") == sections(f"{form.upper()}\nWords.") == [(heading, "Words.")], form


def test_words_that_are_not_headings() -> None:
    for text in ("The findings of last year are unchanged.", "Results: none.".replace(":", " are"), "In conclusion, normal findings."):
        assert sections(text) == [("Findings", text)]
    assert sections("Technique: CT. The impression: is no heading within a sentence.")[0][0] == "Technique"
    assert len(sections("Technique: CT. The impression: is no heading within a sentence.")) == 1


def test_repeated_headings_are_merged_and_empty_ones_left_out() -> None:
    assert sections("Findings: One.\nImpression:\nFindings: Two.") == [("Findings", "One.\nTwo.")]


@pytest.mark.parametrize("text", ["", " \n\t", "Findings:\n\nImpression:", "\x00\x07"])
def test_an_empty_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="draft or write it first"):
        read_report(text)


def test_the_files_hold_notice_sections_and_findings() -> None:
    report = read_report("Findings: Possible emphysema.\nImpression: No nodule.")
    assert report == Report((Section("Findings", "Possible emphysema."), Section("Impression", "No nodule.")), report.findings)
    stated = {"emphysema": "uncertain", "lung_nodule": "absent"}
    assert report.findings == stated
    assert json.loads(report_json(report)) == {
        "notice": UNVERIFIED,
        "author": "model",
        "origin": {},
        "key_images": [],
        "sections": [{"heading": "Findings", "text": "Possible emphysema."}, {"heading": "Impression", "text": "No nodule."}],
        "findings": stated,
        "notes": [],
    }
    assert report_text(report) == (
        f"{UNVERIFIED}\n\nFINDINGS\nPossible emphysema.\n\nIMPRESSION\nNo nodule.\n\n"
        "RECOGNISED IN THE TEXT\nemphysema: uncertain\nlung nodule: absent\n"
    )
    assert report_markdown(report) == (
        f"# Report\n\n> {UNVERIFIED}\n\n## Findings\n\nPossible emphysema.\n\n## Impression\n\nNo nodule.\n\n"
        "## Recognised in the text\n\n- emphysema: uncertain\n- lung nodule: absent\n"
    )
    assert "not a medical device" in UNVERIFIED
    noted = replace(report, notes=("Model: a_b.", "Incomplete."))
    assert report_text(noted) == report_text(report).replace(UNVERIFIED, f"{UNVERIFIED}\nModel: a_b.\nIncomplete.")
    assert report_markdown(noted) == report_markdown(report).replace(UNVERIFIED, f"{UNVERIFIED}\n>\n> Model: a\\_b.\n>\n> Incomplete.")
    assert json.loads(report_json(noted))["notes"] == ["Model: a_b.", "Incomplete."]


def test_a_file_states_scan_time_and_author() -> None:
    array = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    volume = Volume(array, (2.5, 0.7, 0.71234567), "SPL", unit="HU", source="Doe_Jane.nii")
    before = datetime.now(timezone.utc) - timedelta(seconds=1)
    report = read_report("A nodule.", origin=origin(volume, "demo/model"), author="hand")
    found = json.loads(report_json(report))
    assert before < datetime.fromisoformat(found["origin"].pop("date")) <= datetime.now(timezone.utc)
    voxels = hashlib.sha256(b"".join(int(value).to_bytes(2, "little") for value in range(24))).hexdigest()
    assert found["origin"] == {
        "model": "demo/model", "modality": "CT", "shape": [2, 3, 4], "spacing": [2.5, 0.7, 0.7123], "orientation": "SPL", "unit": "HU",
        "sha256": voxels,
    }  # fmt: skip
    for written in (report_text(report), report_markdown(report).replace("\\", "")):
        assert "Written by hand, not by a model. Nobody has verified it." in written and "Draft" not in written
        for line in ("Model: demo/model", "Size (slices x rows x columns): 2 x 3 x 4", f"SHA-256 of the voxels: {voxels}", "Saved: 20"):
            assert line in written
        assert "Doe" not in written
    named = replace(volume, modality="DOE^JANE")
    assert origin(named)["modality"] == "CT" and origin(replace(volume, modality="MR", unit="arbitrary"))["modality"] == "MR"


def test_a_zip_holds_the_report_and_its_key_images() -> None:
    report = read_report("A nodule.", key_images=(KeyImage("axial, slice 1 of 2", b"one", 1), KeyImage("coronal", b"two")))
    with zipfile.ZipFile(io.BytesIO(report_zip(report))) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert files.pop("key_image_1.png") == b"one" and files.pop("key_image_2.png") == b"two"
    assert files == {
        "report.txt": report_text(report).encode(),
        "report.md": report_markdown(report).encode(),
        "report.json": report_json(report).encode(),
    }
    assert "KEY IMAGES\n1: axial, slice 1 of 2\n2: coronal" in report_text(report)
    assert json.loads(report_json(report))["key_images"][0] == {"label": "axial, slice 1 of 2", "slice": 1}


def test_a_report_saved_as_text_is_read_again() -> None:
    report = read_report("Technique: CT.\nFindings: A nodule.\nRecommendation: None.")
    body = report_text(report).split("\n\n", 1)[1].split("\n\nRECOGNISED")[0]
    assert read_report(body) == report


def test_markdown_characters_are_escaped() -> None:
    """Removing the backslashes by CommonMark's rule gives the report back."""
    text = "A <script>alert(1)</script> of *5* [mm](http://x) `code` & # \\ | {x}"
    written = report_markdown(read_report(text)).split("## Findings\n\n")[1].strip()
    assert not re.search(r"(?<!\\)(\\\\)*[<>*`\[#|]", written.replace("\\\\", ""))
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", written) == text

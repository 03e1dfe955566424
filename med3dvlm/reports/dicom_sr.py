"""Write a report as a DICOM Structured Report about the DICOM files that a scan was read from.

Patient and study are copied into it from the scan's own files (see `dicom_study.py`).

The tree is that of a basic diagnostic imaging report (DICOM PS3.16, TID 2000): sections of text. It is an Enhanced SR, marked as partial,
preliminary and unverified, and says in its first words that it is research output.
"""

import io
import warnings as python_warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from med3dvlm.formats.base import VolumeError
from med3dvlm.reports.dicom_study import MUST_BE_THERE, REFERENCE, UTF_8, headers_of, identify, stack_of

SERIES_NUMBER = 9000  # far from those that scanners give
SERIES_DESCRIPTION = "Research report, not verified"
# Section -> codes and meanings of the section and of a text in it (DICOM PS3.16, CID 7001 and 7002)
CODES = {
    "History": (("121060", "History"), ("121060", "History")),
    "Technique": (("121064", "Current Procedure Descriptions"), ("121065", "Procedure Description")),
    "Comparison": (("121068", "Previous Findings"), ("121069", "Previous Finding")),
    "Findings": (("121070", "Findings"), ("121071", "Finding")),
    "Impression": (("121072", "Impressions"), ("121073", "Impression")),
    "Conclusion": (("121076", "Conclusions"), ("121077", "Conclusion")),
    "Recommendation": (("121074", "Recommendations"), ("121075", "Recommendation")),
    "Summary": (("121111", "Summary"), ("121071", "Finding")),
}
KEY_IMAGES, KEY_IMAGE, LABEL = ("121180", "Key Images"), ("121080", "Best illustration of finding"), ("121106", "Comment")


def structured_report(
    path: Path,
    source: str,
    series: int | None,
    notice: str,
    sections: Sequence[tuple[str, Sequence[str]]],
    software: str,
    pictures: Sequence[tuple[str, int | None]] = (),
) -> bytes:
    """Return the bytes of a DICOM file: a report about the scan that `formats.read` gives for the first three arguments.

    Args:
        notice: what stands before everything else.
        sections: headings, keys of `CODES`, each with its texts.
        software: name and version of what wrote it.
        pictures: key images: what each shows in words, and which slice of the scan (D, from 0) it is, None for a cut through several.

    Raises:
        VolumeError: the path holds no DICOM scan, its files lack the numbers (UIDs) to refer to, or their values cannot be written.
    """
    with python_warnings.catch_warnings():  # pydicom's quote values, which may tell who the patient is
        python_warnings.simplefilter("ignore")
        with stack_of(path, source, series, "report") as stack:
            headers = headers_of(stack, source, "report")
            marked = [(label, None if place is None else (headers[stack[place].path], stack[place].frame)) for label, place in pictures]
            report = _document(list(headers.values()), notice, sections, software, marked)
            stream = io.BytesIO()
            try:
                identify(report, next(iter(headers.values())))
                report.save_as(stream, enforce_file_format=True)
            except Exception:  # pydicom raises nearly anything on values that break the standard, and quotes them
                raise VolumeError(
                    f"{source}: the DICOM files' values for patient and study break the standard, so a structured report cannot hold them; "
                    "save the report as text, Markdown or JSON."
                ) from None
    return stream.getvalue()


def _document(
    headers: Sequence[Any],
    notice: str,
    sections: Sequence[tuple[str, Sequence[str]]],
    software: str,
    pictures: Sequence[tuple[str, tuple[Any, int] | None]],
) -> Any:
    """Return the report without patient; for each picture it takes the caption and, where it is a slice, header and frame (from 0) of its file."""
    from highdicom import UID, sr
    from highdicom.sr.templates import DEFAULT_LANGUAGE
    from pydicom.dataset import Dataset
    from pydicom.sr.codedict import codes

    contains = sr.RelationshipTypeValues.CONTAINS

    def coded(code: tuple[str, str]) -> Any:
        return sr.CodedConcept(code[0], "DCM", code[1])

    def container(code: tuple[str, str], items: Iterable[Any]) -> Any:
        made = sr.ContainerContentItem(coded(code), is_content_continuous=False, relationship_type=contains)
        made.ContentSequence = sr.ContentSequence(list(items))
        return made

    def text(code: tuple[str, str], words: str) -> Any:
        return sr.TextContentItem(coded(code), words, relationship_type=contains)

    def key_images() -> Iterator[Any]:
        for label, slice_ in pictures:
            yield text(LABEL, label)
            if slice_ is not None:
                header, frame = slice_
                frames = [frame + 1] if header.get("NumberOfFrames") else None
                uids = header.SOPClassUID, header.SOPInstanceUID
                yield sr.ImageContentItem(coded(KEY_IMAGE), *uids, referenced_frame_numbers=frames, relationship_type=contains)

    root = sr.ContainerContentItem(codes.LN.DiagnosticImagingReport, is_content_continuous=False, template_id="2000")
    observer = sr.DeviceObserverIdentifyingAttributes(UID(), name=software)
    items = sr.ContentSequence()
    items.extend(sr.LanguageOfContentItemAndDescendants(DEFAULT_LANGUAGE))
    items.extend(sr.ObserverContext(codes.DCM.Device, observer))
    items.append(text(LABEL, notice))
    for heading, texts in sections:
        of_section, of_text = CODES[heading]
        items.append(container(of_section, (text(of_text, words) for words in texts)))
    if pictures:
        items.append(container(KEY_IMAGES, key_images()))
    root.ContentSequence = items

    evidence = []
    for header in headers:
        reference = Dataset()
        reference.update({keyword: header.get(keyword) for keyword in REFERENCE} | dict.fromkeys(MUST_BE_THERE))
        evidence.append(reference)
    return sr.EnhancedSR(
        evidence,
        root,
        series_instance_uid=UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=UID(),
        instance_number=1,
        manufacturer=software,
        is_complete=False,
        is_final=False,
        is_verified=False,
        series_description=SERIES_DESCRIPTION,
        specific_character_set=UTF_8,
    )

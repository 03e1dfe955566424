"""Reports on disk, and labelled ones: one CSV with both, or CT-RATE's two, joined on their first common column.

text     report_text, or Findings_EN and Impressions_EN, or report, or text
id       AccessionNo, VolumeName or id; else the row's number
patient  patient; else the id as far as its second "_" ("train_7_a_1" -> "train_7")
labels   every other column that holds nothing but 0 and 1, under its name in small letters joined by "_"
         ("Lung nodule" -> lung_nodule), or the one that rules.yaml has for it ("effusion" -> pleural_effusion)
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from med3dvlm.datasets.csv_files import csv_rows, is_missing, label_value
from med3dvlm.reports.findings import finding_name

TEXTS = (("report_text",), ("Findings_EN", "Impressions_EN"), ("report",), ("text",))
IDS = ("AccessionNo", "VolumeName", "id")
NOT_GIVEN = "Not given."
HALVES = ("tuning", "held-out")


@dataclass(frozen=True)
class LabelledReports:
    """N reports and K findings; `labels` (N, K) of 0 and 1, columns in the order of `names`."""

    ids: list[str]
    patients: list[str]
    texts: list[str]
    names: tuple[str, ...]
    labels: NDArray[np.int64]

    def half(self, name: str) -> "LabelledReports":
        """Return the reports of half of the patients, split by the last bit of SHA-256 of the patient's name, 0 for "tuning".

        Raises:
            ValueError: if there is no such half, or nobody in it.
        """
        if name not in HALVES:
            raise ValueError(f"There is no half {name!r}; known are {', '.join(HALVES)}")
        wanted = HALVES.index(name)
        rows = [row for row, patient in enumerate(self.patients) if hashlib.sha256(patient.encode()).digest()[-1] % 2 == wanted]
        if not rows:
            raise ValueError(f"None of the {len(self.ids)} reports is in the {name} half; score all of them")
        ids, patients, texts = ([column[row] for row in rows] for column in (self.ids, self.patients, self.texts))
        return LabelledReports(ids, patients, texts, self.names, self.labels[rows])


class Reports(NamedTuple):
    """N reports, and the column of their ids, "id" where the file has none."""

    column: str
    ids: list[str]
    texts: list[str]


def read_reports(path: Path) -> Reports:
    """Read the reports of a CSV file.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: there are no texts; the message says what is needed.
    """
    return _reports(path, _rows(path))


def read_labelled_reports(reports: Path, labels: Path | None = None) -> LabelledReports:
    """Read the reports of a CSV file, with the labels in it or those of a second file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there are no texts, no labels, or a report has none; the message says where and what is needed.
    """
    rows = _rows(reports)
    _, ids, texts = _reports(reports, rows)
    labelled = rows if labels is None else _joined(reports, rows, labels)
    about = {*(name for names in TEXTS for name in names), *IDS, "patient"}
    names = [name for name in labelled[0] if name not in about and all(_is_label(row[name]) for row in labelled)]
    if not names:
        raise ValueError(f"{labels or reports} has no column of labels: one per finding, 0 or 1 in every row, is needed")
    findings = [finding_name(re.sub(r"\W+", "_", name.strip().lower())) for name in names]
    if twice := sorted({name for name in findings if findings.count(name) > 1}):
        raise ValueError(f"{labels or reports} has several columns for {', '.join(twice)}; delete all but one of each")
    return LabelledReports(
        ids,
        [_patient(one, row.get("patient", "")) for one, row in zip(ids, rows, strict=True)],
        texts,
        tuple(findings),
        np.array([[label_value(name, row[name]) for name in names] for row in labelled], dtype=np.int64),
    )


def _reports(path: Path, rows: list[dict[str, str]]) -> Reports:
    columns = list(rows[0])
    text_columns = next((names for names in TEXTS if set(names) <= set(columns)), None)
    if text_columns is None:
        raise ValueError(f"{path} has no column of texts ({', '.join(' + '.join(names) for names in TEXTS)}); it has {columns}")
    identity = next((name for name in IDS if name in columns), None)
    ids = [row[identity] if identity else str(number) for number, row in enumerate(rows, start=1)]
    given = [[row[name].strip() for name in text_columns if not is_missing(row[name])] for row in rows]
    return Reports(identity or "id", ids, [" ".join(text for text in texts if text != NOT_GIVEN) for texts in given])


def _patient(identity: str, stated: str) -> str:
    return "_".join(identity.split("_")[:2]) if is_missing(stated) else stated


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; pass a CSV file of reports")
    rows = [row for _, row in csv_rows(path, ())]
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def _joined(reports: Path, rows: list[dict[str, str]], labels: Path) -> list[dict[str, str]]:
    """Return the rows of `labels` in the order of the reports."""
    others = _rows(labels)
    key = next((name for name in rows[0] if name in others[0]), None)
    if key is None:
        raise ValueError(f"{reports} and {labels} have no column in common to join them on, such as VolumeName")
    found = {row[key]: row for row in others}
    if missing := [row[key] for row in rows if row[key] not in found]:
        raise ValueError(f"{len(missing)} of {len(rows)} reports have no row in {labels}, such as {key} {missing[0]}")
    return [found[row[key]] for row in rows]


def _is_label(text: str) -> bool:
    try:
        return label_value("", text) is not None
    except ValueError:
        return False

"""Shared by eval/zero_shot.py and eval/linear_probe.py: labels and thresholds of findings, and the files of a detection.

The findings are those that the scored studies have labels of, CT-RATE's 18 and any others (`reports.findings.label_names`).

<output>/predictions.jsonl              a study a line, with the log-odds of each finding; 0 is a probability of 0.5
<output>/predictions_thresholds.jsonl   the same of the studies that thresholds are chosen on, if any
<output>/probabilities.csv              VolumeName and a column a finding, named as in CT-RATE's own labels
<output>/scores.json, scores.md         and roc.png, precision_recall.png, calibration.png

Shapes: N studies, K findings, in the order of `names`.
"""

import argparse
import copy
import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from med3dvlm import plots
from med3dvlm.datasets.store import PreparedData
from med3dvlm.encoders import Encoder, count_parameters
from med3dvlm.encoders.cost import operations
from med3dvlm.evaluation.cases import predictions
from med3dvlm.evaluation.detection_tables import COMPARED, detection_tables
from med3dvlm.evaluation.paper_tables import frequencies
from med3dvlm.evaluation.runs import other_patients, training_split, write_scores
from med3dvlm.files import read_lines, write_text
from med3dvlm.metrics.classification import THRESHOLD_RULES
from med3dvlm.metrics.detection import choose_known_thresholds, detection_scores, label_control, reliability
from med3dvlm.prompts import finding_words
from med3dvlm.records import Study
from med3dvlm.reports.findings import label_names

Table = NDArray[np.float64]
FIFTH = 5  # of a training split at most this part serves for thresholds
HALF = "0.5 for every finding"
PREDICTIONS, OF_THRESHOLDS, BLIND = (
    "predictions.jsonl",
    "predictions_thresholds.jsonl",
    "predictions_blind.jsonl",
)  # the last of an empty volume
HOW_TO_LABEL = {  # source of a study -> where its labels are read
    "table": "give the table columns such as label:effusion, 0 or 1",
    "ct_rate": "put CT-RATE's multi_abnormality_labels beside the volumes",
    "m3d": "put a labels.csv beside the texts, with the columns study and one a finding",
}


def add_threshold_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threshold-split",
        help="split that thresholds are chosen on, of other patients than those scored, or 'none' for 0.5 "
        "(default: a split called valid..., else a part of the training split, else 0.5)",
    )
    parser.add_argument(
        "--threshold-rule",
        choices=THRESHOLD_RULES,
        default="youden",
        help="highest recall + specificity, the ROC point nearest to (0, 1), or highest F1 (default: %(default)s)",
    )


def names_of(studies: Sequence[Study]) -> list[str]:
    """Return the findings that any of the studies has a label of."""
    return label_names(study.labels for study in studies)


def label_table(studies: Sequence[Study], names: Sequence[str]) -> Table:
    """Return labels (N, K) of 0 and 1, NaN where unknown."""
    return np.array([[study.labels.get(name, np.nan) for name in names] for study in studies], dtype=np.float64).reshape(-1, len(names))


def require_labels(data: PreparedData, split: str, studies: Sequence[Study]) -> None:
    """Raise ValueError if no study has a label of any finding."""
    if not names_of(studies):
        raise ValueError(
            f"none of the {len(studies)} studies of split {split!r} in {data.root} has a label of a finding, so there is nothing to compare "
            f"with; {HOW_TO_LABEL.get(studies[0].source, HOW_TO_LABEL['table'])} and prepare again"
        )


def whole_patients(studies: Sequence[Study], most: int) -> list[Study]:
    """Return the studies of whole patients, at most `most` together but at least one patient, in the order of the SHA-256 of their names."""
    by_patient: dict[str, list[Study]] = {}
    for study in studies:
        by_patient.setdefault(study.patient, []).append(study)
    part: list[Study] = []
    for patient in sorted(by_patient, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if part and len(part) + len(by_patient[patient]) > most:
            break
        part += by_patient[patient]
    chosen = {study.id for study in part}
    return [study for study in studies if study.id in chosen]


def threshold_studies(data: PreparedData, evaluated: str, scored: Sequence[Study], wanted: str | None) -> tuple[list[Study], str]:
    """Return the studies that thresholds are chosen on, none of a patient who is scored, and a description of them.

    Args:
        evaluated, scored: the split that is scored and its studies.
        wanted: name of a split, "none", or None: a split whose name begins with "valid", else of the training split as many studies
            as are scored, a fifth at most, else none. Not with patients of the scored ones, as in CT-RATE's "valid" and "valid_fixed".

    Raises:
        ValueError: the split that is wanted is unknown, has patients of the scored studies, or no labels.
    """
    patients = {study.patient for study in data.studies(evaluated)} | {study.patient for study in scored}
    if wanted == "none":
        return [], f"{HALF}, as asked"
    if wanted:
        studies = data.studies(wanted)
        if common := sorted(patients & {study.patient for study in studies}):
            raise ValueError(
                f"--threshold-split {wanted} has {len(common)} patients of split {evaluated!r}; thresholds may not come from what is scored"
            )
        require_labels(data, wanted, studies)
        return studies, f"chosen on split {wanted!r}, {len(studies)} studies"
    training = training_split(data, evaluated)
    for split in (*(split for split in sorted(data.summary["splits"]) if split.startswith("valid")), training):
        studies = data.studies(split) if split else []
        if not studies or patients & {study.patient for study in studies} or not names_of(studies):
            continue
        if split != training:
            return studies, f"chosen on split {split!r}, {len(studies)} studies"
        part = whole_patients(studies, min(len(scored), len(studies) // FIFTH))
        words = f"chosen on {len(part)} studies of split {split!r}, whole patients"
        return part, f"{words}, on which the model may have been trained: there is no third split"
    return [], f"{HALF}, since there are no labelled studies of other patients to choose on"


def encoder_facts(encoder: Encoder, name: str, size: Sequence[int]) -> dict[str, Any]:
    """Return name and cost of an image encoder for volumes of `size`, as in the papers' tables."""
    depth, height, width = size
    count = operations(copy.deepcopy(encoder).to("meta"), (depth, height, width))
    return {"name": name, "parameters": sum(count_parameters(encoder).values()), "operations": count, "size": list(size)}


def row(identity: str, names: Sequence[str], log_odds: Iterable[float]) -> dict[str, Any]:
    """Return a line of predictions, to 6 decimals, where float32 ends. A finding of NaN, which was not predicted, is left out."""
    pairs = zip(names, log_odds, strict=True)
    return {"id": identity, "log_odds": {name: round(float(value), 6) for name, value in pairs if not np.isnan(value)}}


def log_odds_table(found: Iterable[Mapping[str, float]], names: Sequence[str]) -> Table:
    """Return (N, K) of the "log_odds" of lines of predictions; NaN where a finding was not predicted."""
    rows = [[log_odds.get(name, np.nan) for name in names] for log_odds in found]
    return np.array(rows, dtype=np.float64).reshape(-1, len(names))


@dataclass(frozen=True)
class Detection:
    """Predictions for N studies, and for M studies of other patients on which thresholds are chosen. `log_odds` is (N, K) and
    `threshold_log_odds` (M, K), NaN where a finding was not predicted; `blind` is (K,), of an empty volume, None where not computed;
    `threshold_source` describes the studies of the thresholds.
    """

    names: Sequence[str]
    studies: Sequence[Study]
    log_odds: Table
    threshold_studies: Sequence[Study]
    threshold_log_odds: Table
    threshold_source: str
    blind: Table | None = None

    @classmethod
    def read(
        cls, output: Path, names: Sequence[str], studies: Sequence[Study], threshold_studies: Sequence[Study], threshold_source: str
    ) -> "Detection":
        """Read the predictions in the folder `output`. Raises ValueError where they are of other studies."""

        def table(name: str, expected: Sequence[Study]) -> Table:
            lines = predictions(output / name, [{"id": study.id} for study in expected]) if expected else ()
            return log_odds_table((line["log_odds"] for line in lines), names)

        log_odds, blind = table(PREDICTIONS, studies), None
        if (output / BLIND).is_file():
            blind = log_odds_table((line["log_odds"] for line in read_lines(output / BLIND)), names)[0]
        others = table(OF_THRESHOLDS, threshold_studies)
        return cls(names, studies, log_odds, threshold_studies, others, threshold_source, blind)


def report(output: Path, task: str, found: Detection, rule: str, about: Mapping[str, Any], remarks: Sequence[str] = ()) -> str:
    """Score a detection and write everything but the predictions; returns the tables.

    Args:
        task: "zero_shot" or "linear_probe", by which the papers' tables are found.
        rule: which of THRESHOLD_RULES.
        about: what else belongs into the scores.
        remarks: sentences for the end of the tables.
    """
    names, studies, log_odds, others = found.names, found.studies, found.log_odds, found.threshold_studies
    labels, patients = label_table(studies, names), [study.patient for study in studies]
    labels = np.where(np.isnan(log_odds), np.nan, labels)
    rules = {rule: np.zeros(len(names))}
    if others:
        known = np.where(np.isnan(found.threshold_log_odds), np.nan, label_table(others, names))
        rules = {name: choose_known_thresholds(known, found.threshold_log_odds, name) for name in (rule, "nearest")}
    columns = {"model": log_odds}
    if found.blind is not None:
        columns["blind"] = np.tile(found.blind, (len(studies), 1))
    if place := other_patients(studies):
        columns["shuffled"] = log_odds[place]
    columns["everything"] = np.ones_like(log_odds)
    compared = {}
    for name, column in columns.items():
        thresholds = np.zeros(len(names)) if name == "everything" else rules[rule]
        compared[name] = detection_scores(labels, column, thresholds, names, patients, rules.get("nearest"))
    calibration, control = reliability(labels, log_odds), label_control(labels, log_odds, patients)
    scores = {
        "task": task,
        **about,
        "thresholds": {"from": found.threshold_source, "rule": rule if others else None, "studies": len(others)},
        **compared["model"],
        "calibration": calibration,
        "permuted_labels": control,
        **{name: compared.get(name) for name in COMPARED if name != "model"},
    }
    tables = detection_tables(scores, compared, frequencies(), remarks)
    write_text(output / "probabilities.csv", _csv(studies, names, log_odds))
    draw(output, scores, names, labels, log_odds)
    write_scores(output / "scores.json", scores, tables)
    return tables


def _csv(studies: Sequence[Study], names: Sequence[str], log_odds: Table) -> str:
    """Return probabilities under CT-RATE's column names; empty where a finding was not predicted."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("VolumeName", *map(finding_words, names)))
    for study, values in zip(studies, expit(log_odds).tolist(), strict=True):
        name = f"{study.id.rpartition('/')[2]}.nii.gz" if study.source == "ct_rate" else study.id
        table.writerow((name, *("" if np.isnan(value) else f"{value:.9g}" for value in values)))
    return text.getvalue()


def draw(output: Path, scores: Mapping[str, Any], names: Sequence[str], labels: Table, log_odds: Table) -> None:
    """Draw the curves of the findings that have them, and the calibration."""
    findings = {}
    for index, name in enumerate(names):
        rows = ~np.isnan(labels[:, index])
        if name in scores["per_class"] and name not in scores["one_class"]:
            findings[name] = labels[rows, index], log_odds[rows, index]
    if findings:
        plots.roc_curves(findings, output / "roc.png")
        plots.precision_recall_curves(findings, output / "precision_recall.png")
    plots.calibration_curve(scores["calibration"]["bins"], output / "calibration.png")

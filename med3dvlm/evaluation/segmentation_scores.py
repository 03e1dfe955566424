"""Scores of masks, from the records that eval/segmentation.py writes; its text says what the figures are."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from med3dvlm.inference.segmentation import PRESENCE
from med3dvlm.metrics.detection import reliability
from med3dvlm.metrics.intervals import intervals, mean_of, ratio_of
from med3dvlm.tables import markdown_table, with_interval

LARGE = 8.0  # mm
CONTROLS = ("mean_mask", "other_patient", "one_mask")
OPERATING_POINTS = sorted({0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, PRESENCE})
FIGURES = {"dice": "Dice", "nsd": "surface distance", "hd95": "Hausdorff 95 (mm)", "pointing": "pointing"}
Row = dict[str, Any]


def summary(rows: Sequence[Row], patients: Sequence[str]) -> Row:
    """Return the figures of some cases, present and absent, each with its interval; None where there is no case."""
    present = [place for place, row in enumerate(rows) if row["present"]]
    statistics: dict[str, Any] = {}
    values: dict[str, float | None] = {}

    def add(name: str, column: Sequence[float | None]) -> None:
        table = np.array([np.nan if value is None else value for value in column], dtype=np.float64)
        values[name] = None if np.isnan(table).all() else float(np.nanmean(table))
        if values[name] is not None:
            statistics[name] = mean_of(table)

    for name in FIGURES:
        add(name, [row.get(name) for row in rows])
    for control in ("middle", "chance", *CONTROLS):
        for name in ("dice", "pointing"):
            add(f"{control}.{name}", [row.get(control, {}).get(name) for row in rows])
    add("absent", [None if row["present"] else float(row["voxels"] > 0) for row in rows])
    pairs, extra, missed = np.array([row["components"] for row in rows], dtype=np.float64).reshape(-1, 3).T
    if (total := 2 * pairs + extra + missed).sum():
        values["f1"], statistics["f1"] = float(2 * pairs.sum() / total.sum()), ratio_of(2 * pairs, total)
    spans = intervals(statistics, patients) if statistics else {}
    figures = {name: {"value": value, "interval": spans.get(name)} for name, value in values.items() if value is not None}
    drawn = sum(rows[place]["voxels"] > 0 for place in present)
    return {"present": len(present), "drawn": drawn, "absent": len(rows) - len(present), "figures": figures}


def studies_with_an_absent_finding_drawn(records: Sequence[Row], patients: Sequence[str]) -> Row | None:
    """Return the share of the studies with an absent finding for which any is drawn; None without such a study."""
    drawn = [[row["voxels"] > 0 for row in record["findings"] if not row["present"]] for record in records]
    if not any(drawn):
        return None
    column = [float(any(each)) if each else np.nan for each in drawn]
    span = intervals({"share": mean_of(column)}, patients)["share"]
    return {"value": float(np.nanmean(column)), "interval": span, "studies": sum(map(bool, drawn))}


def operating_point(records: Sequence[Row], presence: float) -> Row:
    """Return what is drawn where all findings are whose score of presence exceeds this one; None for what has no case."""

    def mean(values: Sequence[float]) -> float | None:
        return float(np.mean(values)) if values else None

    drawn = [
        [(row, row["at_any_presence"]["voxels"] > 0 and row["presence"] > presence) for row in record["findings"]] for record in records
    ]
    cases = [case for each in drawn for case in each]
    wrong = [[shown for row, shown in each if not row["present"]] for each in drawn]
    return {
        "presence": presence,
        "drawn": mean([shown for row, shown in cases if row["present"]]),
        "dice": mean([row["at_any_presence"]["dice"] * shown for row, shown in cases if row["present"]]),
        "absent": mean([shown for each in wrong for shown in each]),
        "studies": mean([any(each) for each in wrong if each]),
    }


def scores_of(records: Sequence[Row], patients: Sequence[str]) -> Row:
    """Return scores.json, from the records of studies and the patient of each."""
    rows = [row for record in records for row in record["findings"]]
    of_rows = [patient for patient, record in zip(patients, records, strict=True) for _ in record["findings"]]
    kinds = sorted({row["finding"] for row in rows})

    def chosen(keep: Sequence[bool]) -> Row:
        return summary(
            [row for row, one in zip(rows, keep, strict=True) if one], [name for name, one in zip(of_rows, keep, strict=True) if one]
        )

    large = [not row["present"] or row["mm"] >= LARGE for row in rows]
    labels = np.array([[float(row["present"])] for row in rows])
    sure = np.clip([[row["presence"]] for row in rows], 1e-6, 1 - 1e-6)
    return {
        "studies": len(records),
        "without_spacing": sum(any(row.get("spacing") is False for row in record["findings"]) for record in records),
        "all": summary(rows, of_rows),
        "large": chosen(large),
        "studies_with_an_absent_finding_drawn": studies_with_an_absent_finding_drawn(records, patients),
        "operating_points": [operating_point(records, presence) for presence in OPERATING_POINTS],
        "calibration": reliability(labels, np.log(sure / (1 - sure))),
        "findings": {kind: chosen([row["finding"] == kind for row in rows]) for kind in kinds},
    }


def table(scores: Row) -> str:
    """Return Markdown: the model and the controls, then a line a finding."""

    def cell(entry: Row, name: str, spans: bool = True) -> str | None:
        figure = entry["figures"].get(name)
        if figure is None:
            return None
        return with_interval(figure["value"], figure["interval"] if spans else None)

    whole, large = scores["all"], scores["large"]
    lines = [["model, all findings", *(cell(whole, name) for name in (*FIGURES, "f1"))]]
    lines += [[f"model, {LARGE:g} mm and more", *(cell(large, name) for name in (*FIGURES, "f1"))]]
    for control in ("middle", *CONTROLS, "chance"):
        lines += [[f"{control.replace('_', ' ')}, {LARGE:g} mm and more", *(cell(large, f"{control}.{name}") for name in FIGURES), None]]
    rows = [
        [
            kind,
            entry["present"],
            entry["drawn"],
            *(cell(entry, name, False) for name in (*FIGURES, "f1")),
            entry["absent"],
            cell(entry, "absent", False),
        ]
        for kind, entry in scores["findings"].items()
    ]
    shown = [*FIGURES.values(), "F1 of components"]
    parts = [
        f"{whole['present']} findings of {scores['studies']} studies, {whole['drawn']} of them drawn; {whole['absent']} asked for that are absent.",
        markdown_table(("", *shown), lines),
        f"Mask drawn for an absent finding: {cell(whole, 'absent') or '-'}. Calibration error of presence: {scores['calibration']['ece']:.3f}.",
        markdown_table(("finding", "present", "drawn", *shown, "absent", "drawn though absent"), rows),
    ]
    if of_studies := scores["studies_with_an_absent_finding_drawn"]:
        share = with_interval(of_studies["value"], of_studies["interval"])
        parts.insert(3, f"Studies in which any absent finding is drawn: {share} of {of_studies['studies']}.")
        points = [[f"{point['presence']:g}", *list(point.values())[1:]] for point in scores["operating_points"]]
        parts.insert(4, markdown_table(("presence above", "findings drawn", "Dice", "absent drawn", "in studies"), points))
    if scores["without_spacing"]:
        parts.append(f"{scores['without_spacing']} studies have no spacing; their voxels count as 1 mm.")
    return "\n\n".join(parts)

"""The masks of report.html (eval/page.py): figures of eval/segmentation.py beside its controls, and cases as pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation.page_cases import EDGE, picture
from med3dvlm.evaluation.segmentation import unpacked
from med3dvlm.evaluation.segmentation_scores import CONTROLS, FIGURES, LARGE
from med3dvlm.plots.slices import grey, take_slice
from med3dvlm.records import Study

MAX_PICTURES = 24
COLOURS = {"true": (63, 224, 224), "drawn": (255, 159, 67)}
Row = dict[str, Any]


def figures(scores: Row) -> Row:
    """Return the lines of two tables: the model and the controls, and a line for each finding."""

    def line(label: str, entry: Row, prefix: str = "") -> Row:
        values = [entry["figures"].get(prefix + name) or {"value": None, "interval": None} for name in (*FIGURES, "f1")]
        return {"label": label, "values": values}

    large = scores["large"]
    lines = [line("model, all findings", scores["all"]), line(f"model, {LARGE:g} mm and more", large)]
    controls = ("middle", *CONTROLS, "chance")
    lines += [line(f"{name.replace('_', ' ')}, {LARGE:g} mm and more", large, f"{name}.") for name in controls]
    findings = [line(name, entry) | {"entry": entry} for name, entry in scores["findings"].items()]
    return {"columns": [*FIGURES.values(), "F1 of components"], "lines": lines, "findings": findings} | {
        "absent": scores["all"]["figures"].get("absent"),
        "studies": scores["studies_with_an_absent_finding_drawn"],
        "calibration": scores["calibration"]["ece"],
    }


def pictures(rows: Sequence[Row], data: PreparedData, studies: Mapping[str, Study]) -> list[Row]:
    """Draw at most MAX_PICTURES present findings, evenly over the split: the slice with most of each, with the outlines of the true and of the
    predicted mask.
    """
    cases = [(row["id"], finding) for row in rows for finding in row["findings"] if "slice" in finding]
    places = np.linspace(0, len(cases) - 1, min(MAX_PICTURES, len(cases)))
    shown = []
    for name, finding in (cases[place] for place in sorted({round(place) for place in places})):
        volume = data.processor.dequantize(data.volume(studies[name]))[0].numpy()  # (D, H, W)
        true = data.masks(studies[name], [finding["finding"]])[0].numpy()
        number = finding["slice"]
        drawn = unpacked(finding["drawn_slice"], true.shape[1:])
        image = outlined(volume[number], {"true": true[number], "drawn": drawn}, data.processor.grid.values)
        shown.append({"id": name, "finding": finding["finding"], "dice": finding["dice"], "mm": finding["mm"], "picture": picture(image)})
    return shown


def outlined(plane: NDArray[np.float32], masks: Mapping[str, NDArray[np.bool_]], window: tuple[float, float]) -> NDArray[np.uint8]:
    """Return a slice (H, W) with the outlines of masks, as colours (rows, columns, 3) for a screen."""
    larger = max(1, EDGE // max(plane.shape))

    def turned(values: NDArray[Any]) -> NDArray[Any]:
        shown, _ = take_slice(values[None], 0, 0, None, "SPL")
        return shown.repeat(larger, axis=0).repeat(larger, axis=1)

    image = np.stack([turned(grey(plane, window))] * 3, axis=-1)
    for name, mask in masks.items():
        shown = turned(mask)
        image[shown & ~binary_erosion(shown)] = COLOURS[name]
    return image

"""A picture of a store of prepared data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.plots.canvas import BLUE, GREEN, GREY, ORANGE, check_any, new_page, plain, save

COLOURS = (BLUE, ORANGE, GREEN, GREY)


def prepared_volumes(index: Sequence[Mapping[str, Any]], splits: Mapping[str, str], values: tuple[float, float], path: str | Path) -> Path:
    """Plot four panels: intensity histograms per split as the model sees them, the scans' slice distances, their slices, their rows.

    Args:
        index: lines of a store's index.jsonl.
        splits: study -> split.
        values: the lowest and highest value that a model sees, between which the histograms' bins lie.
    """
    check_any(splits, "prepared_volumes", "study")
    page = new_page(9.6, 6.4)
    grid = page.add_gridspec(2, 2)
    axes = page.add_subplot(grid[0, 0])
    edges = np.linspace(*values, len(index[0]["histogram"]) + 1)
    for split, colour in zip(sorted(set(splits.values())), COLOURS * len(index), strict=False):
        shares = np.mean([line["histogram"] for line in index if splits[line["study"]] == split], axis=0) / 1e4
        axes.stairs(shares, edges, color=colour, linewidth=1.6, label=split)
    axes.set_yscale("log")
    axes.set(title="intensities of the prepared volumes", xlabel="value as the model sees it", ylabel="share of voxels")
    axes.legend(frameon=False, fontsize=8)
    plain(axes)
    spacings = np.array([line["spacing"] for line in index if line["spacing"] is not None]).reshape(-1, 3)
    shapes = np.array([line["shape"] for line in index])
    panels = (
        (grid[0, 1], "spacing of the scans", "mm", {"between slices": spacings[:, 0], "between rows": spacings[:, 1]}),
        (grid[1, 0], "slices of the scans", "slices", {"": shapes[:, 0]}),
        (grid[1, 1], "size of a slice", "voxels", {"rows": shapes[:, 1], "columns": shapes[:, 2]}),
    )
    for place, title, unit, series in panels:
        axes = page.add_subplot(place)
        _histograms(axes, series)
        axes.set(title=title, xlabel=unit, ylabel="scans")
        plain(axes)
    return save(page, path)


def _histograms(axes: Any, series: Mapping[str, Any]) -> None:
    known = [values for values in series.values() if len(values)]
    if not known:
        axes.text(0.5, 0.5, "unknown", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    low, high = min(values.min() for values in known), max(values.max() for values in known)
    edges = np.linspace(low, high if high > low else low + 1, 31)
    for (label, values), colour in zip(series.items(), COLOURS, strict=False):
        axes.stairs(np.histogram(values, edges)[0], edges, color=colour, linewidth=1.6, label=label or None)
    if any(series):
        axes.legend(frameon=False, fontsize=8)

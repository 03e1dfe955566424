"""Numbers as curves and bars: losses, retrieval, answers, findings."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from med3dvlm.plots.canvas import BLUE, GREEN, GREY, LABEL_BACKGROUND, ORANGE, check_any, new_page, plain, readable, save


def loss_curves(curves: Mapping[str, Sequence[tuple[float, float]]], path: str | Path) -> Path:
    """Plot the logged losses and their running mean, one panel a training stage, from `{"stage 1": [(step, loss), ...], ...}`."""
    check_any(curves, "loss_curves", "stage")
    page = new_page(3.6 * len(curves) + 0.6, 3.4)
    for index, (name, points) in enumerate(curves.items()):
        axes = page.add_subplot(1, len(curves), index + 1)
        steps, losses = np.array([point[0] for point in points]), np.array([point[1] for point in points], dtype=float)
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(steps, _running_mean(losses), color=BLUE, linewidth=1.8, marker="o" if len(points) == 1 else None)
        axes.set(title=name, xlabel="step", ylabel="loss" if index == 0 else "")
        plain(axes)
    return save(page, path)


def retrieval_curve(curves: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, chance: float | None = None) -> Path:
    """Plot recall against k, from `{"image to text": [(k, recall), ...], ...}` (see `metrics.retrieval.recall_curve`).

    `chance` is recall@1 of a random ranking, 1 / pool; the dashed line is k times that.
    """
    check_any(curves, "retrieval_curve", "direction")
    page = new_page(5.2, 3.8)
    axes = page.add_subplot()
    styles = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (GREY, ":"))
    for (name, points), (colour, line) in zip(curves.items(), styles * len(curves), strict=False):
        marker = "o" if len(points) < 20 else None
        axes.plot(
            [k for k, _ in points],
            [recall for _, recall in points],
            line,
            color=colour,
            label=name,
            marker=marker,
            linewidth=1.8,
        )
    largest = max(k for points in curves.values() for k, _ in points)
    if chance is not None:
        ks = np.geomspace(1, max(largest, 1.001), 100)
        axes.plot(ks, np.minimum(1, ks * chance), color=GREY, linestyle=":", linewidth=1.2, label="chance")
    axes.set_xscale("log")
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if k <= largest]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set(xlabel="k", ylabel="recall@k", ylim=(0, 1.03), title="Partner among the first k")
    axes.legend(frameon=False, loc="best")
    plain(axes)
    return save(page, path)


def vqa_bars(accuracy: Mapping[str, float], blind: Mapping[str, float], path: str | Path, chance: float = 0.25) -> Path:
    """Plot accuracy by question kind beside that of the same model on an empty volume (`blind`, kinds may be missing)."""
    check_any(accuracy, "vqa_bars", "question kind")
    page = new_page(max(4.5, 1.15 * len(accuracy) + 1.2), 3.6)
    axes = page.add_subplot()
    positions = np.arange(len(accuracy))
    series = [("with the scan", accuracy, BLUE, -0.2), ("blind (empty volume)", blind, ORANGE, 0.2)]
    for label, scores, colour, offset in series if blind else series[:1]:
        values = [scores.get(kind, math.nan) for kind in accuracy]
        bars = axes.bar(positions + offset * bool(blind), values, width=0.38, color=colour, label=label)
        axes.bar_label(
            bars,
            ["" if math.isnan(value) else f"{value:.2f}" for value in values],
            fontsize=8,
            padding=2,
            bbox=LABEL_BACKGROUND,
        )
    axes.axhline(chance, color=GREY, linestyle="--", linewidth=1.2, label=f"chance ({chance:.2f})")
    axes.set_xticks(positions, [readable(kind) for kind in accuracy])
    axes.set(ylabel="accuracy", ylim=(0, 1.08))
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
    plain(axes)
    return save(page, path)


def findings_bars(
    scores: Mapping[str, float | None],
    path: str | Path,
    baseline: Mapping[str, float | None] | None = None,
    label: str = "F1",
    support: Mapping[str, int] | None = None,
) -> Path:
    """Plot one horizontal bar a finding, best first; None (nothing to score) reads "none".

    `baseline` adds a mark to each bar, `support` the number of positives to each name.
    """
    check_any(scores, "findings_bars", "finding")
    order = sorted(scores, key=lambda name: -1.0 if scores[name] is None else float(scores[name] or 0), reverse=True)
    page = new_page(6.4, 0.27 * len(order) + 1.3)
    axes = page.add_subplot()
    rows = np.arange(len(order))
    axes.barh(rows, [scores[name] or 0 for name in order], color=BLUE, height=0.7, label=label)
    for row, name in enumerate(order):
        value = scores[name]
        axes.text(1.02, row, "none" if value is None else f"{value:.2f}", va="center", fontsize=8)
    if baseline is not None:
        values = [math.nan if baseline.get(name) is None else float(baseline[name] or 0) for name in order]
        axes.scatter(
            values,
            rows,
            color=ORANGE,
            edgecolor="black",
            linewidth=0.5,
            marker="D",
            s=22,
            zorder=3,
            label="baseline",
            clip_on=False,
        )
    names = [readable(name) + (f" ({support.get(name, 0)})" if support is not None else "") for name in order]
    axes.set_yticks(rows, names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel=label, ylim=(len(order) - 0.4, -0.6))
    if baseline is not None:
        axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
    plain(axes, grid="x")
    return save(page, path)


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the centred mean over about a twentieth of the points; NaN stays a gap."""
    reach = len(values) // 40
    means = [values[max(0, index - reach) : index + reach + 1].mean() for index in range(len(values))]
    return np.array(means)

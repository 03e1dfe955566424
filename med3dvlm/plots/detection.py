"""Plots of the detection of findings: ROC curves, precision-recall curves, and calibration.

A finding is `name: (labels, scores)`, (n,) each: 0 and 1, and scores, the higher the likelier.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from med3dvlm.plots.canvas import BLUE, GREY, ORANGE, check_any, new_page, plain, readable, save

COLUMNS = 6
Findings = Mapping[str, tuple[Any, Any]]


def roc_curves(findings: Findings, path: str | Path) -> Path:
    """Plot a panel a finding, for findings that some studies have and some have not; its title is the area."""
    from sklearn.metrics import roc_auc_score, roc_curve

    def draw(axes: Any, labels: Any, scores: Any) -> str:
        fallout, recall, _ = roc_curve(labels, scores)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
        axes.plot(fallout, recall, color=BLUE, linewidth=1.6)
        return f"{roc_auc_score(labels, scores):.2f}"

    return _panels(findings, path, draw, "1 - specificity", "recall")


def precision_recall_curves(findings: Findings, path: str | Path) -> Path:
    """Plot precision against recall, a panel a finding; the dotted line is the share of studies with the finding, which guessing reaches."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    def draw(axes: Any, labels: Any, scores: Any) -> str:
        precision, recall, _ = precision_recall_curve(labels, scores)
        axes.axhline(float(sum(labels)) / len(labels), color=GREY, linestyle=":", linewidth=1)
        axes.step(recall, precision, where="post", color=BLUE, linewidth=1.6)
        return f"{average_precision_score(labels, scores):.2f}"

    return _panels(findings, path, draw, "recall", "precision")


def calibration_curve(bins: Sequence[tuple[float, float, int]], path: str | Path) -> Path:
    """Plot the share of present findings against the stated probability, from (mean probability, share, decisions) of each bin, and the bins'
    sizes.
    """
    if not bins:
        raise ValueError("calibration_curve needs at least one bin, got none.")
    page = new_page(4.6, 5.0)
    above, below = page.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    stated, present, decisions = zip(*bins, strict=True)
    above.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2, label="as stated")
    above.plot(stated, present, color=BLUE, marker="o", markersize=4, linewidth=1.6, label="measured")
    above.set(ylabel="share with the finding", ylim=(-0.02, 1.02), title="Calibration, all findings together")
    above.legend(frameon=False)
    below.bar(stated, decisions, width=0.06, color=ORANGE)
    below.set(xlabel="probability stated", ylabel="decisions", xlim=(-0.04, 1.04))
    for axes in (above, below):
        plain(axes)
    return save(page, path)


def _panels(findings: Findings, path: str | Path, draw: Callable[[Any, Any, Any], str], across: str, upwards: str) -> Path:
    check_any(findings, Path(path).stem, "finding")
    rows, columns = -(-len(findings) // COLUMNS), min(COLUMNS, len(findings))
    width, height = max(1.6 * columns + 0.7, 3.2), 1.9 * rows + 0.6
    page = new_page(width, height, layout="none")
    page.subplots_adjust(left=0.6 / width, right=1 - 0.1 / width, bottom=0.6 / height, top=1 - 0.35 / height, wspace=0.12, hspace=0.38)
    panels = page.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels[0, 0].set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    for axes, (name, (labels, scores)) in zip(panels.flat, findings.items(), strict=False):
        area = draw(axes, labels, scores)
        axes.set_title(f"{readable(name)}\n{area}", fontsize=6.5)
        axes.tick_params(labelsize=6)
        plain(axes, grid="both")
    for axes in panels.flat[len(findings) :]:
        axes.set_axis_off()
    for axes in panels[-1]:
        axes.set_xlabel(across, fontsize=7)
    for axes in panels[:, 0]:
        axes.set_ylabel(upwards, fontsize=7)
    return save(page, path)

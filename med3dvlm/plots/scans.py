"""Scans: a montage of one, and cases with what was written about them. Volumes are arrays (D, H, W), spacings (z, y, x) in mm."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from med3dvlm.geometry.orientation import OPPOSITE, is_orientation, letters_towards, slice_axes
from med3dvlm.plots.canvas import BLUE, LABEL_BACKGROUND, new_page, save
from med3dvlm.plots.slices import grey, take_slice

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Scan(NamedTuple):
    """What is drawn: the volume (D, H, W), its geometry as for `montage`, and the intensities of black and white."""

    volume: NDArray[np.float32]
    spacing: Any
    orientation: str | None
    window: tuple[float, float]
    direction: NDArray[np.float64] | None = None


def cases(studies: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw one row a study: its three middle slices, then reference and prediction.

    Each study is `{"array": (D, H, W) in 0..1, "reference", "prediction"}` with optional "name", "title", "spacing"
    and "orientation" (as for `montage`). Rows grow with their text; what exceeds 34 lines ends in "[...]".
    """
    if not studies:
        raise ValueError("cases needs at least one study, got none.")
    texts = [_case_text(study) for study in studies]
    line, width = 0.145, 11.0  # inches
    heights = [max(1.9, line * sum(len(lines) for _, lines in text) + 0.35) for text in texts]
    page = new_page(width, sum(heights) + 0.4, layout="none")
    footer = 0.3 / page.get_figheight()
    grid = page.add_gridspec(
        len(studies), 4, width_ratios=(1, 1, 1, 3.1), height_ratios=heights, left=0.01, right=0.99, bottom=footer,
        top=1 - 0.1 / page.get_figheight(), wspace=0.04, hspace=0.04,
    )  # fmt: skip
    for row, (study, text) in enumerate(zip(studies, texts, strict=True)):
        scan = Scan(_volume(study["array"]), study.get("spacing"), study.get("orientation"), (0.0, 1.0))
        _check_geometry(scan.spacing, scan.orientation)
        for plane in range(3):
            _show(page.add_subplot(grid[row, plane]), scan, plane, scan.volume.shape[plane] // 2, anchor="N")
        axes = page.add_subplot(grid[row, 3])
        axes.axis("off")
        top = 0.04
        for style, lines in text:
            for content in lines:
                place = 0.03, 1 - top / heights[row]
                axes.text(*place, content, transform=axes.transAxes, va="top", fontsize=7.5, parse_math=False, **style)
                top += line
    return save(page, path)


def montage(
    array: Any,
    spacing: tuple[float, float, float] | None,
    path: str | Path,
    columns: int = 6,
    rows: int = 3,
    orientation: str | None = None,
    window: tuple[float, float] | None = None,
    direction: NDArray[np.float64] | None = None,
) -> Path:
    """Draw slices evenly spread over D, then the two middle reformats, all in true aspect ratio.

    Args:
        array: (D, H, W) of any unit.
        spacing: (z, y, x) in mm; None draws voxels as cubes and says so.
        orientation: three letters, the direction in which index grows along D, H, W ("SPL"); slices are then turned as
            a radiologist expects and their edges named. None draws rows and columns as stored.
        direction: 3x3, the axes' vectors as a Volume has them; edges that lie between two directions are then named by both, as "LA".
        window: intensities drawn black and white; by default the 1st and 99.5th percentile.

    Raises:
        ValueError: if the array is not 3D, or spacing or orientation is impossible.
    """
    volume = _volume(array)
    _check_geometry(spacing, orientation)
    if window is None:
        finite = volume[np.isfinite(volume)]
        window = tuple(np.percentile(finite, (1, 99.5)).tolist()) if finite.size else (0.0, 1.0)
    indices = np.unique(np.linspace(0, len(volume) - 1, min(columns * rows, len(volume))).round().astype(int))
    grid_rows = math.ceil(len(indices) / columns)

    # A cell is as wide as one slice of 1.6 inches; heights follow the true proportions, within reason for needle-like
    # volumes.
    heights = [float(np.clip(_aspect(volume.shape, plane, spacing, orientation), 0.3, 2.5)) for plane in range(3)]
    cell, half = 1.6, 1.6 * columns / 2
    slices_height = grid_rows * (cell * heights[0] + 0.05)
    reformats_height = min(max(half * heights[1], half * heights[2]), 4.5)
    heading = "" if spacing is not None else "spacing unknown: voxels drawn as cubes"
    head, foot = 0.32 if heading else 0.1, 0.3
    total = head + slices_height + 0.3 + reformats_height + foot
    page = new_page(cell * columns + 0.1, total, layout="none")
    if heading:
        page.text(0.5, 1 - 0.08 / total, heading, ha="center", va="top", fontsize=10)
    upper = page.add_gridspec(
        grid_rows, columns, left=0.005, right=0.995, wspace=0.03, hspace=0.03,
        top=1 - head / total, bottom=(foot + reformats_height + 0.3) / total,
    )  # fmt: skip
    scan = Scan(volume, spacing, orientation, window, direction)
    number: dict[str, Any] = {
        "color": "white",
        "ha": "right",
        "va": "bottom",
        "fontsize": 7,
        "bbox": LABEL_BACKGROUND | {"facecolor": "black"},
    }
    for cell_index, index in enumerate(indices):
        axes = page.add_subplot(upper[cell_index // columns, cell_index % columns])
        _show(axes, scan, 0, int(index), letters=cell_index == 0)
        axes.text(0.98, 0.02, str(index), transform=axes.transAxes, **number)
    lower = page.add_gridspec(1, 2, left=0.005, right=0.995, top=(foot + reformats_height) / total, bottom=foot / total, wspace=0.03)
    for plane in (1, 2):
        axes = page.add_subplot(lower[0, plane - 1])
        _show(axes, scan, plane, volume.shape[plane] // 2, letters=True)
        axes.set_title(f"reformat at {'row' if plane == 1 else 'column'} {volume.shape[plane] // 2}", fontsize=8, pad=3)
    return save(page, path)


def _volume(array: Any) -> NDArray[np.float32]:
    if hasattr(array, "detach"):
        array = array.detach().float().cpu().numpy()
    volume = np.asarray(array, dtype=np.float32)
    if volume.ndim != 3 or not volume.size:
        raise ValueError(f"A picture needs a volume (D, H, W), got shape {volume.shape}.")
    return volume


def _check_geometry(spacing: Any, orientation: str | None) -> None:
    if spacing is not None and (len(spacing) != 3 or not all(math.isfinite(step) and step > 0 for step in spacing)):
        raise ValueError(f"spacing={spacing}; give three positive millimetres (z, y, x), or None.")
    if orientation is not None and not is_orientation(orientation):
        raise ValueError(f'orientation={orientation!r}; give one letter each of R/L, A/P and S/I, such as "SPL", or None.')


def _aspect(shape: Sequence[int], plane: int, spacing: Any, orientation: str | None) -> float:
    """Return height over width of a drawn slice."""
    vertical, horizontal, _, _ = slice_axes(plane, orientation)
    steps = (1.0, 1.0, 1.0) if spacing is None else spacing
    return float(shape[vertical] * steps[vertical] / (shape[horizontal] * steps[horizontal]))


def _show(axes: "Axes", scan: Scan, plane: int, index: int, letters: bool = False, anchor: str = "C") -> None:
    """Draw the slice `index` across axis `plane`, optionally with the letters of its edges."""
    volume, spacing, orientation, window, direction = scan
    picture, (down, across) = take_slice(volume, plane, index, spacing, orientation)
    axes.imshow(grey(picture, window), cmap="gray", vmin=0, vmax=255, aspect=down / across, interpolation="nearest")
    axes.set_anchor(anchor)
    axes.axis("off")
    if letters and orientation is not None:
        vertical, horizontal, flip_vertical, flip_horizontal = slice_axes(plane, orientation)
        style: dict[str, Any] = {"transform": axes.transAxes, "color": "#F0E442", "fontsize": 8, "fontweight": "bold"}
        left, right = _edges(horizontal, orientation, direction)[:: -1 if flip_horizontal else 1]
        top, bottom = _edges(vertical, orientation, direction)[:: -1 if flip_vertical else 1]
        axes.text(0.02, 0.5, left, ha="left", va="center", **style)
        axes.text(0.98, 0.5, right, ha="right", va="center", **style)
        axes.text(0.5, 0.98, top, ha="center", va="top", **style)
        axes.text(0.5, 0.02, bottom, ha="center", va="bottom", **style)


def _edges(axis: int, orientation: str, direction: NDArray[np.float64] | None) -> tuple[str, str]:
    """Return the labels at the beginning and at the end of an axis of the volume."""
    if direction is None:
        return OPPOSITE[orientation[axis]], orientation[axis]
    return letters_towards(-direction[:, axis]), letters_towards(direction[:, axis])


def _case_text(study: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    """Return blocks of (style, wrapped lines) of one row."""
    heading = ": ".join(str(study[key]) for key in ("name", "title") if study.get(key))
    blocks: list[tuple[dict[str, Any], list[str]]] = []
    if heading:
        blocks.append(({"fontweight": "bold"}, textwrap.wrap(heading, 70)))
    for key, colour in (("reference", BLUE), ("prediction", "#A34700")):  # a darker orange: text needs contrast
        lines = [line for paragraph in str(study[key]).splitlines() for line in textwrap.wrap(paragraph, 80)] or ["(empty)"]
        if len(lines) > 34:
            lines = [*lines[:33], "[...]"]
        blocks.append(({"fontweight": "bold", "color": colour}, [key.capitalize()]))
        blocks.append(({}, lines))
    return blocks

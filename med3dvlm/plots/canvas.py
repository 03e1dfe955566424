"""Shared by all pictures: colours, a page with its footer, and saving."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from med3dvlm.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOOTER = "Research software, not a medical device"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#666666"
DOTS_PER_INCH = 120
# Behind a number, keeps it readable where a line crosses it.
LABEL_BACKGROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


def new_page(width: float, height: float, layout: Any = "constrained") -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    if layout == "constrained":  # keep the footer's strip free
        strip = 0.25 / height
        figure.get_layout_engine().set(rect=(0, strip, 1, 1 - strip))  # type: ignore[union-attr, call-arg]
    return figure


def save(figure: "Figure", path: str | Path) -> Path:
    path = Path(path)
    figure.text(0.5, 0.06 / figure.get_figheight(), FOOTER, ha="center", va="bottom", fontsize=7, color=GREY)
    with atomic_file(path) as aside:
        figure.savefig(aside, format="png", dpi=DOTS_PER_INCH)
    return path


def plain(axes: "Axes", grid: Any = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)


def readable(name: str) -> str:
    return name.replace("_", " ")


def check_any(values: Mapping[str, Any], picture: str, kind: str) -> None:
    if not values:
        raise ValueError(f"{picture} needs at least one {kind}, got none.")
    for name, points in values.items():
        if isinstance(points, Sequence) and not len(points):
            raise ValueError(f"{picture} has no points for {name!r}.")

"""What is asked of a run's figures, and whether it is reached."""

from collections.abc import Mapping
from typing import Any

from med3dvlm.tables import markdown_table

# figure: (least or most, {name of the run: the figure asked for}, what would be good)
Targets = Mapping[str, tuple[str, dict[str, float], float | None]]


def at(scores: Any, path: str) -> Any:
    """What lies on a path of keys; None where it ends before, as where an evaluation was asked for no such row."""
    for key in path.split("."):
        scores = scores.get(key) if isinstance(scores, dict) else None
    return scores


def compare(summary: dict[str, Any], targets: Targets, name: str) -> dict[str, dict[str, Any]]:
    """Each target with its value and whether it is reached; None where nothing is asked of a run of this name."""
    compared = {}
    for figure, (bound, asked_of, aim) in targets.items():
        value, asked = at(summary, figure), asked_of.get(name)
        reached = None if asked is None else value is not None and (value >= asked if bound == "at least" else value <= asked)
        compared[figure] = {"value": value, "bound": bound, "asked": asked, "aim": aim, "reached": reached}
    return compared


def target_table(compared: dict[str, dict[str, Any]], name: str) -> str:
    words = {True: "reached", False: "NOT REACHED", None: "-"}
    rows = []
    for figure, entry in compared.items():
        asked = None if entry["asked"] is None else f"{entry['bound']} {entry['asked']:g}"
        rows.append([figure, entry["value"], asked, entry["aim"], words[entry["reached"]]])
    return markdown_table(("figure", name, "asked", "aim", "what is asked is"), rows)

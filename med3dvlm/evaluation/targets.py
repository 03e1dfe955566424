"""Compare the figures of a demo's run with the expected ones."""

from collections.abc import Mapping
from typing import Any

from med3dvlm.tables import markdown_table

# figure: ("at least" or "at most", {name of the run: the expected figure}, a good figure)
Targets = Mapping[str, tuple[str, dict[str, float], float | None]]


def at(scores: Any, path: str) -> Any:
    """Return the value at a path of keys; None where the path does not exist, as where an evaluation has no such row."""
    for key in path.split("."):
        scores = scores.get(key) if isinstance(scores, dict) else None
    return scores


def compare(summary: dict[str, Any], targets: Targets, name: str) -> dict[str, dict[str, Any]]:
    """Return each figure with its value and whether that is as expected; None without an expectation, or without a value."""
    compared = {}
    for figure, (bound, expectations, aim) in targets.items():
        value, expected = at(summary, figure), expectations.get(name)
        reached = None if expected is None or value is None else value >= expected if bound == "at least" else value <= expected
        compared[figure] = {"value": value, "bound": bound, "expected": expected, "aim": aim, "reached": reached}
    return compared


def target_table(compared: dict[str, dict[str, Any]]) -> str:
    """Return the comparison as a Markdown table."""
    words = {True: "yes", False: "NO", None: "-"}
    rows = []
    for figure, entry in compared.items():
        expected = None if entry["expected"] is None else f"{entry['bound']} {entry['expected']:g}"
        rows.append([figure, entry["value"], expected, words[entry["reached"]]])
    return markdown_table(("figure", "reached", "expected", "as expected"), rows)

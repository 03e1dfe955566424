"""Rows of a ConversationDataset, and how a study's conversations are distributed over them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """A row of a ConversationDataset.

    `questions` are those of the study that it asks; `drawn` names what else it may hold: report, closed, follow_up. A row without a
    question always holds all of that, so that no row is empty.
    """

    study: int
    questions: slice = slice(None)
    drawn: tuple[str, ...] = ("report", "closed", "follow_up")


def pack(questions: Sequence[int], drawn: Mapping[str, int], room: int) -> list[tuple[slice, tuple[str, ...]]]:
    """Distribute by tokens: questions fill rows in their order, then each item of `drawn` goes into the first row with room."""
    starts: list[int] = []
    used: list[int] = []
    for place, cost in enumerate(questions):
        if not used or used[-1] + cost > room:
            starts.append(place)
            used.append(0)
        used[-1] += cost
    parts = [(slice(*ends), list[str]()) for ends in zip(starts, [*starts[1:], len(questions)], strict=False)]
    for name, cost in drawn.items():
        place = next((place for place, taken in enumerate(used) if taken + cost <= room), len(used))
        if place == len(used):
            parts.append((slice(0), []))
            used.append(0)
        used[place] += cost
        parts[place][1].append(name)
    return [(asked, tuple(names)) for asked, names in parts]

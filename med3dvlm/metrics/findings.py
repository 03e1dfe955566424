"""How well stated findings agree with labels, and what kind of sentence a wrong reading goes back to."""

import re
from collections.abc import Sequence
from typing import Any

from med3dvlm.metrics.classification import crg, precision_recall_f1
from med3dvlm.reports.findings.rules import Mention

__all__ = ["crg", "error_kind", "finding_scores"]

DOUBTED = re.compile(
    r"\?|\b(may|might|could|possibl[ey]|probabl[ey]|suspicious|suspected|favou?r|compatible|consistent|excluded)\b", re.IGNORECASE
)
EARLIER = re.compile(r"\b(previous|previously|prior|earlier|old|dated|known|follow[- ]?up|compared)\b", re.IGNORECASE)


def finding_scores(labels: Any, stated: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Precision, recall and F1 as `precision_recall_f1` gives them, and CRG beside them.

    Args:
        labels, stated: (N, K) of 0 and 1: what N studies have, and what their reports state, written by a model or a person.

    Returns:
        `{"per_class": ..., "macro": ..., "micro": ..., "weighted": ..., "crg": number or None}`.

    Raises:
        ValueError: if the shapes differ, are not (N, K), or hold anything but 0 and 1.
    """
    return precision_recall_f1(labels, stated, names) | {"crg": crg(labels, stated)}


def error_kind(label: int, mentions: Sequence[Mention]) -> str:
    """Why the rules and a label disagree, from the mentions of that one finding in that one report.

    Raises:
        ValueError: if they agree.
    """
    present = [mention for mention in mentions if mention.present]
    if bool(present) == bool(label):
        raise ValueError(f"The label is {label} and so is the reading; only a disagreement has a kind.")
    if label:
        return "missed: named, but taken back by a cue" if mentions else "missed: not named in the rules' words"
    if all(DOUBTED.search(mention.sentence) for mention in present):
        return "invented: stated with doubt"
    if all(EARLIER.search(mention.sentence) for mention in present):
        return "invented: stated beside an earlier scan"
    return "invented: stated plainly, " + ("once" if len({mention.sentence for mention in present}) == 1 else "in several sentences")

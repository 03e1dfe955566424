"""Classify errors of findings read from reports by the sentence behind them; `read_findings` reads the findings that a report states."""

import re
from collections.abc import Sequence

from med3dvlm.reports.findings import Mention, read_findings

__all__ = ["error_kind", "read_findings"]

DOUBTED = re.compile(
    r"\?|\b(may|might|could|possibl[ey]|probabl[ey]|suspicious|suspected|favou?r|compatible|consistent|excluded)\b", re.IGNORECASE
)
EARLIER = re.compile(r"\b(previous|previously|prior|earlier|old|dated|known|follow[- ]?up|compared)\b", re.IGNORECASE)


def error_kind(label: int, mentions: Sequence[Mention]) -> str:
    """Return why the rules and a label disagree, from the mentions of that one finding in that one report.

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

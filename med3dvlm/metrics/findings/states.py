"""Whether a report calls a finding present, absent or uncertain. `read_findings` knows two states only, as labels do."""

import re
from collections.abc import Sequence

from med3dvlm.metrics.findings.rules import Mention, find_mentions

STATES = ("present", "uncertain", "absent")
DOUBT = re.compile(
    r"\b(may|might|could|possibl[ey]|probabl[ey]|presumabl[ey]|likely|unlikely|suspicious|suspected|suspicion|suggest\w*|question\w*|favou?r\w*)\b",
    re.IGNORECASE,
)
WORDS_BEFORE = 5  # between a word of doubt and the finding that it concerns
DOUBT_AFTER = re.compile(
    r"^(\W+\w+){0,3}?\s*"
    r"(\(\?\)|(may|might|could) be (present|there)|(cannot|can not|could not) be (excluded|ruled out)"
    r"|(is|are|was|were) (possible|suspected|likely|probable|questionable))",
    re.IGNORECASE,
)


def finding_states(text: str, names: Sequence[str] | None = None) -> dict[str, str]:
    """`{finding: one of STATES}` of those findings that the text names, in the order in which it first names them.

    A finding stated plainly anywhere is present. One that is named only with doubt is uncertain, and one that is denied, or belongs to the
    past, is absent. What the text does not name is not in the result: a report's silence is no statement.

    Args:
        names: findings to look for, all of `FINDINGS` by default.

    Raises:
        ValueError: a name is unknown.
    """
    states: dict[str, str] = {}
    start = 0
    for mention in find_mentions(text, names):
        start = max(text.find(mention.sentence, start), start)  # mentions come in reading order
        asked = text[start + len(mention.sentence) :].lstrip().startswith("?")
        state = "uncertain" if mention.present and asked else _state(mention)
        states[mention.finding] = min(states.get(mention.finding, state), state, key=STATES.index)
    return states


def _state(mention: Mention) -> str:
    if not mention.present:
        return "uncertain" if DOUBT.search(mention.cue or "") else "absent"
    before, _, after = mention.sentence.partition(mention.phrase)
    near = " ".join(before.split()[-WORDS_BEFORE - 1 :])
    return "uncertain" if DOUBT.search(near) or DOUBT_AFTER.search(after) else "present"

"""Names of findings in tables of labels: known ones in any spelling, and others, which are kept."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from med3dvlm.reports.findings.phrases import rules_data


def finding_name(text: str) -> str:
    """Normalise "Pleural effusion", "pleural-effusion" and the "effusion" under its `names` in rules.yaml to "pleural_effusion"; an unknown
    name is returned unchanged.
    """
    return _known().get(_plain(text), text.strip())


def named_labels(labels: Mapping[str, int]) -> dict[str, int]:
    """Return labels under the names of `finding_name`.

    Raises:
        ValueError: two of them are one finding and disagree.
    """
    named: dict[str, int] = {}
    for text, value in labels.items():
        name = finding_name(text)
        if named.setdefault(name, value) != value:
            same = ", ".join(repr(other) for other in labels if finding_name(other) == name)
            raise ValueError(
                f"the labels {same} are one finding, {name}, and disagree; leave out all but one of these columns, or rename one"
            )
    return named


def label_names(labels: Iterable[Mapping[str, int]]) -> list[str]:
    """Return the findings that any study has a label of: known ones in the order of the rules, then the others by the alphabet."""
    found = {name for one in labels for name in one}
    known = [name for name in rules_data()["findings"] if name in found]
    return known + sorted(found.difference(known))


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text).strip().casefold()


@lru_cache(maxsize=1)
def _known() -> dict[str, str]:
    return {_plain(text): name for name, rule in rules_data()["findings"].items() for text in (name, *rule.get("names", ()))}

"""Findings in reports: `rules.py` reads them by the rules of `rules.yaml`, `states.py` says how sure a report is of each, `scores.py` compares
what two readers read."""

from med3dvlm.metrics.findings.rules import (
    FINDINGS,
    FINDINGS_ABDOMEN,
    FINDINGS_CT_RATE,
    RULES_FILE,
    Mention,
    find_mentions,
    findings_table,
    read_findings,
)
from med3dvlm.metrics.findings.scores import crg, error_kind, finding_scores
from med3dvlm.metrics.findings.states import STATES, finding_states

__all__ = [
    "FINDINGS",
    "FINDINGS_ABDOMEN",
    "FINDINGS_CT_RATE",
    "RULES_FILE",
    "STATES",
    "Mention",
    "crg",
    "error_kind",
    "find_mentions",
    "finding_scores",
    "finding_states",
    "findings_table",
    "read_findings",
]

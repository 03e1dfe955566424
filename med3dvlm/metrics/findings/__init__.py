"""Findings in reports: `rules.py` reads them by the rules of `rules.yaml`, `scores.py` compares what two readers read."""

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

__all__ = [
    "FINDINGS",
    "FINDINGS_ABDOMEN",
    "FINDINGS_CT_RATE",
    "RULES_FILE",
    "Mention",
    "crg",
    "error_kind",
    "find_mentions",
    "finding_scores",
    "findings_table",
    "read_findings",
]

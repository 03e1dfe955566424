"""Findings in reports: `rules.py` reads them by the rules of `rules.yaml`, from the clauses that `clauses.py` cuts a report into."""

from med3dvlm.reports.findings.cues import STATES
from med3dvlm.reports.findings.names import finding_name, label_names, named_labels
from med3dvlm.reports.findings.phrases import RULES_FILE
from med3dvlm.reports.findings.rules import (
    FINDINGS,
    FINDINGS_CT_RATE,
    Mention,
    find_mentions,
    finding_of,
    finding_states,
    findings_table,
    read_findings,
)
from med3dvlm.reports.findings.sections import headings

__all__ = [
    "FINDINGS",
    "FINDINGS_CT_RATE",
    "RULES_FILE",
    "STATES",
    "Mention",
    "find_mentions",
    "finding_name",
    "finding_of",
    "finding_states",
    "findings_table",
    "headings",
    "label_names",
    "named_labels",
    "read_findings",
]

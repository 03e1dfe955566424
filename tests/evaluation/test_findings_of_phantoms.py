"""The finding rules read from phantom reports what their writer stated."""

import numpy as np

from med3dvlm.datasets.phantom import plan_phantoms
from med3dvlm.metrics.classification import precision_recall_f1
from med3dvlm.reports.findings import FINDINGS, findings_table


def test_reports_are_read_as_their_labels() -> None:
    studies = [plan.study for plan in plan_phantoms(200, seed=3)]
    names = list(studies[0].labels)
    labels = np.array([[study.labels[name] for name in names] for study in studies])
    stated = findings_table([study.report for study in studies], names)
    assert labels.sum(axis=0).min() > 0, "every finding must occur, or this proves little"
    scores = precision_recall_f1(labels, stated, names)
    wrong = [study.report for study, one, other in zip(studies, labels, stated, strict=True) if (one != other).any()]
    assert scores["macro"]["f1"] >= 0.99, wrong[:5]


def test_no_other_finding_is_read() -> None:
    """Findings that phantoms do not have, such as fracture or calcification, must not be read from their wording."""
    studies = [plan.study for plan in plan_phantoms(200, seed=4)]
    others = [name for name in FINDINGS if name not in studies[0].labels]
    assert findings_table([study.report for study in studies], others).sum() == 0

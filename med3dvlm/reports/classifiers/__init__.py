"""Findings in reports by learned readers, and the command that trains and scores them beside the rules.

linear.py    TF-IDF and logistic regression (scikit-learn), trained on one's own labelled reports
radbert.py   the published text classifier of CT-RATE, where its weights are present
tables.py    reports and their labels on disk
command.py   `med3dvlm findings train`, `med3dvlm findings score`
"""

from med3dvlm.reports.classifiers.linear import LinearClassifier
from med3dvlm.reports.classifiers.radbert import RadBertClassifier

__all__ = ["LinearClassifier", "RadBertClassifier"]

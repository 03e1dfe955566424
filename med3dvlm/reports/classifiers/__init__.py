"""Findings in reports by learned readers, which `med3dvlm findings` trains, and scores beside the rules.

linear.py    TF-IDF and logistic regression (scikit-learn), trained on one's own labelled reports
radbert.py   the published text classifier of CT-RATE, where its weights are present
"""

from med3dvlm.reports.classifiers.linear import LinearClassifier
from med3dvlm.reports.classifiers.radbert import RadBertClassifier

__all__ = ["LinearClassifier", "RadBertClassifier"]

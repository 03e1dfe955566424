"""Tables of a detection as Markdown: overall, by the published definitions, by finding, with remarks."""

from collections.abc import Mapping, Sequence
from typing import Any

from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.tables import markdown_table, with_interval

COMPARED = {
    "model": "this model",
    "blind": "an empty volume for every study",
    "shuffled": "another patient's volume for every study",
    "everything": "every finding stated of every study",
}
DEFINITIONS = {
    "dcformer": "DCFormer: 0.5; all decisions together, F1 weighted by positives",
    "ct_clip": "CT-CLIP: point nearest to (0, 1); mean of findings, F1 weighted over present and absent",
    "vlm3d": "VLM3D: thresholds as below; mean of findings",
}
FIGURES = {"auroc": "AUROC", "accuracy": "accuracy", "f1": "F1", "precision": "precision", "recall": "recall", "crg": "CRG"}
Scores = Mapping[str, Any]


def detection_tables(
    scores: Scores, columns: Mapping[str, Scores], frequencies: Mapping[str, tuple[float, float]], remarks: Sequence[str]
) -> str:
    """Return all tables for the `scores` of `detection.report`.

    Args:
        columns: what stands in the first table, by the names of COMPARED, each from `detection_scores`.
        frequencies: finding -> its share of CT-RATE's training and validation split.
        remarks: sentences for the end.
    """
    published = scores["published"]
    by_definition = [[title, *((published[key] or {}).get(name) for name in FIGURES)] for key, title in DEFINITIONS.items()]
    parts = [
        f"*{RESEARCH_NOTICE}*",
        _overall(columns),
        markdown_table(("definition", *FIGURES.values()), by_definition),
        _by_finding(scores, frequencies),
        "\n".join(f"- {sentence}" for sentence in [*_sentences(scores), *remarks]),
    ]
    return "\n\n".join(parts)


def _overall(columns: Mapping[str, Scores]) -> str:
    own, theirs = ("auroc", "auprc", "f1", "accuracy"), ("accuracy", "f1", "precision", "recall")
    rows = []
    for name, entry in columns.items():
        cells = [(f"macro.{key}", entry["macro"][key]) for key in own]
        cells += [(f"published.dcformer.{key}", (entry["published"]["dcformer"] or {}).get(key)) for key in theirs]
        rows.append([COMPARED[name], *(with_interval(value, entry["intervals"].get(path)) for path, value in cells)])
    return markdown_table(("", "AUROC", "AUPRC", "F1", "accuracy", *(f"DCFormer's {FIGURES[key]}" for key in theirs)), rows)


def _by_finding(scores: Scores, frequencies: Mapping[str, tuple[float, float]]) -> str:
    rows = []
    for name, entry in scores["per_class"].items():
        auroc, auprc, f1 = (with_interval(entry[key], scores["intervals"].get(f"{key}.{name}")) for key in ("auroc", "auprc", "f1"))
        counts = [f"{entry['support']} of {entry['studies']}", entry["support"] / entry["studies"], *frequencies.get(name, (None, None))]
        decisions = [entry[key] for key in ("threshold", "accuracy", "precision", "recall")]
        rows.append([name.replace("_", " "), *counts, auroc, auprc, *decisions, f1])
    frequency = ("present", "share", "CT-RATE train", "CT-RATE validation")
    return markdown_table(("finding", *frequency, "AUROC", "AUPRC", "threshold", "accuracy", "precision", "recall", "F1"), rows)


def _sentences(scores: Scores) -> list[str]:
    whole, control, calibration = scores["published"]["studies"], scores["permuted_labels"], scores["calibration"]
    rule = f", rule {scores['thresholds']['rule']}" if scores["thresholds"]["rule"] else ""
    at_chance = "none"
    if control["macro_auroc"] is not None:
        low, high = control["range"]
        at_chance = f"{control['macro_auroc']:.3f} (95 %: {low:.3f} to {high:.3f}), p = {control['p_value']:.3f} for the true labels"
    sentences = [
        f"Means over the findings of {scores['studies']} studies. A study counts for the findings that it has labels of; the published "
        f"figures are those of the {whole} studies with labels of all. In brackets 95 % of bootstrap resamples of the patients.",
        f"Thresholds: {scores['thresholds']['from']}{rule}. DCFormer's figures take 0.5.",
        f"Against labels permuted among the patients, {control['permutations']} times: macro AUROC {at_chance}.",
        f"Calibration error {calibration['ece']:.3f}, Brier score {calibration['brier']:.3f}.",
    ]
    if scores["one_class"]:
        sentences.append(f"Without AUROC, as all studies have them or none: {_listed(scores['one_class'])}.")
    if scores["undecided"]:
        sentences.append(f"Without decisions, as no threshold could be chosen: {_listed(scores['undecided'])}.")
    return sentences


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names)

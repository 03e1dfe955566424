"""Scores of written reports against the radiologist's; eval/report_gen.py says what the figures are."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.metrics.bertscore import BertScorer
from med3dvlm.metrics.classification import precision_recall_f1
from med3dvlm.metrics.intervals import Statistic, crg_of, f1_of, intervals, macro_f1_of, mean_of, mean_over, micro_f1_of
from med3dvlm.metrics.laterality import laterality_scores
from med3dvlm.metrics.text import bleu_counts, bleu_of_counts, collapse, text_scores, text_values
from med3dvlm.records import Study
from med3dvlm.reports.findings import FINDINGS, findings_table, label_names
from med3dvlm.tables import markdown_table, with_interval


def report_scores(texts: Sequence[str], studies: Sequence[Study], scorer: BertScorer | None = None) -> dict[str, Any]:
    """Score one text a study: findings, words and collapse, each figure with a 95 % bootstrap interval over patients in `intervals`.

    Args:
        scorer: for BERTScore, from `metrics.bertscore`.

    Raises:
        ValueError: no study has a report to compare with.
    """
    found, found_spans = _finding_scores(texts, studies)
    with_report = [(text, study) for text, study in zip(texts, studies, strict=True) if study.report.strip()]
    if not with_report:
        raise ValueError(f"none of the {len(studies)} studies has a report, so there is nothing to compare with; name another --split")
    predictions, references = [text for text, _ in with_report], [study.report for _, study in with_report]
    laterality = laterality_scores(texts, [study.report for study in studies], [study.patient for study in studies])
    values = text_values(predictions, references, scorer)
    statistics = {f"text.{name}": mean_of(column) for name, column in values.items()}
    statistics |= {f"text.corpus_bleu{order}": _corpus_bleu(bleu_counts(predictions, references), order) for order in (1, 2, 3, 4)}
    return {
        "findings_f1": found["macro"]["f1"],
        "findings_f1_interval": found_spans.get("findings.macro.f1"),
        "findings": found,
        "laterality": laterality,
        "text": text_scores(predictions, references, scorer, values),
        "collapse": collapse(list(texts)),
        "intervals": found_spans
        | ({} if laterality["interval"] is None else {"laterality.accuracy": laterality["interval"]})
        | intervals(statistics, [study.patient for _, study in with_report]),
    }


def fixed_reports(studies: Sequence[Study]) -> dict[str, str]:
    """Return two baselines: `modal`, the commonest training report or, if no two are alike, the first that states the commonest set of
    findings; and `best_fixed`, that whose findings, stated of every training study, have the highest macro F1 there.
    """
    labels, known, names, _ = reference_findings(studies)
    stated = findings_table([study.report for study in studies], names, literal=True)
    modal, times = Counter(study.report for study in studies).most_common(1)[0]
    if times == 1:
        sets = [tuple(row) for row in stated.tolist()]
        modal = studies[sets.index(Counter(sets).most_common(1)[0][0])].report
    share = labels.sum(axis=0) / known.sum(axis=0)
    macro = (stated * 2 * share / (1 + share)).sum(axis=1)  # F1 of a finding stated of everyone: precision `share`, recall 1
    return {"modal": modal, "best_fixed": studies[int(macro.argmax())].report}


def report_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return Markdown: a row for the model and each baseline, first the columns of the Med3DVLM paper's Table 2."""
    first = next(iter(columns.values()))
    header = ["", "BLEU", "ROUGE", "METEOR"]
    paths = ["text.bleu1", "text.rouge1", "text.meteor"]
    if "bertscore_model" in first["text"]:
        header += [f"BERTScore ({first['text']['bertscore_model']})"]
        paths += ["text.bertscore_f1"]
    header += ["findings F1, macro", "findings F1, micro", "CRG", "side right", "different reports", "words in common"]
    paths += ["findings.macro.f1", "findings.micro.f1", "findings.crg", "laterality.accuracy", "collapse.distinct", "collapse.similarity"]
    rows = [
        [name, *(with_interval(_at(scores, path), scores["intervals"].get(path)) for path in paths)] for name, scores in columns.items()
    ]
    found, samples = first["findings"], first["text"]["samples"]
    parts = [
        markdown_table(header, rows),
        f"BLEU is BLEU-1 and ROUGE is ROUGE-1, of each of {samples} reports, averaged. {_on_findings(found)} Side right is the share of the "
        "findings that both reports state and of which the reference says the side. In brackets 95 % of bootstrap resamples of the patients.",
        *(f"No {name}: {reason}" for name, reason in first["text"]["unavailable"].items()),
    ]
    return "\n\n".join(parts)


def _on_findings(found: Mapping[str, Any]) -> str:
    """Describe what the findings are compared with, and which are not scored for which reason."""
    sentences = [f"Findings against the {found['against']} of {found['studies']} studies."]
    if found["macro"]["f1"] is None:
        sentences = [f"Findings: not scored, because neither the {found['against']} nor the written reports have one that the rules know."]
    if found["unread"]:
        named = ", ".join(found["unread"])
        sentences.append(f"Not scored: {named}, because no report of a study that has it names it in the label's words.")
    return " ".join(sentences)


def _finding_scores(texts: Sequence[str], studies: Sequence[Study]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare the findings that the texts state with the studies'. Returns scores, and the intervals by the path of the figure."""
    labels, known, names, source = reference_findings(studies)
    unread = [name for name in label_names(study.labels for study in studies) if name not in names]
    chosen: NDArray[np.bool_] = np.any(known, axis=1)
    # Neither stated nor true: what is not known is in none of the sums of precision, recall and F1.
    labels, stated = labels[chosen], (findings_table(texts, names, literal=True) * known)[chosen]
    patients = [study.patient for study, one in zip(studies, chosen, strict=True) if one]
    found: dict[str, Any] = {"against": source, "studies": len(patients), "crg": None, "unread": unread}
    if not (labels.any() or stated.any()):
        empty = dict.fromkeys(("precision", "recall", "f1"))
        return found | {"per_class": {}, "macro": empty, "micro": empty, "weighted": empty}, {}
    found |= precision_recall_f1(labels, stated, names)
    statistics: dict[str, Statistic] = {
        "findings.macro.f1": macro_f1_of(labels, stated),
        "findings.micro.f1": micro_f1_of(labels, stated),
        **{f"findings.macro.{name}": mean_over(_share(labels, stated, name)) for name in ("precision", "recall")},
        **{f"findings.micro.{name}": _share(labels, stated, name, together=True) for name in ("precision", "recall")},
        "by finding": f1_of(labels, stated),
    }
    if known[chosen].all():  # CRG counts decisions, so those that are unknown would pass as right
        statistics["findings.crg"] = crg_of(labels, stated)
        value = float(statistics["findings.crg"](np.ones((1, len(patients))))[0])
        found["crg"] = None if np.isnan(value) else value
    spans = intervals(statistics, patients)
    for name, span in zip(names, spans.pop("by finding"), strict=True):
        found["per_class"][name]["f1_interval"] = span
    return found, spans


def reference_findings(studies: Sequence[Study]) -> tuple[NDArray[np.int64], NDArray[np.bool_], list[str], str]:
    """Return (studies, findings) of 0 and 1, which of these are known, the findings' names, and their origin: the studies' labels, or, where
    no study has any that can be read, what the reports state. Of a study without labels, or without a report, nothing is known.

    A finding that the rules do not know can be read where the report of a study that has it names it by the label's own words.
    """
    names = label_names(study.labels for study in studies)
    own = [name for name in names if name not in FINDINGS]
    stated = findings_table([study.report for study in studies], own, literal=True)
    labelled = np.array([[study.labels.get(name) == 1 for name in own] for study in studies]).reshape(stated.shape)
    names = [name for name in names if name in FINDINGS or (stated * labelled).any(axis=0)[own.index(name)]]
    if not names:
        stated = findings_table([study.report for study in studies])
        with_report = np.array([[bool(study.report.strip())] for study in studies])
        return stated, np.broadcast_to(with_report, stated.shape), list(FINDINGS), "reference reports"
    known = np.array([[name in study.labels for name in names] for study in studies])
    return np.array([[study.labels.get(name, 0) for name in names] for study in studies]), known, names, "labels"


def _share(labels: NDArray[Any], stated: NDArray[Any], name: str, together: bool = False) -> Statistic:
    """Return precision or recall of each of K findings, or of all decisions together, as in `precision_recall_f1`: 0 where the denominator is
    0, NaN for a finding that is neither present nor stated.
    """
    tables = (labels * stated, stated if name == "precision" else labels, labels + stated)
    hits, whole, either = (table.sum(axis=1) if together else table for table in tables)
    return lambda weights: np.where(weights @ either == 0, np.nan, (weights @ hits) / np.maximum(weights @ whole, 1))


def _corpus_bleu(counts: NDArray[np.float64], order: int) -> Statistic:
    return lambda weights: bleu_of_counts(weights @ counts)[:, order - 1]


def _at(scores: Mapping[str, Any], path: str) -> float | None:
    value: Any = scores
    for key in path.split("."):
        value = value.get(key) if value is not None else None
    return value

"""Retrieval of volumes by a volume, scored by shared findings (metrics/shared_findings.py), for eval/retrieval.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from med3dvlm.metrics.intervals import intervals, mean_of
from med3dvlm.metrics.shared_findings import shared_findings
from med3dvlm.records import Study
from med3dvlm.reports.findings import label_names
from med3dvlm.tables import markdown_table, with_interval


def image_to_image_scores(images: Any, studies: Sequence[Study], ks: Sequence[int]) -> dict[str, Any] | None:
    """Return the means of `shared_findings` among the studies that have a label for every finding that any study has.

    Args:
        images: (N, P), the embeddings of the studies.

    Returns:
        `{"studies", "queries": those with a map, "map1", "overlap1", "chance_map1", ..., "chance_overlap", "intervals"}`, intervals over
        patients as queries; None where there are no labels, or no two patients who share a finding.
    """
    names = label_names(study.labels for study in studies)
    rows = [row for row, study in enumerate(studies) if all(name in study.labels for name in names)]
    if not names or not rows:
        return None
    patients = [studies[row].patient for row in rows]
    labels = [[studies[row].labels[name] for name in names] for row in rows]
    values = shared_findings(images[rows], labels, patients, ks)
    queries = int((~np.isnan(values[f"map{ks[0]}"])).sum())
    if not queries:
        return None
    spans = intervals({name: mean_of(column) for name, column in values.items() if not name.startswith("chance")}, patients)
    means = {name: float(np.nanmean(column)) for name, column in values.items()}
    return {"studies": len(rows), "queries": queries, **means, "intervals": spans}


def image_to_image_table(pools: Mapping[str, Mapping[str, Any]], ks: Sequence[int]) -> str:
    """Return a table with a row for each pool and way of counting; empty where no pool has such scores."""
    rows = []
    for entry in pools.values():
        if found := entry.get("image_to_image"):
            for name, title in (("map", "average precision, a shared finding"), ("overlap", "findings of either that both have")):
                figures = [with_interval(found[f"{name}{k}"], found["intervals"][f"{name}{k}"]) for k in ks]
                chance = [found["chance_overlap"] if name == "overlap" else found[f"chance_map{k}"] for k in ks]
                rows += [[entry["pool"], title, "", *figures], [entry["pool"], title, "chance", *chance]]
    if not rows:
        return ""
    return "Volumes found by a volume of another patient:\n\n" + markdown_table(("pool", "mean of", "", *(f"first {k}" for k in ks)), rows)

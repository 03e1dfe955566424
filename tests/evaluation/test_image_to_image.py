"""Values of k in retrieval, and volume-to-volume retrieval where studies have labels."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file

from med3dvlm.evaluation.image_to_image import image_to_image_scores, image_to_image_table
from med3dvlm.metrics.shared_findings import shared_findings
from med3dvlm.reports.findings import FINDINGS_CT_RATE
from tests.metrics.bootstrap import bootstrap_interval

Run = Callable[..., None]


@pytest.fixture(scope="module")
def whole(chests: SimpleNamespace, run_whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("retrieval")
    data = ("--data", chests.root / "prepared", "--split", "valid_fixed")
    run_whole("retrieval", "--model", chests.clip, *data, "--output", out, "--pools", "20,32", "--ks", "5,10,50,100")
    return out


def test_recalls_are_for_the_given_k(whole: Path) -> None:
    scores = json.loads((whole / "scores.json").read_text())
    ranks = [json.loads(line)["image_to_text"] for line in (whole / "predictions.jsonl").read_text().splitlines()]
    found = scores["pool_32"]["image_to_text"]
    assert [name for name in found if name.startswith("r")] == ["r5", "r10", "r50", "r100"]
    assert found["r5"] == pytest.approx(sum(rank <= 5 for rank in ranks) / 32, abs=1e-6) and found["r100"] == 1
    assert scores["pool_32"]["chance"]["r10"] == pytest.approx(10 / 32, abs=1e-6)
    assert "R@100" in (whole / "scores.md").read_text()


def test_volume_to_volume_retrieval_uses_studies_with_all_labels(whole: Path, chests: SimpleNamespace) -> None:
    scores = json.loads((whole / "scores.json").read_text())
    images = load_file(whole / "embeddings.safetensors")["image"]
    for pool in (20, 32):
        studies = chests.data.studies("valid_fixed")[:pool]
        rows = [row for row, study in enumerate(studies) if len(study.labels) == 18]
        labels = np.array([[studies[row].labels[name] for name in FINDINGS_CT_RATE] for row in rows])
        patients = [studies[row].patient for row in rows]
        values = shared_findings(images[rows], labels, patients, (5, 10, 50, 100))
        found = scores[f"pool_{pool}"]["image_to_image"]
        assert found["studies"] == len(rows) < pool and found["queries"] == len(rows)
        for name, column in values.items():
            assert found[name] == pytest.approx(np.nanmean(column), abs=1e-6)
        assert found["intervals"]["overlap5"] == pytest.approx(bootstrap_interval(values["overlap5"], patients), abs=1e-6)
    text = (whole / "scores.md").read_text()
    assert "findings of either that both have" in text and f"{found['chance_overlap']:.3f}" in text


def test_without_labels_or_other_studies_there_is_no_score(chests: SimpleNamespace) -> None:
    studies = chests.data.studies("valid_fixed")[:4]
    images = np.eye(4)
    assert image_to_image_scores(images, [replace(study, labels={}) for study in studies], (1,)) is None
    assert image_to_image_scores(images, [replace(study, patient="one") for study in studies], (1,)) is None
    assert image_to_image_scores(images, [replace(study, labels={"emphysema": 0}) for study in studies], (1,)) is None
    assert image_to_image_table({"pool_4": {"pool": 4}}, (1,)) == ""

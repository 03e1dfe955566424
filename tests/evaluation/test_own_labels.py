"""Labels with a user's own names: detection, probe, retrieval by shared findings, report scores, and a page of runs in any folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from med3dvlm.datasets import ct_rate
from med3dvlm.datasets.preparation import prepare
from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation.image_to_image import image_to_image_scores
from med3dvlm.evaluation.report_scores import report_scores, report_table
from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.prompts import finding_prompts
from med3dvlm.records import Records, Study

pytestmark = pytest.mark.usefixtures("without_pictures")
Run = Callable[..., None]
# What the table calls a finding of CT-RATE, and what it is called here
OWN = {"Pleural effusion": "pleural_effusion", "NODULES": "lung_nodule", "haemorrhage": "haemorrhage", "COVID-19": "COVID-19"}
TAKEN = dict(zip(OWN, ("pleural_effusion", "lung_nodule", "consolidation", "emphysema"), strict=True))
NAMES = ["lung_nodule", "pleural_effusion", "COVID-19", "haemorrhage"]  # those that the rules know come first


@pytest.fixture(scope="module")
def own(chests: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chests with four findings renamed."""
    root = tmp_path_factory.mktemp("own") / "mine_128"
    studies = [study for split in ct_rate.splits(chests.root / "CT-RATE") for study in ct_rate.read(chests.root / "CT-RATE", split)[0]]
    studies = [replace(one, labels={name: one.labels[key] for name, key in TAKEN.items() if key in one.labels}) for one in studies]
    prepare(chests.root / "CT-RATE", Records(studies), VolumeProcessor("ct_rate", size=chests.data.processor.size), root)
    return root


@pytest.mark.parametrize("script", ["zero_shot", "linear_probe"])
def test_detection_takes_the_findings_of_the_data(script: str, own: Path, chests: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "somewhere" / script
    run(script, "--model", chests.clip, "--data", own, "--split", "valid_fixed", "--output", out)
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores["per_class"]) == NAMES
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    studies = {study.id: study for study in PreparedData(own).studies("valid_fixed")}
    for name in NAMES:
        truth, found = [studies[row["id"]].labels[name] for row in rows], [row["log_odds"][name] for row in rows]
        assert scores["per_class"][name]["auroc"] == pytest.approx(roc_auc_score(truth, found), abs=1e-6)
    assert (out / "probabilities.csv").read_text().splitlines()[0] == "VolumeName,Lung nodule,Pleural effusion,COVID-19,Haemorrhage"
    assert "Nothing stands beside the papers" in (out / "published.md").read_text()  # their means are of 18 findings
    run("page", out, "--output", tmp_path / "page.html", "--name", "mine")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "haemorrhage" in page and "COVID-19" in page


def test_a_probe_of_other_findings_is_refused(own: Path, chests: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    run("linear_probe", "--model", chests.clip, "--data", own, "--split", "valid_fixed", "--output", tmp_path / "own", "--controls", 0)
    probe = json.loads((tmp_path / "own/probe.json").read_text())
    (tmp_path / "own/probe.json").write_text(json.dumps(probe | {"names": ["a", "b", "c", "d"]}))
    with pytest.raises(SystemExit):
        run("linear_probe", "--model", chests.clip, "--data", own, "--output", tmp_path / "x", "--split", "valid_fixed",
            "--probe", tmp_path / "own", checked=True)  # fmt: skip


def test_prompts_of_any_finding() -> None:
    assert finding_prompts("haemorrhage", 2) == [
        ("Haemorrhage is present.", "Haemorrhage is not present."),
        ("There is haemorrhage.", "There is no haemorrhage."),
    ]
    assert finding_prompts("COVID-19")[0][0] == "COVID-19 is present."


def study(number: int, report: str, **labels: int) -> Study:
    return Study(f"s{number}", f"p{number}", f"{number}.nii.gz", report, labels, "test", "table")


def test_reports_are_scored_by_the_names_of_the_data() -> None:
    """A finding that the rules do not know is read by its name, denied or not, where reports contain it."""
    studies = [study(0, "Haemorrhage in the left lobe.", haemorrhage=1), study(1, "No haemorrhage.", haemorrhage=0)]
    found = report_scores(["Haemorrhages.", "No hemorrhage."], studies)["findings"]
    assert found["macro"]["f1"] == 1 and list(found["per_class"]) == ["haemorrhage"] and found["against"] == "labels"
    assert report_scores(["No haemorrhage.", "Haemorrhage."], studies)["findings"]["macro"]["f1"] == 0


@pytest.mark.parametrize(
    ("labels", "report", "said"),
    [
        ({"grade": 1}, "Emphysema.", "Not scored: grade, because no report of a study that has it names it in the label's words."),
        ({"emphysema": 0}, "Normal.", "Findings: not scored, because neither the labels nor the written reports have one"),
        ({}, "Normal chest.", "Findings: not scored, because neither the reference reports nor the written reports have one"),
    ],
)
def test_unscorable_findings_have_a_reason_instead_of_a_figure(labels: dict[str, int], report: str, said: str) -> None:
    scores = report_scores(["Normal."] * 3, [study(number, report, **labels) for number in range(3)])
    table = report_table({"model": scores})
    assert said in table
    if "Findings: not" in said:
        assert scores["findings"]["micro"]["f1"] is None and scores["findings_f1"] is None


def test_images_are_found_by_findings_of_any_name() -> None:
    studies = [study(number, "x", haemorrhage=number % 2) for number in range(4)]
    scores = image_to_image_scores(np.array([[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]]), studies, (1,))
    assert scores is not None and scores["map1"] == 1 and scores["queries"] == 2

"""Reports: one by one as in batches, continuing, and scores and baselines by hand."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from med3dvlm import Med3DChat
from med3dvlm.prompts import REPORT_PROMPTS
from med3dvlm.records import Study, read_questions, read_studies, write_records

Run = Callable[..., None]


def rows_of(path: Path, timed: bool = False) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows if timed else [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def arguments(demo: SimpleNamespace) -> list[object]:
    return ["--model", demo.model, "--data", demo.root / "prepared", "--max_new_tokens", 20]


@pytest.fixture
def whole(evaluated: Path) -> Path:
    return evaluated / "eval" / "report"


@pytest.fixture(scope="module")
def report_gen(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_report_gen", repository / "eval" / "report_gen.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_predictions_are_what_the_model_says_of_the_scan_file(demo: SimpleNamespace, whole: Path) -> None:
    """Preparation and evaluation must say what the app says: the same words from the scan file itself."""
    chat = Med3DChat.from_pretrained(demo.model)
    studies = demo.data.studies("test")
    for study, row in zip(studies, rows_of(whole, timed=True), strict=True):
        assert row["seconds"] >= 0
        assert (row["id"], row["reference"], row["prompt"]) == (study.id, study.report, REPORT_PROMPTS[0])
        assert row["prediction"] == chat.ask(demo.root / "phantoms" / study.image, REPORT_PROMPTS[0], max_new_tokens=20).text


def test_batch_size_does_not_matter(whole: Path, run: Run, arguments: list[object], tmp_path: Path) -> None:
    run("report_gen", *arguments, "--output", tmp_path, "--batch_size", 1)
    assert rows_of(tmp_path) == rows_of(whole)
    assert (tmp_path / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()


def test_what_was_cut_short_continues(whole: Path, run: Run, arguments: list[object], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    content = (whole / "predictions.jsonl").read_bytes()
    half = content[: content.index(b"\n") + 30]  # a line and a bit of the next
    (tmp_path / "predictions.jsonl").write_bytes(half)
    run("report_gen", *arguments, "--output", tmp_path)
    assert rows_of(tmp_path) == rows_of(whole)
    assert (tmp_path / "predictions.jsonl").read_bytes().startswith(content[: content.index(b"\n") + 1])
    assert (tmp_path / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()


def test_scoring_again_gives_the_same_bytes(demo: SimpleNamespace, whole: Path, run: Run) -> None:
    before = (whole / "scores.json").read_bytes()
    run("report_gen", "--data", demo.root / "prepared", "--output", whole, "--score_only")
    assert (whole / "scores.json").read_bytes() == before
    scores = json.loads(before)
    assert scores["findings"]["against"] == "labels" and scores["samples"] == 4
    assert {"bleu1", "rouge1"} <= set(scores["text"]) and {"modal", "best_fixed", "collapse", "findings_f1_interval"} <= set(scores)


def study(number: int, report: str, **labels: int) -> Study:
    return Study(f"s{number}", f"p{number}", "x.nii.gz", report, labels, "test", "hand")


def test_scores_by_hand(report_gen: ModuleType) -> None:
    """Ascites: one hit, one miss. Gallstone: one hit. Splenomegaly: stated once in vain. Cardiomegaly: in neither, so it does not count."""
    names = {"ascites": 0, "gallstone": 0, "splenomegaly": 0, "cardiomegaly": 0}
    studies = [
        study(0, "Ascites.", **names | {"ascites": 1}),
        study(1, "Ascites. Gallstone.", **names | {"ascites": 1, "gallstone": 1}),
        study(2, "Normal.", **names),
    ]
    scores = report_gen.score(["Ascites.", "Gallstone. No ascites.", "Splenomegaly."], studies)
    assert scores["findings_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["findings"]["micro"]["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert scores["findings"]["per_class"]["cardiomegaly"]["f1"] is None
    low, high = scores["findings_f1_interval"]
    assert 0 <= low <= scores["findings_f1"] <= high <= 1
    assert scores["collapse"] == {"distinct": 1.0, "commonest": pytest.approx(1 / 3)}


def test_without_labels_the_reference_is_read(report_gen: ModuleType) -> None:
    studies = [study(0, "Ascites."), study(1, "No ascites. A gallstone.")]
    scores = report_gen.score(["Free fluid in the abdomen.", "Normal."], studies)
    assert scores["findings"]["against"] == "reference reports"
    assert scores["findings"]["per_class"]["ascites"]["f1"] == 1
    assert scores["findings_f1"] == pytest.approx((1 + 0) / 2)


def test_what_has_no_label_counts_for_nothing(report_gen: ModuleType) -> None:
    """A study without labels, and one whose ascites nobody looked for: stating it there is neither right nor wrong."""
    studies = [
        study(0, "Ascites.", ascites=1, gallstone=0),
        study(1, "Normal.", gallstone=1),
        study(2, "Ascites and a gallstone."),
        study(3, "Normal.", ascites=0, gallstone=0),
    ]
    texts = ["Ascites.", "Ascites. Gallstone.", "Ascites.", "Gallstone."]
    scores = report_gen.score(texts, studies)
    assert (scores["findings"]["against"], scores["findings"]["studies"]) == ("labels", 3)
    ascites, gallstone = (scores["findings"]["per_class"][name] for name in ("ascites", "gallstone"))
    assert (ascites["support"], ascites["predicted"], ascites["f1"]) == (1, 1, 1)
    assert (gallstone["support"], gallstone["predicted"], gallstone["f1"]) == (1, 2, pytest.approx(2 / 3))
    assert scores["findings_f1"] == pytest.approx((1 + 2 / 3) / 2)
    without = report_gen.score(
        [text for text, one in zip(texts, studies, strict=True) if one.labels], [one for one in studies if one.labels]
    )
    assert without["findings"] == scores["findings"] and without["findings_f1_interval"] == scores["findings_f1_interval"]
    # Ascites is known of two studies and true of one, 2 * 0.5 / 1.5; gallstone of three and one, 2 * 0.33 / 1.33.
    assert report_gen.fixed_reports([study(0, "Gallstone."), *studies[:2], studies[3]])["best_fixed"] == "Ascites."


def test_without_a_training_split_there_are_no_baselines(demo: SimpleNamespace, whole: Path, run: Run, tmp_path: Path) -> None:
    data = tmp_path / "prepared"
    shutil.copytree(demo.root / "prepared", data)
    kept = [study for study in read_studies(data / "studies.jsonl") if study.split == "test"]
    names = {study.id for study in kept}
    asked = [question for question in read_questions(data / "questions.jsonl") if question.study in names]
    write_records(data / "studies.jsonl", kept)
    write_records(data / "questions.jsonl", asked)
    summary = json.loads((data / "summary.json").read_text())
    summary |= {"studies": len(kept), "questions": len(asked), "splits": {"test": len(kept)}}
    (data / "summary.json").write_text(json.dumps(summary))
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    run("report_gen", "--data", data, "--output", out, "--score_only")
    scores, before = (json.loads((folder / "scores.json").read_text()) for folder in (out, whole))
    assert scores == before | {"modal": None, "best_fixed": None}


def test_fixed_reports(report_gen: ModuleType) -> None:
    texts = ["Gallstone.", "Ascites, marked.", "Gallstone and splenomegaly.", "Ascites.", "A gallstone of 5 mm."]
    labels = [(1, 0, 0), (0, 1, 0), (1, 0, 1), (0, 1, 0), (1, 0, 0)]
    studies = [
        study(i, text, gallstone=g, ascites=a, splenomegaly=s) for i, (text, (g, a, s)) in enumerate(zip(texts, labels, strict=True))
    ]
    # All differ. Two sets occur twice; the first one met wins. The best: gallstone 2 * 0.6 / 1.6 and splenomegaly 2 * 0.2 / 1.2
    assert report_gen.fixed_reports(studies) == {"modal": "Gallstone.", "best_fixed": "Gallstone and splenomegaly."}
    # A text that occurs twice is the commonest, whatever it states.
    assert report_gen.fixed_reports([*studies, study(9, "Ascites.", gallstone=0, ascites=1, splenomegaly=0)])["modal"] == "Ascites."

"""Report generation: independence of the batch size, continuation, and scores and baselines by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from med3dvlm import Med3DChat, Med3DCLIP
from med3dvlm.evaluation import embed_volumes, load_embedder, other_patients
from med3dvlm.evaluation.report_scores import fixed_reports, report_scores
from med3dvlm.files import checksum, write_lines
from med3dvlm.prompts import REPORT_PROMPTS
from med3dvlm.records import Study, fields_of, read_questions, read_studies

Run = Callable[..., None]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def arguments(demo: SimpleNamespace) -> list[object]:
    return ["--model", demo.model, "--data", demo.root / "prepared", "--max-new-tokens", 20]


@pytest.fixture
def whole(evaluated: Path) -> Path:
    return evaluated / "eval" / "report"


def test_predictions_equal_the_reports_of_the_scan_files(demo: SimpleNamespace, whole: Path) -> None:
    """Evaluation on prepared data gives the same words as the app gives for the scan file."""
    chat = Med3DChat.from_pretrained(demo.model)
    studies = demo.data.studies("test")
    for study, row in zip(studies, rows_of(whole), strict=True):
        assert (row["id"], row["reference"], row["prompt"]) == (study.id, study.report, REPORT_PROMPTS[0])
        assert row["prediction"] == chat.ask(demo.root / "phantoms" / study.image, REPORT_PROMPTS[0], max_new_tokens=20).text


def test_batch_size_does_not_matter(whole: Path, run: Run, arguments: list[object], tmp_path: Path) -> None:
    run("report_gen", *arguments, "--output", tmp_path, "--batch-size", 1)
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
    run("report_gen", "--data", demo.root / "prepared", "--output", whole, "--score-only")
    assert (whole / "scores.json").read_bytes() == before
    scores = json.loads(before)
    assert scores["findings"]["against"] == "labels" and scores["samples"] == 4
    assert {"bleu1", "rouge1"} <= set(scores["text"]) and {"modal", "best_fixed", "collapse", "findings_f1_interval"} <= set(scores)


def study(number: int, report: str, **labels: int) -> Study:
    return Study(f"s{number}", f"p{number}", "x.nii.gz", report, labels, "test", "hand")


def test_scores_by_hand() -> None:
    """Ascites: one hit, one miss. Gallstone: one hit. Splenomegaly: one false alarm. Cardiomegaly: in neither, so it does not count."""
    names = {"ascites": 0, "gallstone": 0, "splenomegaly": 0, "cardiomegaly": 0}
    studies = [
        study(0, "Ascites.", **names | {"ascites": 1}),
        study(1, "Ascites. Gallstone.", **names | {"ascites": 1, "gallstone": 1}),
        study(2, "Normal.", **names),
    ]
    scores = report_scores(["Ascites.", "Gallstone. No ascites.", "Splenomegaly."], studies)
    assert scores["findings_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["findings"]["micro"]["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert scores["findings"]["per_class"]["cardiomegaly"]["f1"] is None
    # 12 decisions, 3 positive: r = 9/6, U = 9/2; two hits, one missed, one invented: s = 2 r - r - 1.
    assert scores["findings"]["crg"] == pytest.approx(4.5 / (9 - (1.5 * 2 - 1.5 - 1)))
    low, high = scores["findings_f1_interval"]
    assert 0 <= low <= scores["findings_f1"] <= high <= 1
    assert scores["collapse"] == {"distinct": 1.0, "commonest": pytest.approx(1 / 3), "similarity": pytest.approx((2 / 4 + 0 + 0) / 3)}


def test_without_labels_findings_are_read_from_the_reference() -> None:
    studies = [study(0, "Ascites."), study(1, "No ascites. A gallstone.")]
    scores = report_scores(["Free fluid in the abdomen.", "Normal."], studies)
    assert scores["findings"]["against"] == "reference reports"
    assert scores["findings"]["per_class"]["ascites"]["f1"] == 1
    assert scores["findings_f1"] == pytest.approx((1 + 0) / 2)


def test_unknown_labels_do_not_count() -> None:
    """In a study without labels, or without a label of ascites, stating it is neither right nor wrong."""
    studies = [
        study(0, "Ascites.", ascites=1, gallstone=0),
        study(1, "Normal.", gallstone=1),
        study(2, "Ascites and a gallstone."),
        study(3, "Normal.", ascites=0, gallstone=0),
    ]
    texts = ["Ascites.", "Ascites. Gallstone.", "Ascites.", "Gallstone."]
    scores = report_scores(texts, studies)
    assert (scores["findings"]["against"], scores["findings"]["studies"]) == ("labels", 3)
    ascites, gallstone = (scores["findings"]["per_class"][name] for name in ("ascites", "gallstone"))
    assert (ascites["support"], ascites["predicted"], ascites["f1"]) == (1, 1, 1)
    assert (gallstone["support"], gallstone["predicted"], gallstone["f1"]) == (1, 2, pytest.approx(2 / 3))
    assert scores["findings_f1"] == pytest.approx((1 + 2 / 3) / 2)
    without = report_scores([text for text, one in zip(texts, studies, strict=True) if one.labels], [one for one in studies if one.labels])
    assert without["findings"] == scores["findings"] and without["findings_f1_interval"] == scores["findings_f1_interval"]
    # Ascites is known of two studies and true of one, 2 * 0.5 / 1.5; gallstone of three and one, 2 * 0.33 / 1.33.
    assert fixed_reports([study(0, "Gallstone."), *studies[:2], studies[3]])["best_fixed"] == "Ascites."


def test_without_a_training_split_there_are_no_baselines(demo: SimpleNamespace, whole: Path, run: Run, tmp_path: Path) -> None:
    data = tmp_path / "prepared"
    shutil.copytree(demo.root / "prepared", data)
    kept = [study for study in read_studies(data / "studies.jsonl") if study.split == "test"]
    names = {study.id for study in kept}
    asked = [question for question in read_questions(data / "questions.jsonl") if question.study in names]
    write_lines(data / "studies.jsonl", map(fields_of, kept))
    write_lines(data / "questions.jsonl", map(fields_of, asked))
    summary = json.loads((data / "summary.json").read_text())
    summary |= {"studies": len(kept), "questions": len(asked), "splits": {"test": len(kept)}}
    written = ("studies.jsonl", "questions.jsonl")
    summary["checksums"] |= {name: checksum((data / name).read_bytes()) for name in written}
    (data / "summary.json").write_text(json.dumps(summary))
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    run("report_gen", "--data", data, "--output", out, "--score-only")
    scores, before = (json.loads((folder / "scores.json").read_text()) for folder in (out, whole))
    assert scores == before | {"modal": None, "best_fixed": None}


def test_fixed_reports() -> None:
    texts = ["Gallstone.", "Ascites, marked.", "Gallstone and splenomegaly.", "Ascites.", "A gallstone of 5 mm."]
    labels = [(1, 0, 0), (0, 1, 0), (1, 0, 1), (0, 1, 0), (1, 0, 0)]
    studies = [
        study(i, text, gallstone=g, ascites=a, splenomegaly=s) for i, (text, (g, a, s)) in enumerate(zip(texts, labels, strict=True))
    ]
    # All differ. Two sets occur twice; the first one met wins. The best: gallstone 2 * 0.6 / 1.6 and splenomegaly 2 * 0.2 / 1.2
    assert fixed_reports(studies) == {"modal": "Gallstone.", "best_fixed": "Gallstone and splenomegaly."}
    # A text that occurs twice is the commonest, whatever it states.
    assert fixed_reports([*studies, study(9, "Ascites.", gallstone=0, ascites=1, splenomegaly=0)])["modal"] == "Ascites."


def test_every_figure_has_its_interval(whole: Path) -> None:
    scores = json.loads((whole / "scores.json").read_text())
    figures = {f"text.{name}" for name in scores["text"] if name not in ("samples", "unavailable", "punkt_model")}
    figures |= {f"findings.{mean}.{name}" for mean in ("macro", "micro") for name in ("precision", "recall", "f1")} | {"findings.crg"}
    figures |= {"laterality.accuracy"} if scores["laterality"]["interval"] else set()
    assert set(scores["intervals"]) == figures
    for path, (low, high) in scores["intervals"].items():
        value: Any = scores
        for key in path.split("."):
            value = value[key]
        assert low - 1e-6 <= value <= high + 1e-6, path
    assert scores["findings_f1_interval"] == scores["intervals"]["findings.macro.f1"]


def test_intervals_are_those_of_the_plain_bootstrap() -> None:
    """Precision, recall and F1 against scores of resampled studies; a figure does not depend on their order, so each set is scored once."""
    from functools import cache

    import numpy as np

    from med3dvlm.metrics.classification import precision_recall_f1
    from med3dvlm.reports.findings import findings_table
    from tests.metrics.bootstrap import bootstrap_interval

    names = ["ascites", "gallstone", "splenomegaly"]
    studies = [study(i, "x", ascites=i % 2, gallstone=int(i % 3 == 0), splenomegaly=int(i == 4)) for i in range(6)]
    texts = ["Ascites.", "Gallstone.", "Normal.", "Ascites and gallstone.", "Gallstone and splenomegaly.", "Ascites."]
    found = report_scores(texts, studies)["intervals"]
    labels, stated = np.array([[one.labels[name] for name in names] for one in studies]), findings_table(texts, names)

    @cache
    def scores(*rows: int) -> dict[str, Any]:
        return precision_recall_f1(labels[list(rows)], stated[list(rows)])

    for mean in ("macro", "micro"):
        for name in ("precision", "recall", "f1"):
            expected = bootstrap_interval(
                np.arange(6), [one.patient for one in studies], statistic=lambda rows, at=(mean, name): scores(*sorted(rows))[at[0]][at[1]]
            )
            assert found[f"findings.{mean}.{name}"] == pytest.approx(expected), (mean, name)


def test_crg_needs_all_labels() -> None:
    studies = [study(0, "Ascites.", ascites=1, gallstone=0), study(1, "Normal.", gallstone=1)]
    assert report_scores(["Ascites.", "Normal."], studies)["findings"]["crg"] is None
    assert report_scores(["Ascites."], studies[:1])["findings"]["crg"] == 1


def test_studies_without_a_report_have_no_lexical_score() -> None:
    studies = [study(0, "Ascites.", ascites=1), study(1, " ", ascites=0), study(2, "A gallstone.", ascites=0)]
    with_gap = report_scores(["Ascites.", "Something.", "A gallstone."], studies)
    assert with_gap["text"]["samples"] == 2 and with_gap["text"]["rouge1"] == 1 and with_gap["findings"]["studies"] == 3
    bare = [study(0, "Ascites."), study(1, ""), study(2, "A gallstone.")]
    assert report_scores(["Ascites.", "Gallstone.", "A gallstone."], bare)["findings"]["studies"] == 2
    with pytest.raises(ValueError, match="none of the 1 studies has a report"):
        report_scores(["Ascites."], [study(0, "", ascites=1)])


def test_baselines_without_the_scan(demo: SimpleNamespace, whole: Path) -> None:
    """Each row equals `report_scores` of the baseline's texts."""
    rows, studies = rows_of(whole), demo.data.studies("test")
    scores = json.loads((whole / "scores.json").read_text())
    assert len({row["blind"] for row in rows}) == 1 and scores["blind"]["report"] == rows[0]["blind"]
    chat = Med3DChat.from_pretrained(demo.model)
    import torch

    empty = torch.zeros(demo.data.processor.size)
    assert rows[0]["blind"] == chat.ask(empty, REPORT_PROMPTS[0], max_new_tokens=20).text
    places = other_patients(studies)
    assert places and all(studies[place].patient != one.patient for place, one in zip(places, studies, strict=True))
    expected = report_scores([rows[place]["prediction"] for place in places], studies)
    assert scores["shuffled"]["text"]["rouge1"] == pytest.approx(expected["text"]["rouge1"], abs=1e-6)
    assert scores["nearest"] is None
    table = (whole / "scores.md").read_text()
    assert all(f"\n| {name} " in table for name in ("model", "blind", "shuffled", "modal", "best_fixed")) and "nearest" not in table


def test_nearest_training_report(demo: SimpleNamespace, run: Run, arguments: list[object], tmp_path: Path) -> None:
    run("report_gen", *arguments, "--output", tmp_path, "--clip", demo.clip)
    embedder = load_embedder(str(demo.clip), demo.data, "cpu")
    train = demo.data.studies("train")
    texts = [embedder.texts([one.report])[0] for one in train]
    for row, one in zip(rows_of(tmp_path), demo.data.studies("test"), strict=True):
        image = embed_volumes(embedder, demo.data, [one])[0]
        assert row["nearest"] == train[max(range(len(train)), key=lambda place: float(image @ texts[place]))].id
    scores = json.loads((tmp_path / "scores.json").read_text())
    reports = {one.id: one.report for one in train}
    expected = report_scores([reports[row["nearest"]] for row in rows_of(tmp_path)], demo.data.studies("test"))
    assert scores["nearest"]["text"]["rouge1"] == pytest.approx(expected["text"]["rouge1"], abs=1e-6)
    # What the text encoder made of the training reports was kept: another run needs it no more, and finds the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Med3DCLIP, "pool_text")
        run("report_gen", *arguments, "--output", tmp_path / "again", "--clip", demo.clip)
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match="does not embed"):
        run("report_gen", *arguments, "--output", tmp_path / "other", "--clip", demo.model)

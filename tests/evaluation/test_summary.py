"""summary.json and report.md from three real evaluations of the tiny models and hand-made records of the stages."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from med3dvlm.evaluation.question_scores import question_scores

Run = Callable[..., None]
COMMIT = "c" * 40
TIMED = (("stage1", 20.0, 1.0), ("stage1", 5.0, 1.5), ("vqa", 5.0, 2.5))


@pytest.fixture(scope="module")
def root(evaluated: Path, tmp_path_factory: pytest.TempPathFactory, run_whole: Run) -> Path:
    root = tmp_path_factory.mktemp("run")
    for name in ("prepared", "phantoms", "eval"):
        (root / name).symlink_to(evaluated / name)
    for folder, seconds in (("language_model", 10.0), ("stage1", 20.5), ("stage3", 30.0)):
        (root / folder).mkdir()
        record = {"seconds": seconds, "settings": {"seed": 7}, "parameters": {"trainable": 1, "frozen": 2}, "commit": COMMIT}
        (root / folder / "run.json").write_text(json.dumps(record))
        losses = [{"step": step, "loss": 4 / step} for step in (10, 20, 30, 20, 30, 40)]  # repeated after a break
        (root / folder / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
    # stage 1 was interrupted once
    timed = [{"step": step, "seconds": seconds, "peak_rss_gb": peak} for step, seconds, peak in TIMED]
    (root / "seconds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timed))
    run_whole("summary", "--root", root)
    return root


def figure(summary: dict[str, Any], name: str) -> Any:
    value: Any = summary
    for key in name.split("."):
        value = value[key]
    return value


def test_every_key_is_there(root: Path) -> None:
    summary = json.loads((root / "summary.json").read_text())
    names = [f"retrieval.{way}.{score}" for way in ("image_to_text", "text_to_image") for score in ("r1", "r5", "r10")]
    names += [f"vqa_closed.{name}" for name in ("accuracy", "plane", "phase", "organ", "abnormality", "location", "blind", "letter")]
    names += ["vqa_open.exact", "vqa_yes_no.accuracy", "report.findings_f1", "report.modal", "report.bleu1", "report.rouge1", "report.lead"]
    for name in names:
        assert isinstance(figure(summary, name), float), name
    vqa = json.loads((root / "eval/vqa/scores.json").read_text())
    assert summary["vqa_closed"]["blind"] == vqa["closed"]["blind"]["accuracy"] and summary["vqa_closed"]["plane"] == vqa["closed"]["plane"]
    # What the shell measured counts before what a stage noted about itself.
    assert summary["seconds"] == {"stage0": 10.0, "stage1": 25.0, "stage3": 30.0, "vqa": 5.0, "total": 70.0}
    assert summary["peak_rss_gb"] == 2.5 and summary["seed"] == 7
    assert summary["versions"]["torch"]


def test_the_commit_is_that_of_what_was_run(root: Path) -> None:
    """It is not that of the checkout when the summary is written: stages and evaluations here were made by different commits, or none."""
    summary = json.loads((root / "summary.json").read_text())
    made = json.loads((root / "eval/vqa/run.json").read_text())["commit"]
    stages, evaluations = ("stage0", "stage1", "stage3"), ("retrieval", "vqa", "report")
    assert summary["commits"] == dict.fromkeys(stages, COMMIT) | dict.fromkeys(evaluations, made)
    assert summary["commit"] is None
    assert f"made by different commits: stage0 {COMMIT}, stage1 {COMMIT}" in (root / "report.md").read_text()


def test_targets(root: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("summary", "--root", root)
    printed = capsys.readouterr().out
    summary = json.loads((root / "summary.json").read_text())
    for name, entry in summary["reached"].items():
        assert entry["value"] == figure(summary, name)
        if entry["expected"] is None or entry["value"] is None:
            assert entry["reached"] is None
            continue
        expected = entry["value"] >= entry["expected"] if entry["bound"] == "at least" else entry["value"] <= entry["expected"]
        assert entry["reached"] is expected
        assert any(name in line and ("| NO " in line) is not expected for line in printed.splitlines())
    assert summary["reached"]["peak_rss_gb"]["reached"] and not summary["reached"]["report.findings_f1"]["reached"]
    run("summary", "--root", root, "--name", "mine")  # nothing is expected of it
    assert {entry["reached"] for entry in json.loads((root / "summary.json").read_text())["reached"].values()} == {None}


def test_report_shows_its_pictures(root: Path) -> None:
    text = (root / "report.md").read_text()
    assert "not a medical device" in text
    for name in ("losses", "retrieval", "vqa", "findings", "cases"):
        assert f"](pictures/{name}.png)" in text
        assert (root / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_stages_and_scans(root: Path, run: Run, tmp_path: Path) -> None:
    """Evaluations of a model trained elsewhere have no losses and times, and cases from the prepared volumes."""
    for name in ("prepared", "eval"):
        (tmp_path / name).symlink_to(root / name)
    run("summary", "--root", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seconds"] == {"total": None} and summary["peak_rss_gb"] is None and summary["seed"] is None
    assert summary["commit"] == json.loads((root / "eval/vqa/run.json").read_text())["commit"]
    assert not summary["reached"]["peak_rss_gb"]["reached"]
    assert not (tmp_path / "pictures/losses.png").exists() and (tmp_path / "pictures/cases.png").exists()


def test_missing_controls_are_null(root: Path, run: Run, tmp_path: Path) -> None:
    """Without blind answers, training split or closed questions the missing figures are null and the others present."""
    (tmp_path / "prepared").symlink_to(root / "prepared")
    shutil.copytree(root / "eval", tmp_path / "eval")
    report = json.loads((root / "eval/report/scores.json").read_text())
    without = report | dict.fromkeys(("modal", "best_fixed", "shuffled", "blind", "nearest"))
    (tmp_path / "eval/report/scores.json").write_text(json.dumps(without))
    path = tmp_path / "eval/vqa/predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | {"choices": [], "blind": None, "closed": None} for row in rows if row["choices"] != ["Yes", "No"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    patients = {row["id"]: row["id"] for row in rows}
    (tmp_path / "eval/vqa/scores.json").write_text(json.dumps(question_scores(rows, patients)))
    run("summary", "--root", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["report"]["findings_f1"] == report["findings_f1"] and summary["report"]["lead"] is None
    assert summary["vqa_closed"]["blind"] is None and summary["vqa_open"]["exact"] is not None
    assert not (tmp_path / "pictures/vqa.png").exists() and (tmp_path / "report.html").exists()


def test_a_missing_evaluation_is_named(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("summary", "--root", tmp_path, checked=True)
    assert stopped.value.code == 2
    assert "retrieval/scores.json is missing" in capsys.readouterr().err

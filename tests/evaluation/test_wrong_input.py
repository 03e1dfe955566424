"""Wrong input: one sentence on stderr, exit code 2, nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from med3dvlm import VolumeProcessor, evaluation
from med3dvlm.datasets.store import same_preprocessing

Fails = Callable[..., str]
SCRIPTS = ("retrieval", "report_gen", "vqa")


@pytest.fixture
def fails(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Fails:
    """Return the one line on stderr with which a script fails."""

    def call(script: str, *arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(script, *arguments, checked=True)
        assert stopped.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1
        return lines[0]

    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_model(script: str, fails: Fails, demo: SimpleNamespace, tmp_path: Path) -> None:
    data = ("--data", demo.root / "prepared", "--output", tmp_path / "out")
    assert "--model is missing" in fails(script, *data)
    assert "not a directory" in fails(script, *data, "--model", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no model" in fails(script, *data, "--model", tmp_path / "empty")
    other = demo.model if script == "retrieval" else demo.clip
    assert "model" in fails(script, *data, "--model", other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_data(script: str, fails: Fails, demo: SimpleNamespace, tmp_path: Path) -> None:
    model = demo.clip if script == "retrieval" else demo.model
    out = ("--model", model, "--output", tmp_path / "out")
    assert "holds no finished preparation" in fails(script, *out, "--data", tmp_path)
    data = ("--data", demo.root / "prepared")
    assert "no studies of split 'tset'" in fails(script, *out, *data, "--split", "tset")
    assert "--limit 500 exceeds the 4 studies" in fails(script, *out, *data, "--limit", "500")
    assert "whole number" in fails(script, *out, *data, "--batch-size", "0")
    assert "is missing; run the same command without --score-only" in fails(script, *out, *data, "--score-only")
    assert not (tmp_path / "out").exists()


def test_the_output_is_a_file(fails: Fails, demo: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file" in fails("vqa", "--model", demo.model, "--data", demo.root / "prepared", "--output", tmp_path / "file" / "out")


def test_predictions_of_another_run_are_not_continued(
    fails: Fails, run: Callable[..., None], demo: SimpleNamespace, tmp_path: Path
) -> None:
    arguments = ["--model", demo.model, "--data", demo.root / "prepared", "--output", tmp_path, "--max-new-tokens", 4]
    run("report_gen", *arguments, "--limit", 2)
    assert "another limit (2, not null); delete it or choose another --output" in fails("report_gen", *arguments)
    assert "another max_new_tokens (4, not 5)" in fails("report_gen", *arguments[:-1], 5, "--limit", 2)
    data = ("--data", demo.root / "prepared", "--output", tmp_path, "--score-only")
    assert "holds 2 of 4 cases" in fails("report_gen", *data)
    assert "holds 2 cases, but 1 are asked for" in fails("report_gen", *data, "--limit", 1)
    record = json.loads((tmp_path / "run.json").read_text())
    record["identity"]["model"] = "0" * 16  # trained anew since
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert 'another model ("0000000000000000", not "' in fails("report_gen", *arguments, "--limit", 2)
    (tmp_path / "run.json").unlink()
    assert "holds predictions.jsonl without the run.json" in fails("report_gen", *arguments, "--limit", 2)


def test_scoring_needs_the_data_that_was_predicted(fails: Fails, evaluated: Path, tmp_path: Path) -> None:
    """Refused are: equal ids and questions but another report or volume, another split, and a missing record of the run."""
    for name, script in (("vqa", "vqa"), ("report", "report_gen"), ("retrieval", "retrieval")):
        out, data = tmp_path / name, tmp_path / f"{name}_data"
        shutil.copytree(evaluated / "eval" / name, out)
        shutil.copytree(evaluated / "prepared", data)
        split = "train" if script == "retrieval" else "test"
        arguments = ("--data", data, "--output", out, "--score-only", "--split")
        other = "validation" if split == "train" else "train"
        assert f'made with another split ("{split}", not "{other}"); delete it or choose another --output' in fails(
            script, *arguments, other
        )
        summary = json.loads((data / "summary.json").read_text())
        (data / "summary.json").write_text(json.dumps(summary | {"fingerprint": "0" * 16}))
        before = (out / "scores.json").read_bytes()
        assert ', not "0000000000000000"); delete it or choose another --output' in fails(script, *arguments, split)
        (out / "run.json").unlink()
        assert "run.json, the record of the predictions, is missing" in fails(script, *arguments, split)
        assert (out / "scores.json").read_bytes() == before


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_a_text_may_hold_any_character(character: str, evaluated: Path, run: Callable[..., None], tmp_path: Path) -> None:
    """A prediction with the characters at which Python's splitlines cuts still takes one line of the file."""
    shutil.copytree(evaluated / "eval" / "report", tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    first, *others = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    first["prediction"] = f"Ascites.{character}A gallstone."
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (first, *others)), encoding="utf-8", newline="\n")
    run("report_gen", "--data", evaluated / "prepared", "--output", tmp_path / "out", "--score-only")
    assert evaluation.predictions(path, [{"id": row["id"]} for row in (first, *others)]) == [first, *others]


def test_a_line_that_is_no_json(fails: Fails, demo: SimpleNamespace, evaluated: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((evaluated / "eval" / "vqa" / "run.json").read_bytes())
    (tmp_path / "predictions.jsonl").write_text("{broken\n")
    assert "line 1 is not valid JSON" in fails("vqa", "--data", demo.root / "prepared", "--output", tmp_path, "--score-only")


def test_other_preprocessing(demo: SimpleNamespace) -> None:
    same_preprocessing(VolumeProcessor("m3d", size=(32, 64, 64)), demo.data)
    with pytest.raises(ValueError, match=r"of size \(64, 64, 64\), but .* was prepared with \(32, 64, 64\)"):
        same_preprocessing(VolumeProcessor("m3d", size=(64, 64, 64)), demo.data)
    with pytest.raises(ValueError, match="resize"):
        same_preprocessing(VolumeProcessor("m3d", size=(32, 64, 64), resize="trilinear"), demo.data)


def rewritten(evaluated: Path, out: Path, *texts: str | None) -> Path:
    """Return a copy of the report evaluation with other first predictions."""
    shutil.copytree(evaluated / "eval" / "report", out)
    path = out / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    for row, text in zip(rows, texts, strict=False):
        row["prediction"] = text
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return out


def test_empty_and_foreign_predictions_are_scored(evaluated: Path, run: Callable[..., None], tmp_path: Path) -> None:
    """An empty prediction scores 0 and states nothing; letters of any script form words."""
    out = rewritten(evaluated, tmp_path / "out", "", "Sağ akciğerde nodül. 右肺結節 ☤", "", "")
    run("report_gen", "--data", evaluated / "prepared", "--output", out, "--score-only")
    scores = json.loads((out / "scores.json").read_text())
    assert scores["samples"] == scores["text"]["samples"] == 4 and scores["collapse"]["commonest"] == 0.75
    assert scores["findings_f1"] == 0 and scores["text"]["corpus_bleu4"] == 0
    assert all(0 <= value <= 1 for name, value in scores["text"].items() if isinstance(value, float))


def test_a_prediction_that_is_no_text(fails: Fails, evaluated: Path, tmp_path: Path) -> None:
    out = rewritten(evaluated, tmp_path / "out", "Ascites.", None)
    before = (out / "scores.json").read_bytes()
    said = fails("report_gen", "--data", evaluated / "prepared", "--output", out, "--score-only")
    assert "line 2, about" in said and "has no text as 'prediction'" in said
    assert (out / "scores.json").read_bytes() == before


def test_a_reference_that_differs_from_the_data(fails: Fails, evaluated: Path, tmp_path: Path) -> None:
    """The ids may be those of another data set, or of this one before its reports were corrected."""
    out = rewritten(evaluated, tmp_path / "out")
    text = (out / "predictions.jsonl").read_text(encoding="utf-8")
    reference = json.loads(text.split("\n")[0])["reference"]
    (out / "predictions.jsonl").write_text(text.replace(json.dumps(reference), '"Something else."', 1), encoding="utf-8")
    said = fails("report_gen", "--data", evaluated / "prepared", "--output", out, "--score-only")
    assert "line 1, about" in said and "has another reference than the data" in said


def test_predictions_of_another_task(fails: Fails, evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "eval" / "vqa", tmp_path / "out")
    data = ("--data", evaluated / "prepared", "--output", tmp_path / "out", "--score-only")
    assert "than the data" in fails("report_gen", *data) or "is expected there" in fails("report_gen", *data)


def test_an_incomplete_line_is_ignored(fails: Fails, evaluated: Path, tmp_path: Path) -> None:
    out = rewritten(evaluated, tmp_path / "out")
    content = (out / "predictions.jsonl").read_bytes()
    (out / "predictions.jsonl").write_bytes(content[:-9])
    said = fails("report_gen", "--data", evaluated / "prepared", "--output", out, "--score-only")
    assert "holds 3 of 4 cases" in said and "it continues" in said


def test_a_reference_of_4000_words() -> None:
    from med3dvlm.evaluation.report_scores import report_scores
    from med3dvlm.records import Study

    words = " ".join(f"Nodule of {number} mm." for number in range(1000))
    studies = [Study("a", "p", "x", words, {}, "test", "hand"), Study("b", "q", "x", "A gallstone.", {}, "test", "hand")]
    scores = report_scores([words, "Gallstone."], studies)
    assert scores["text"]["rougeL"] == pytest.approx((1 + 2 / 3) / 2) and scores["text"]["bleu1"] > 0.5


def test_embeddings_of_other_studies(fails: Fails, evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "eval" / "retrieval", tmp_path / "out")
    data = ("--data", evaluated / "prepared", "--output", tmp_path / "out", "--score-only", "--split", "train")
    stored = load_file(tmp_path / "out" / "embeddings.safetensors")
    save_file({name: value[:9].clone() for name, value in stored.items()}, tmp_path / "out" / "embeddings.safetensors")
    assert "holds 9 studies, not 15" in fails("retrieval", *data)
    (tmp_path / "out" / "embeddings.safetensors").unlink()
    assert "embeddings.safetensors is missing" in fails("retrieval", *data)

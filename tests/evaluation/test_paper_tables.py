"""The papers' tables as data: their form, their consistency, and a comparison with a run."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from med3dvlm.evaluation.question_scores import question_scores
from med3dvlm.metrics.text import text_scores
from med3dvlm.reports.findings import FINDINGS_CT_RATE

Run = Callable[..., None]


@pytest.fixture(scope="module")
def published(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "med3dvlm" / "evaluation" / "paper_tables.yaml").read_text(encoding="utf-8"))


def rows(table: dict[str, Any], *names: Any) -> list[list[float]]:
    """Return the figures of the rows that begin with these names."""
    return [row[-len(table["columns"]) :] for row in table["rows"] if tuple(row[: len(names)]) == names]


def test_every_table_is_complete(published: dict[str, Any]) -> None:
    tables, measures = published["tables"], published["measures"]
    assert sorted(tables) == [f"dcformer_{n}" for n in range(1, 6)] + [f"med3dvlm_{n}" for n in range(1, 9)]
    for name, table in tables.items():
        assert name == f"{table['paper']}_{table['number']}" and table["paper"] in published["papers"]
        for field in ("title", "task", "data", "split", "unit", "by", "columns", "remarks", "rows"):
            assert table[field], f"{name} {field}"
        assert all(len(row) == len(table["by"]) + len(table["columns"]) for row in table["rows"]), name
        keys = [tuple(row[: len(table["by"])]) for row in table["rows"]]
        assert len(set(keys)) == len(keys), name
        used = [row[1] for row in table["rows"]] if table["measure"] == "by row" else table["measure"]
        assert set([used] if isinstance(used, str) else used) <= set(measures), name
        assert ("pool" in table) == (table["task"] == "retrieval")
    assert all(set(measure) == {"key", "definition", "differs"} and measure["definition"] for measure in measures.values())
    assert all(paper["arxiv"] and paper["title"] for paper in published["papers"].values())


def test_figures_are_in_their_unit(published: dict[str, Any]) -> None:
    for name, table in published["tables"].items():
        for row in rows(table):
            for column, value in zip(table["columns"], row, strict=True):
                if table["unit"] == "%" and column not in ("Params (M)", "GFLOPS"):
                    assert 1 < value <= 100, (name, row)
                elif table["unit"] == "share of 1":
                    assert 0 < value < 1, (name, row)


def test_means_equal_those_of_their_kinds(published: dict[str, Any]) -> None:
    lines = [row for number in (3, 4, 7, 8) for row in rows(published["tables"][f"med3dvlm_{number}"])]
    assert len(lines) == 12 + 3 + 16 + 4
    for *kinds, mean in lines:
        assert abs(sum(kinds) / 5 - mean) <= 0.0051


def test_recall_grows_with_k_and_shrinks_with_the_pool(published: dict[str, Any]) -> None:
    for number in (1, 5):
        table = published["tables"][f"med3dvlm_{number}"]
        for figures in rows(table):
            assert figures[:3] == sorted(figures[:3]) and figures[3:] == sorted(figures[3:])
        for method in {row[0] for row in table["rows"]}:
            assert [row[1] for row in table["rows"] if row[0] == method] == [100, 500, 1000, 2000]
            for column in zip(*rows(table, method)[1:], strict=True):  # of 100 samples, luck may differ
                assert list(column) == sorted(column, reverse=True)
    for figures in rows(published["tables"]["dcformer_3"]):
        assert figures[:3] == sorted(figures[:3]) and figures[3:] == sorted(figures[3:])


def test_figures_printed_twice_are_equal(published: dict[str, Any]) -> None:
    tables = published["tables"]
    ours = "DCFormer-S SigLIP (Ours)"
    assert rows(tables["med3dvlm_1"], ours) == rows(tables["med3dvlm_5"], ours)
    for first, second in ((2, 6), (3, 7), (4, 8)):
        assert rows(tables[f"med3dvlm_{first}"], "Med3DVLM (Ours)") == rows(tables[f"med3dvlm_{second}"], "2xMLP-Mixer-H")
    costs = [rows(tables["dcformer_4"], "all", "encoder", name)[0] for name in ("Parameters (M)", "FLOPS (G)")]
    for number in (1, 2):
        assert [row[:2] for row in rows(tables[f"dcformer_{number}"], "DCFormer")] == [list(pair) for pair in zip(*costs, strict=True)]
    assert all(one[:2] == other[:2] for one, other in zip(rows(tables["dcformer_1"]), rows(tables["dcformer_2"]), strict=True))


def test_the_pool_of_ct_rate_is_what_its_counts_allow(published: dict[str, Any]) -> None:
    """Each count divided by its ratio, rounded to three digits, bounds the size of the split; together they leave one number."""
    table = published["tables"]["dcformer_5"]
    assert len(table["rows"]) == 18
    assert {row[0].lower().replace(" ", "_") for row in table["rows"]} == set(FINDINGS_CT_RATE)
    sizes = {n for n in range(2000, 5000) if all(abs(count / n - ratio) <= 0.0005 for _, count, _, ratio in rows(table))}
    assert sizes == {published["tables"]["dcformer_3"]["pool"]}
    assert any(all(abs(count / n - ratio) <= 0.0005 for count, _, ratio, _ in rows(table)) for n in range(47_000, 47_400))


def test_dcformers_f1_is_not_that_of_its_precision_and_recall(published: dict[str, Any]) -> None:
    for number in (1, 2):
        for _, _, _, f1, precision, recall in rows(published["tables"][f"dcformer_{number}"]):
            assert f1 - 2 * precision * recall / (precision + recall) > 2


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


ANSWERS = (("plane", "axial", "axial"), ("plane", "coronal", "axial"), ("organ", "left lung", "the left lung"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    recalls = {"r1": 0.125, "r5": 0.25, "r10": 0.5}
    write(
        tmp_path / "eval/retrieval/scores.json", {"pool_30": {"pool": 30, "image_to_text": recalls, "text_to_image": recalls | {"r1": 0.0}}}
    )
    text = {"bleu1": 0.5, "rouge1": 0.25, "bertscore_f1": 0.9, "bertscore_model": "MiniLM", "unavailable": {}}
    write(tmp_path / "eval/report/scores.json", {"findings_f1": 0.1, "text": text})
    common = {"id": "1", "question": "?", "choices": []}
    lines = [common | {"kind": kind, "answer": answer, "open": said} for kind, answer, said in ANSWERS]
    scores = question_scores(lines, {"1": "p"}) | {"letter": {"accuracy": 0.4, "plane": 0.8, "organ": 0.0}}
    scores["open"] |= {"bertscore_f1": 0.875, "bertscore_model": "roberta-large, layer 17"}
    scores["open"]["plane"] |= {"bertscore_f1": 0.75}
    write(tmp_path / "eval/vqa/scores.json", scores)
    return tmp_path


def table_of(text: str, heading: str) -> list[list[str]]:
    lines = text.split(f"## {heading}")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def test_a_run_is_listed_below_the_papers_rows(root: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("compare", "--published", root, "--output", tmp_path / "out")
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "out/published.md").read_text().strip() and "not a medical device" in text
    first = table_of(text, "Med3DVLM, Table 1")
    assert first[-1] == ["this run, this data", "30", "0.00", "25.00", "50.00", "12.50", "25.00", "50.00"]
    assert ["M3D-LaMed", "2000", "19.10", "47.45", "62.25", "18.45", "47.30", "62.15"] in first
    assert table_of(text, "Med3DVLM, Table 6")[-1] == ["this run, this data", "50.00", "25.00", "-", "-"]  # no BERTScore of another model
    blue = 100 * text_scores(["the left lung"], ["left lung"])["bleu1"]
    third = table_of(text, "Med3DVLM, Table 3")
    assert third[-4] == ["this run, this data", "BLEU", "50.00", "-", f"{blue:.2f}", "-", "-", f"{(50 + blue) / 2:.2f}"]
    assert third[-1] == ["this run, this data", "BERTScore", "75.00", "-", "-", "-", "-", "87.50"]  # by the papers' model
    assert table_of(text, "Med3DVLM, Table 8")[-1] == ["this run, this data", "80.00", "-", "0.00", "-", "-", "40.00"]
    # IR of the one paper is TR of the other
    assert table_of(text, "DCFormer, Table 3")[-1] == [
        "this run, this data",
        "pool of 30",
        "0.1250",
        "0.5000",
        "-",
        "0.0000",
        "0.5000",
        "-",
    ]
    assert "DCFormer, Table 1" not in text  # nothing was detected
    for table in text.split("\n## ")[1:-1]:
        assert "no figure of the ones compares with one of the others" in table
    assert "the other way round" in text.split("## What the names mean")[1]
    assert json.loads((tmp_path / "out/published.json").read_text())["rows"]["med3dvlm_4"][0][1] == 80


def test_only_runs_on_the_same_data_are_compared(root: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("compare", "--published", root / "eval/report", "--data-name", "M3D-Cap")
    text = capsys.readouterr().out
    assert "All rows are about M3D-Cap by name" in text and "no figure of the ones" not in text and "Table 1" not in text


def test_a_run_without_scores_is_refused(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("compare", "--published", tmp_path, checked=True)
    assert stopped.value.code == 2 and "holds neither a scores.json" in capsys.readouterr().err


def test_bertscore_is_compared_only_with_the_papers_model(repository: Path) -> None:
    from bert_score.utils import model2layers

    written = vars(importlib.import_module("med3dvlm.evaluation.paper_tables"))["comparable_text_scores"]
    papers = {
        "bleu1": 0.5,
        "bertscore_f1": 0.9,
        "bertscore_model": f"roberta-large, layer {model2layers['roberta-large']}",
    }  # as BertScorer names it
    assert written(papers)["bertscore_f1"] == 0.9
    assert written(papers | {"bertscore_model": "all-MiniLM-L6-v2, layer 6"}) == {"bleu1": 0.5}

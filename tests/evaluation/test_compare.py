"""Comparisons of two runs against plain loops over all swaps of patients, refused comparisons, and the effect of duplicates."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation.detection import label_table, names_of, row
from med3dvlm.evaluation.report_scores import report_scores
from med3dvlm.metrics.classification import precision_recall_f1
from med3dvlm.metrics.intervals import paired_test
from med3dvlm.metrics.text import token_f1_values
from med3dvlm.records import Study
from med3dvlm.reports.findings import FINDINGS, findings_table

Run = Callable[..., None]
Row = dict[str, Any]


def write_run(
    folder: Path, data: PreparedData, rows: Sequence[Row], identity: dict[str, Any] | None = None, record: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(parents=True)
    about = {"data": data.summary["fingerprint"], "split": "test"} | (identity or {})
    record = {"data": str(data.root), "identity": about} | (record or {})
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "scores.json").write_text("{}")
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def data(prepared: Path) -> PreparedData:
    return PreparedData(prepared)


@pytest.fixture
def studies(data: PreparedData) -> list[Study]:
    return data.studies("test")


def reports(studies: Sequence[Study], predictions: Sequence[str]) -> list[Row]:
    return [{"id": s.id, "reference": s.report, "prediction": text} for s, text in zip(studies, predictions, strict=True)]


def p_value(studies: Sequence[Study], figure: Callable[[list[Any]], float], first: list[Any], second: list[Any]) -> float:
    """Return the share of all swaps of whole patients after which the runs differ at least as much."""
    patients = sorted({study.patient for study in studies})
    observed = abs(figure(first) - figure(second))
    extreme = []
    for chosen in itertools.product((False, True), repeat=len(patients)):
        swapped = dict(zip(patients, chosen, strict=True))
        pairs = [(b, a) if swapped[s.patient] else (a, b) for s, a, b in zip(studies, first, second, strict=True)]
        one, other = (list(column) for column in zip(*pairs, strict=True))
        extreme.append(abs(figure(one) - figure(other)) >= observed - 1e-12)
    return sum(extreme) / len(extreme)


def test_reports(data: PreparedData, studies: list[Study], tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    right = [study.report for study in studies]
    wrong = ["Nothing at all.", *right[:1], *right[2:]]  # the first two are about others
    first, second = (write_run(tmp_path / name, data, reports(studies, texts)) for name, texts in (("a", right), ("b", wrong)))
    run("compare", first, second, "--output", tmp_path / "out")
    assert (tmp_path / "out/comparison.md").read_text().strip() == capsys.readouterr().out.strip()
    result = json.loads((tmp_path / "out/comparison.json").read_text())["figures"]

    names = [name for name in FINDINGS if any(name in study.labels for study in studies)]
    labels = np.array([[study.labels.get(name, 0) for name in names] for study in studies])
    known = np.array([[name in study.labels for name in names] for study in studies])

    def macro_f1(texts: list[str]) -> float:
        return precision_recall_f1(labels, findings_table(texts, names) * known, names)["macro"]["f1"]

    for name, figure in (
        ("token_f1", lambda texts: float(token_f1_values(texts, right)["token_f1"].mean())),
        ("findings F1, macro", macro_f1),
    ):
        entry = result[name]
        assert entry["values"] == pytest.approx([figure(right), figure(wrong)], abs=1e-9)
        assert entry["difference"] == pytest.approx(figure(right) - figure(wrong), abs=1e-9)
        assert entry["p_value"] == pytest.approx(p_value(studies, figure, right, wrong), abs=1e-9)
        assert entry["interval"][0] <= entry["difference"] <= entry["interval"][1] and entry["difference"] > 0
    assert result["token_f1"]["p_value"] < 1


def test_detections(chests: SimpleNamespace, tmp_path: Path, run: Run) -> None:
    """The runs have different scales, and only the order counts; a patient's studies are swapped together; some labels are unknown."""
    asked = chests.data.studies("valid_fixed")[:10]
    assert len({study.patient for study in asked}) < 10
    names = names_of(asked)
    labels = label_table(asked, names)
    random = np.random.default_rng(0)
    tables = [labels + random.normal(0, 0.4, labels.shape), 50 * random.normal(0, 1, labels.shape) - 300]
    tables = [np.where(np.isnan(table), 0.25, table).round(1) for table in tables]  # with ties
    folders = []
    for name, table in zip("ab", tables, strict=True):
        rows = [row(study.id, names, values) for study, values in zip(asked, table, strict=True)]
        folders.append(write_run(tmp_path / name, chests.data, rows, {"split": "valid_fixed"}))
    run("compare", *folders, "--output", tmp_path / "out")
    result = json.loads((tmp_path / "out/comparison.json").read_text())["figures"]

    def macro_area(ranks: list[Any]) -> float:
        """Return the mean over findings of the share of pairs, one with and one without it, in which the first scores higher."""
        areas = []
        for truth, column in zip(labels.T, np.array(ranks).T, strict=True):
            pairs = [(a > b) + (a == b) / 2 for a in column[truth == 1] for b in column[truth == 0]]
            areas += [np.mean(pairs)] if pairs else []
        return float(np.mean(areas))

    first, second = ([list((table < line).sum(axis=0) + (table == line).sum(axis=0) / 2) for line in table] for table in tables)
    entry = result["AUROC, macro"]
    assert entry["values"] == pytest.approx([macro_area(first), macro_area(second)], abs=1e-9) and entry["values"][0] > 0.8
    assert entry["p_value"] == pytest.approx(p_value(asked, macro_area, first, second), abs=1e-9)
    assert result["AUPRC, macro"]["difference"] > 0


def test_a_run_does_not_differ_from_itself(data: PreparedData, studies: list[Study], tmp_path: Path, run: Run) -> None:
    rows = reports(studies, [study.report for study in studies[::-1]])
    first, second = (write_run(tmp_path / name, data, rows) for name in "ab")
    run("compare", first, second, "--output", tmp_path / "out")
    for entry in json.loads((tmp_path / "out/comparison.json").read_text())["figures"].values():
        assert entry["difference"] == 0 and entry["interval"] == [0, 0] and entry["p_value"] == 1


def answers(studies: Sequence[Study], right: Sequence[bool]) -> list[Row]:
    """Write two closed questions, a yes/no and an open one about each study; `right` says which of the first two are right."""
    rows = []
    for study, good in zip(studies, right, strict=True):
        likely = [-0.1, -2.0] if good else [-2.0, -0.1]
        common = {"id": study.id, "blind": [-1.0, -0.5], "letter": "A. x" if good else "It is B", "open": "x" if good else "the y"}
        rows.append(common | {"kind": "plane", "question": "Plane?", "choices": ["x", "y"], "answer": "x", "closed": likely})
        rows.append(common | {"kind": "organ", "question": "Organ?", "choices": ["x", "y"], "answer": "x", "closed": [-0.1, -2.0]})
        rows.append(common | {"kind": "organ", "question": "Is it?", "choices": ["Yes", "No"], "answer": "No", "closed": [-2.0, -0.1]})
        rows[-1] |= {"open": None, "letter": None}
        rows.append(
            common
            | {"kind": "phase", "question": "Phase?", "choices": [], "answer": "the y", "closed": None, "blind": None, "letter": None}
        )
    return rows


def test_answers_are_means_of_the_kinds(data: PreparedData, studies: list[Study], tmp_path: Path, run: Run) -> None:
    ones = [True] * len(studies)
    some = [False, False, *ones[2:]]
    first, second = (write_run(tmp_path / name, data, answers(studies, right)) for name, right in (("a", ones), ("b", some)))
    run("compare", first, second, "--output", tmp_path / "out")
    result = json.loads((tmp_path / "out/comparison.json").read_text())["figures"]
    share = sum(some) / len(some)
    assert result["closed, likeliest"]["values"] == pytest.approx([1, (share + 1) / 2])
    assert result["closed, letter"]["values"] == pytest.approx([1, share])
    assert result["closed, strict"]["values"] == pytest.approx([1, share])
    assert result["yes/no, accuracy"]["values"] == [1, 1]
    assert result["open, exact_match"]["values"] == pytest.approx([(1 + 1 + 0) / 3, (share + share + 1 - share) / 3])
    figure: Callable[[list[Any]], float] = lambda right: (sum(right) / len(right) + 1) / 2  # noqa: E731
    assert result["closed, likeliest"]["p_value"] == pytest.approx(p_value(studies, figure, ones, some))


def test_figures_are_those_of_the_evaluations(demo: SimpleNamespace, evaluated: Path, run: Run, tmp_path: Path) -> None:
    """Names and means are equal: each first value is found in scores.json."""
    for task, named in (
        ("vqa", {"closed, likeliest": "closed.accuracy", "closed, letter": "letter.accuracy", "closed, strict": "strict.accuracy",
                 "yes/no, accuracy": "yes_no.of_questions", "yes/no, balanced accuracy": "yes_no.balanced_accuracy",
                 "open, exact_match": "open.exact", "open, token_f1": "open.token_f1", "open, bleu1": "open.bleu1"}),
        ("report", {"findings F1, macro": "findings_f1", "findings F1, micro": "findings.micro.f1", "rouge1": "text.rouge1", "bleu1": "text.bleu1"}),
    ):  # fmt: skip
        folder = evaluated / "eval" / task
        run("compare", folder, folder, "--output", tmp_path / task)
        result = json.loads((tmp_path / task / "comparison.json").read_text())["figures"]
        for name, path in named.items():
            value: Any = json.loads((folder / "scores.json").read_text())
            for key in path.split("."):
                value = value[key]
            assert (name in result) == (value is not None)
            assert value is None or result[name]["values"][0] == pytest.approx(value, abs=1e-6), name


def test_studies_without_a_report_are_left_out(repository: Path) -> None:
    """As in eval/report_gen.py: always from text scores, and from findings where reports are read because labels are missing."""
    compare = vars(import_module("med3dvlm.evaluation.compare"))
    listed = [Study(f"s{i}", f"p{i}", "x", report, {}, "test", "hand") for i, report in enumerate(("Ascites.", " ", "A gallstone."))]
    texts = ["Ascites.", "A lung nodule and a renal cyst.", "Nothing."]
    expected = report_scores(texts, listed)
    once = np.ones((1, 3))
    found = compare["report_figures"](reports(listed, texts), {study.id: study for study in listed})
    values = {name: float(figure.statistic(figure.values)(once)[0]) for name, figure in found.items()}
    assert values["findings F1, macro"] == pytest.approx(expected["findings_f1"]) == 0.5
    assert values["rouge1"] == pytest.approx(expected["text"]["rouge1"]) == 0.5
    figure = found["token_f1"]
    assert paired_test(figure.statistic, figure.values, figure.values, range(3)).p_value == 1
    nothing = [replace(study, report="") for study in listed]
    runs = [compare["Run"](Path(name), "report", {}, reports(nothing, texts)) for name in "ab"]
    with pytest.raises(ValueError, match="the 3 studies have neither reports nor labels"):
        compare["compare_runs"](*runs, {study.id: study for study in nothing})


def test_a_run_on_the_splits_of_an_audit(data: PreparedData, studies: list[Study], tmp_path: Path, run: Run) -> None:
    """Its fingerprint is that of the selected studies, which run.json names."""
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"test": [study.id for study in studies[:-1]]}))
    chosen = PreparedData(data.root, split_file=path)
    rows = reports(studies[:-1], [study.report for study in studies[:-1]])
    first, second = (write_run(tmp_path / name, chosen, rows, record={"split_file": str(path)}) for name in "ab")
    run("compare", first, second)
    other = write_run(tmp_path / "c", data, rows)
    with pytest.raises(ValueError, match="compare runs of the same data"):
        run("compare", first, other)


def write_retrieval(folder: Path, data: PreparedData, studies: Sequence[Study], images: Any, texts: Any) -> Path:
    ranks = np.argsort(np.argsort(-(images @ texts.T), axis=1), axis=1).diagonal() + 1
    back = np.argsort(np.argsort(-(texts @ images.T), axis=1), axis=1).diagonal() + 1
    rows = [{"id": s.id, "image_to_text": int(a), "text_to_image": int(b)} for s, a, b in zip(studies, ranks, back, strict=True)]
    write_run(folder, data, rows)
    save_file({"image": images, "text": texts}, folder / "embeddings.safetensors")
    return folder


def test_duplicates_are_removed_from_the_pool(
    data: PreparedData, studies: list[Study], tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second scan is a copy of the first, so each retrieves the other's report; without the copy the first retrieves its own."""
    images = np.eye(len(studies), dtype=np.float32)
    texts = images.copy()
    images[1] = images[0]
    texts[0] *= 0.9
    texts[0, 1] = 0.1
    texts[1] = images[0]
    folder = write_retrieval(tmp_path / "a", data, studies, images, texts)
    (tmp_path / "split.json").write_text(json.dumps({"train": [], "test": [s.id for place, s in enumerate(studies) if place != 1]}))
    run("compare", folder, "--split-file", tmp_path / "split.json", "--output", tmp_path / "out")
    entry = json.loads((tmp_path / "out/comparison.json").read_text())["figures"]["image to text, r1"]
    assert entry["values"] == pytest.approx([1 - 1 / len(studies), 1.0]) and entry["difference"] == pytest.approx(-1 / len(studies))
    assert "p_value" not in entry and f"Kept: {len(studies) - 1} of them" in capsys.readouterr().out
    run("compare", folder, folder, "--split-file", tmp_path / "split.json")
    assert f"{len(studies) - 1} of {len(studies)} cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": "another"}, "compare runs of the same data"),
        ({"split": "validation"}, "compare runs of the same split"),
        ({"task": True}, "compare runs of one task"),
        ({"limit": True}, "2 have no counterpart in the other"),
        ({"study": True}, "does not hold study elsewhere/1"),
        ({"unfinished": True}, "4 predictions and no scores.json: run the same evaluation again, it continues"),
        ({"nameless": True}, "does not name the data and split of the run"),
        ({"anew": True}, "is not the data that"),
        ({"likelihood": True}, "lacks a number for each of its 2 choices as 'closed'"),
        ({"reference": True}, "name the run's prepared data with --data"),
        ({"empty": True}, "holds no predictions"),
        ({"fields": True}, "which is no output of"),
        ({"alone": True}, "name two runs to compare"),
        ({"split_file": True}, "keeps no study of"),
    ],
)
def test_incomparable_runs_are_refused(
    change: dict[str, Any],
    sentence: str,
    data: PreparedData,
    studies: list[Study],
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, more = reports(studies, [study.report for study in studies]), []
    identity = {name: value for name, value in change.items() if name in ("data", "split")}
    other = rows
    if "task" in change:
        other = answers(studies, [True] * len(studies))
    if "limit" in change:
        other = rows[:-2]
    if "study" in change:
        rows = other = [rows[0] | {"id": "elsewhere/1"}]
    if "reference" in change:
        rows = other = [rows[0] | {"reference": "of other data"}]
    if "likelihood" in change:
        rows = answers(studies, [True] * len(studies))
        other = [rows[0] | {"closed": None}, *rows[1:]]
    if "empty" in change:
        other = []
    if "fields" in change:
        other = [{"id": "1", "guess": "x"}]
    first = write_run(tmp_path / "a", data, rows, {"data": "before"} if "anew" in change else None)
    if "unfinished" in change:
        lines = (first / "predictions.jsonl").read_bytes()
        (first / "predictions.jsonl").write_bytes(lines[:-9])  # half a line
        (first / "scores.json").unlink()
    if "nameless" in change:
        (first / "run.json").write_text(json.dumps({"data": str(data.root)}))
    runs = [first] if change.keys() & {"alone", "split_file"} else [first, write_run(tmp_path / "b", data, other, identity)]
    if "split_file" in change:
        (tmp_path / "split.json").write_text(json.dumps({"test": []}))
        more = ["--split-file", tmp_path / "split.json"]
    with pytest.raises(SystemExit) as stopped:
        run("compare", *runs, *more, checked=True)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in said and said.count("\n") == 1

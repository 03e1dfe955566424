"""report.html: parsed, searched for forbidden content, and opened in a real browser where there is one."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation.page_cases import gallery, marked, marks_of
from med3dvlm.evaluation.question_scores import question_scores, question_tables
from med3dvlm.evaluation.report_scores import report_scores
from med3dvlm.records import Study
from tests.evaluation.test_compare import Row, Run, answers, reports, write_retrieval, write_run

VOID = {"meta", "img", "input", "link", "br", "line", "circle", "polyline", "polygon"}
HOSTILE = 'No nodule. <script>alert("1")</script> & a lung nodule of 5 mm; </p></li> <img src=http://example.org/x.png onerror=alert(2)>'


class Page(HTMLParser):
    """Collects tags, attributes and texts, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.marks: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "mark":
            self.marks.append((str(dict(attrs)["class"]), ""))
        if tag == "section" or dict(attrs).get("role") == "region":
            self.region = dict(attrs).get("aria-label") or "of no name"
        if tag == "tr":
            self.tables.setdefault(self.region, []).append([])
        if tag in ("td", "th"):
            self.tables[self.region][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words += data
        if {"td", "th"} & set(self.open):
            self.tables[self.region][-1][-1] += data.strip()
        if "mark" in self.open:
            kind, words = self.marks[-1]
            self.marks[-1] = (kind, words + data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write_scores(folder: Path, scores: dict[str, Any]) -> None:
    """Write scores beside a run of `write_run`, and complete its record."""
    (folder / "scores.json").write_text(json.dumps(scores))
    record = json.loads((folder / "run.json").read_text())
    record["identity"]["model"] = "abc"
    made = {"versions": {"torch": "2"}, "model": "outputs/<x>", "seconds": 1.5, "commit": None}
    (folder / "run.json").write_text(json.dumps(record | made))


def asked(studies: Sequence[Study]) -> list[Row]:
    """As `answers`: all are right but one plane and one yes/no question, whose kind differs between studies; blind answers are all wrong."""
    rows = answers(studies, [False, *[True] * (len(studies) - 1)])
    for place, row in enumerate(row for row in rows if row["choices"] == ["Yes", "No"]):
        row |= {"kind": "organ" if place else "phase", "blind": [-0.1, -2.0]}
        row |= {"answer": "Yes", "closed": [-2.0, -0.1]} if place == 1 else {}
    return rows


@pytest.fixture(scope="module")
def root(prepared: Path, tmp_path_factory: pytest.TempPathFactory, run_whole: Run, repository: Path) -> Path:
    """A hand-made run of all three tasks, with a hostile report, and its page."""
    root = tmp_path_factory.mktemp("page")
    (root / "prepared").symlink_to(prepared)
    data = PreparedData(prepared)
    studies = data.studies("test")
    patients = {study.id: study.patient for study in studies}
    texts = [HOSTILE, "", *(study.report for study in studies[2:])]
    fixed = {"report": "<b>modal</b>", **report_scores(["<b>modal</b>"] * len(studies), studies)}
    images = torch.eye(len(studies))
    score = import_module("med3dvlm.evaluation.retrieval").score
    write_retrieval(root / "eval/retrieval", data, studies, images.numpy(), images.numpy())
    write_scores(root / "eval/retrieval", {"pool_5": score(images, images, len(studies), studies, list(range(len(studies))))})
    write_run(root / "eval/vqa", data, asked(studies))
    write_scores(root / "eval/vqa", question_scores(asked(studies), patients))
    write_run(root / "eval/report", data, reports(studies, texts))
    write_scores(root / "eval/report", report_scores(texts, studies) | {"modal": fixed, "best_fixed": None})
    (root / "stage1").mkdir()
    (root / "stage1" / "losses.jsonl").write_text("".join(json.dumps({"step": step, "loss": 3 / step}) + "\n" for step in (10, 20, 30)))
    run_whole("page", root, "--name", "a <i>name</i>")
    return root


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return (root / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_page_loads_nothing_from_elsewhere(text: str, page: Page) -> None:
    assert "Research software, not a medical device" in page.words
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            if value := attributes.get(name):
                assert value.startswith(("#", "data:image/")), (tag, value)
    assert "url(" not in text and "@import" not in text
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'")


def test_reports_are_escaped(page: Page) -> None:
    assert len(page.all("script")) == 1 and not page.all("b") == [] and not page.all("i")
    assert HOSTILE.split("5 mm")[0].split("a lung")[0] in page.words and "onerror=alert(2)" in page.words
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert "a <i>name</i>" in page.words and "<b>modal</b>" in page.words and "outputs/<x>" in page.words


def test_findings_are_marked_by_colour_and_sign(page: Page) -> None:
    signs = {"agreed": "✓", "missed": "−", "invented": "+"}
    assert all(words.startswith(signs[kind]) for kind, words in page.marks)
    said = page.marks[3:]  # after the legend
    assert {kind for kind, _ in said} >= {"agreed", "missed"}
    assert any(words.endswith("nodule") and kind in ("agreed", "invented") for kind, words in said[:10])  # of the hostile report


def test_marks() -> None:
    reference, prediction = (
        "Pleural effusion on the left. No nodule.",
        "A nodule in the left lung. No emphysema, but emphysema. Pleural effusion.",
    )
    marks = marks_of(reference, prediction)
    assert marks == {"pleural_effusion": "agreed", "lung_nodule": "invented", "emphysema": "invented"}
    pieces = list(marked(prediction, marks))
    assert "".join(words for words, _, _ in pieces) == prediction
    assert [(words, mark) for words, mark, _ in pieces if mark] == [
        ("nodule", "invented"),
        ("emphysema", "invented"),
        ("Pleural effusion", "agreed"),
    ]
    before = "".join(words for words, _, _ in pieces[:3])
    assert before.endswith("No emphysema, but ")  # the second is the one that is stated
    assert [mark for _, mark, _ in marked(reference, marks_of(reference, "")) if mark] == ["missed"]
    assert list(marked(reference, {})) == [(reference, None, None)]


def test_each_case_has_its_slices(page: Page, prepared: Path) -> None:
    data = PreparedData(prepared)
    studies = data.studies("test")
    sources = [str(image["src"]) for image in page.all("img")]
    assert len(sources) == 3 * len(studies) and all(image["alt"] for image in page.all("img"))
    pictures = [np.array(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))) for source in sources[:3]]
    volume = data.volume(studies[0])[0].numpy().astype(int)  # (D, H, W)
    expected = volume[16], volume[::-1, 32], volume[::-1, :, 32]
    for picture, plane in zip(pictures, expected, strict=True):
        assert picture.shape == plane.shape and np.abs(picture.astype(int) - plane).mean() < 3  # a JPEG may differ a little


def cells(page: Page, label: str) -> dict[str, list[str]]:
    """Return the rows of the table in the region with this label, by their first cells."""
    return {line[0]: line for line in page.tables[label]}


def test_figures_and_honesty_rows(page: Page, root: Path) -> None:
    words = re.sub(r"\s+", " ", page.words)
    assert "shuffled" in words and "modal" in words and "best fixed" in words
    scores = json.loads((root / "eval/report/scores.json").read_text())
    low, high = scores["intervals"]["findings.micro.f1"]
    micro = cells(page, "Scores of the reports")["findings F1, micro"]
    assert micro[1:3] == [f"{scores['findings']['micro']['f1']:.2f}", f"{low:.2f}–{high:.2f}"]
    assert micro[3] == f"{scores['modal']['findings']['micro']['f1']:.2f}"
    assert len(page.all("polygon")) == 2  # a band for each direction
    assert sum(attributes.get("class") == "matrix" for attributes in page.all("table")) == 3  # plane, organ, yes/no
    pool = [line[1:4] for line in page.tables["Retrieval scores"]]
    assert pool[1:3] == [["image to text", "", "1.00"], ["image to text", "shuffled", "0.00"]] and pool[-1][1:] == ["chance", "0.20"]


def test_a_value_and_its_interval_are_of_the_same_mean(page: Page, root: Path) -> None:
    """For yes/no questions it is the mean of all questions, four of five, although the mean of their kinds is (1 + 3/4) / 2."""
    scores, lines = json.loads((root / "eval/vqa/scores.json").read_text()), cells(page, "Accuracy by kind of question")
    assert scores["yes_no"]["accuracy"] == 0.875 and scores["yes_no"]["of_questions"] == 0.8
    for name, entry, key in (
        ("yes/no", scores["yes_no"], "of_questions"),
        ("yes/no, balanced", scores["yes_no"], "balanced_accuracy"),
        ("mean of the kinds", scores["closed"], "accuracy"),
    ):
        low, high = entry[f"{key}_interval"]
        assert lines[name][1:4] == [f"{entry[key]:.2f}", f"{low:.2f}–{high:.2f}", f"{entry['blind'][key]:.2f}"]
    low, high = scores["closed"]["intervals"]["plane"]
    assert lines["plane"][1:3] == ["0.80", f"{low:.2f}–{high:.2f}"] and lines["plane"][4] == "0.50"  # chance
    assert lines["plane"][6:8] == ["0.80", "0.80"] and lines["phase"][1:] == ["–", "", "–", "–", "", "–", "–", "0.20", "5"]


def test_the_page_may_not_grow_too_large(root: Path, run: Run, tmp_path: Path, text: str) -> None:
    for name in ("prepared", "eval", "stage1"):
        (tmp_path / name).symlink_to(root / name)
    size = len(text.encode())
    run("page", tmp_path, "--megabytes", size / 1e6 - 0.001)
    smaller = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = len(re.findall(r'<li class="case"', smaller))
    assert len(smaller.encode()) < size and 1 <= shown < 5
    assert f"{shown} of 5 cases, spread evenly over the split and not selected" in smaller
    run("page", tmp_path, "--cases", 2)
    ids = re.findall(r'data-place="(\d+)"', (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert ids == ["0", "4"]


@pytest.mark.parametrize("kept", ["open", "closed", "yes_no"])
def test_a_run_with_one_kind_of_question(kept: str, prepared: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "prepared").symlink_to(prepared)
    data = PreparedData(prepared)
    studies = data.studies("test")
    sorts = {
        "open": lambda row: not row["choices"],
        "closed": lambda row: "x" in row["choices"],
        "yes_no": lambda row: "No" in row["choices"],
    }
    rows = [row for row in asked(studies) if sorts[kept](row)]
    write_run(tmp_path / "eval/vqa", data, rows)
    scores = question_scores(rows, {study.id: study.patient for study in studies})
    write_scores(tmp_path / "eval/vqa", scores)
    assert question_tables(scores).count("## ") == {"open": 1, "closed": 2, "yes_no": 1}[kept]
    run("page", tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    names = {
        "open": ["phase", "mean of the kinds"],
        "closed": ["plane", "organ", "mean of the kinds"],
        "yes_no": ["yes/no", "yes/no, balanced"],
    }
    lines = page.tables["Accuracy by kind of question"]
    assert [line[0] for line in lines[1:]] == names[kept]
    assert sum(attributes.get("class") == "matrix" for attributes in page.all("table")) == {"open": 0, "closed": 2, "yes_no": 1}[kept]


def test_studies_without_a_report_have_no_comparison() -> None:
    told, untold = (Study(name, name, "x", report, {}, "test", "hand") for name, report in (("a", "Ascites."), ("b", " ")))
    rows = reports([told, untold], ["Ascites.", "A lung nodule."])
    first, second = gallery({"report": SimpleNamespace(rows=rows)}, {"a": told, "b": untold})
    assert (first["f1"], first["alike"], first["with_report"]) == (1, 1, True)
    assert (second["f1"], second["alike"], second["with_report"], second["findings"]) == (None, None, False, [])


@pytest.mark.parametrize("task", ["retrieval", "vqa", "report"])
def test_a_page_of_a_single_evaluation(task: str, root: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "prepared").symlink_to(root / "prepared")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / task).symlink_to(root / "eval" / task)
    run("page", tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("img")) == 15 and len(page.all("section")) == 2


def test_a_folder_without_evaluations_is_refused(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("page", tmp_path, checked=True)
    assert stopped.value.code == 2 and "holds neither a scores.json" in capsys.readouterr().err


def test_a_browser_sorts_and_filters(text: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium or google-chrome on this machine")
    script = """<script>
      const said = [document.getElementById("count").value];
      const ask = (name, value) => { tools.elements[name].value = value; tools.dispatchEvent(new Event("input")); };
      const seen = () => [...document.querySelectorAll(".case:not([hidden])")].map(node => node.dataset.place).join("");
      ask("order", "f1"); said.push(seen()); ask("order", "-f1"); said.push(seen());
      ask("outcome", "clean"); said.push(seen()); ask("words", "<SCRIPT>"); ask("outcome", "invented"); said.push(seen());
      document.getElementById("theme").click(); said.push(root.dataset.theme);
      document.title = said.join("|");
    </script></body>"""
    (tmp_path / "page.html").write_text(text.replace("</body>", script), encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run([*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120, check=False)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    count, worst, best, clean, hostile, theme = title.group(1).split("|")
    assert count == "5 of 5 cases on this page"
    figures = [float(value) for value in re.findall(r'data-place="\d" data-f1="([\d.]+)"', text)]
    assert [figures[int(place)] for place in worst] == sorted(figures)
    assert [figures[int(place)] for place in best] == sorted(figures, reverse=True)
    assert set(clean) == {str(place) for place, value in enumerate(figures) if value == 1}
    assert hostile == "0" and theme in ("light", "dark")

"""report.html: parsed, searched for what must not be in it, and opened in a real browser where there is one."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from med3dvlm.datasets.store import PreparedData
from med3dvlm.metrics.classification import precision_recall_f1
from tests.eval.test_compare import answers, reports, write_retrieval, write_run

Run = Callable[..., None]
VOID = {"meta", "img", "input", "link", "br", "line", "circle", "polyline", "polygon"}
HOSTILE = 'No nodule. <script>alert("1")</script> & a lung nodule of 5 mm; </p></li> <img src=http://example.org/x.png onerror=alert(2)>'


class Page(HTMLParser):
    """Tags with their attributes, the text of what is open, and that what opens also closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.marks: list[tuple[str, str]] = []
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

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words += data
        if "mark" in self.open:
            kind, words = self.marks[-1]
            self.marks[-1] = (kind, words + data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def root(prepared: Path, tmp_path_factory: pytest.TempPathFactory, run_whole: Run) -> Path:
    """A run of all three tasks by hand, with a hostile report, and its page."""
    root = tmp_path_factory.mktemp("page")
    (root / "prepared").symlink_to(prepared)
    data = PreparedData(prepared)
    studies = data.studies("test")
    texts = [HOSTILE, "", *(study.report for study in studies[2:])]
    rows = reports(studies, texts)
    labels = np.array([[study.labels["lung_nodule"]] for study in studies])
    tallied = {"accuracy": 0.5, "accuracy_interval": [0.2, 0.8], "plane": 0.6, "organ": 1.0}
    found = precision_recall_f1(labels, np.ones_like(labels), ["lung_nodule"]) | {"against": "labels"}
    scored = {
        "findings_f1": 0.25,
        "findings_f1_interval": [0.1, 0.4],
        "findings": found,
        "text": {"bleu1": 0.5},
        "collapse": {"distinct": 0.75},
    }
    ranked = dict.fromkeys(("r1", "r5", "r10", "median_rank", "mrr"), 1.0)
    closed = tallied | {"blind": tallied | {"accuracy": 0.125}, "shuffled": tallied}
    yes_no = {"accuracy": 0.6, "accuracy_interval": None, "blind": {"accuracy": 0.5}}
    scores = {
        "retrieval": {"pool_5": {"pool": len(studies), "image_to_text": ranked, "text_to_image": ranked}},
        "vqa": {"closed": closed, "letter": tallied, "open": {"exact": 0.5, "plane": {"exact": 0.375}}, "yes_no": yes_no},
        "report": scored | {"modal": scored | {"report": "<b>modal</b>", "findings_f1": 0.0625}, "best_fixed": None},
    }
    images = np.eye(len(studies), dtype=np.float32)
    write_retrieval(root / "eval/retrieval", data, studies, images, images)
    write_run(root / "eval/vqa", data, answers(studies, [True] * len(studies)))
    write_run(root / "eval/report", data, rows)
    for task, content in scores.items():
        (root / "eval" / task / "scores.json").write_text(json.dumps(content))
        record = json.loads((root / "eval" / task / "run.json").read_text())
        record["identity"]["model"] = "abc"
        versions = {"versions": {"torch": "2"}, "model": "outputs/<x>", "seconds": 1.5, "commit": None}
        (root / "eval" / task / "run.json").write_text(json.dumps(record | versions))
    (root / "stage1").mkdir()
    (root / "stage1" / "losses.jsonl").write_text("".join(json.dumps({"step": step, "loss": 3 / step}) + "\n" for step in (10, 20, 30)))
    run_whole("page", "--root", root, "--name", "a <i>name</i>")
    return root


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return (root / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_it_needs_nothing_from_elsewhere(text: str, page: Page) -> None:
    assert "Research software, not a medical device" in page.words
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            if value := attributes.get(name):
                assert value.startswith(("#", "data:image/")), (tag, value)
    assert "url(" not in text and "@import" not in text
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'")


def test_what_a_report_holds_is_text(page: Page) -> None:
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


def test_marks(repository: Path) -> None:
    import runpy

    cases = runpy.run_path(str(repository / "eval/page_cases.py"))
    reference, prediction = (
        "Pleural effusion on the left. No nodule.",
        "A nodule in the left lung. No emphysema, but emphysema. Pleural effusion.",
    )
    marks = cases["marks_of"](reference, prediction)
    assert marks == {"pleural_effusion": "agreed", "lung_nodule": "invented", "emphysema": "invented"}
    pieces = list(cases["marked"](prediction, marks))
    assert "".join(words for words, _, _ in pieces) == prediction
    assert [(words, mark) for words, mark, _ in pieces if mark] == [
        ("nodule", "invented"),
        ("emphysema", "invented"),
        ("Pleural effusion", "agreed"),
    ]
    before = "".join(words for words, _, _ in pieces[:3])
    assert before.endswith("No emphysema, but ")  # the second is the one that is stated
    assert [mark for _, mark, _ in cases["marked"](reference, cases["marks_of"](reference, "")) if mark] == ["missed"]
    assert list(cases["marked"](reference, {})) == [(reference, None, None)]


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


def test_figures_and_honesty_rows(page: Page) -> None:
    words = re.sub(r"\s+", " ", page.words)
    assert "blind" in words and "shuffled" in words and "modal" in words and "best fixed" in words
    for value in ("0.12", "0.06", "0.38", "0.20–0.80"):  # blind, modal, open exact of planes, an interval
        assert value in words
    assert len(page.all("polygon")) == 2  # a band for each direction
    assert sum(attributes.get("class") == "matrix" for attributes in page.all("table")) == 3  # plane, organ, yes/no


def test_the_page_may_not_grow_too_large(root: Path, run: Run, tmp_path: Path, text: str) -> None:
    for name in ("prepared", "eval", "stage1"):
        (tmp_path / name).symlink_to(root / name)
    size = len(text.encode())
    run("page", "--root", tmp_path, "--megabytes", size / 1e6 - 0.001)
    smaller = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = len(re.findall(r'<li class="case"', smaller))
    assert len(smaller.encode()) < size and 1 <= shown < 5
    assert f"{shown} of 5 cases, spread evenly over the split and not selected" in smaller
    run("page", "--root", tmp_path, "--cases", 2)
    ids = re.findall(r'data-place="(\d+)"', (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert ids == ["0", "4"]


@pytest.mark.parametrize("task", ["retrieval", "vqa", "report"])
def test_one_evaluation_is_enough(task: str, root: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "prepared").symlink_to(root / "prepared")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / task).symlink_to(root / "eval" / task)
    run("page", "--root", tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("img")) == 15 and len(page.all("section")) == 2


def test_without_evaluations_it_says_so(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("page", "--root", tmp_path, checked=True)
    assert stopped.value.code == 2 and "holds no scores.json" in capsys.readouterr().err


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

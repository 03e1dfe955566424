"""`python -m benchmarks.report_evaluation` at a small size: both implementations agree and the counters count."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.report_evaluation import check_equal


@pytest.mark.slow
def test_writing_and_scoring(demo: SimpleNamespace, shell: Callable[..., str], tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name, source in (("model", demo.model), ("stage1", demo.clip), ("prepared", demo.root / "prepared")):
        (root / name).symlink_to(source)
    small = ("--studies", 4, "--runs", 1, "--max-new-tokens", 8, "--batch-size", 3, "--output", tmp_path / "out")
    said = shell("python", "-m", "benchmarks.report_evaluation", "--root", root, *small)
    results = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (tmp_path / "out" / "eval.md").read_text() in said
    assert set(results["published"]["parts"]) == set(results["ours"]["parts"]) == {"writing", "words", "BERTScore"}
    assert results["times"] == pytest.approx(results["published"]["seconds"] / results["ours"]["seconds"])
    assert results["figures"].keys() >= {"bleu1", "rouge1", "bertscore_f1"}
    vqa, retrieval = results["volumes"]["vqa"], results["volumes"]["retrieval"]
    assert vqa["encoded"] == 4 + 1 < vqa["one a question"]  # the empty volume, too
    assert retrieval == {"encoded": 4, "one a pool and study": 1 + 2 + 4, "volumes": 4}


def test_implementations_that_differ_are_an_error() -> None:
    one = (["a", "b"], {"bleu1": 0.5}, {})
    check_equal(one, (["a", "b"], {"bleu1": 0.5 + 9e-6}, {}))
    with pytest.raises(ValueError, match="1 of 2 reports differ"):
        check_equal(one, (["a", "c"], {"bleu1": 0.5}, {}))
    with pytest.raises(ValueError, match="bleu1 is 0.5 the published way and 0.6 ours"):
        check_equal(one, (["a", "b"], {"bleu1": 0.6}, {}))

"""`python -m benchmarks.serving` at a small size: its figures measure what their names say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_figure_is_measured(shell: Callable[..., str], tmp_path: Path) -> None:
    small = ("--sessions", 3, "--reports", 2, "--answer-tokens", 3, "--report-tokens", 5, "--requests", 4, "--output", tmp_path)
    said = shell("python", "-m", "benchmarks.serving", *small)
    results = json.loads((tmp_path / "serving.json").read_text(encoding="utf-8-sig"))
    assert (tmp_path / "serving.md").read_text(encoding="utf-8-sig") in said
    for way in ("together", "one by one"):
        assert 0 < results[way]["sessions"]["first"] <= results[way]["sessions"]["whole"] < results[way]["sessions"]["total"]
        assert results[way]["reports"]["tokens_per_second"] > 0
    assert results["known_scan"]["further"] < results["known_scan"]["first"] and results["memory"]["all"] > 0

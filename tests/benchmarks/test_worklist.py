"""`python -m benchmarks.worklist` at a small size: its figures measure what their names say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_method_writes_the_same_reports(shell: Callable[..., str], tmp_path: Path) -> None:
    said = shell("python", "-m", "benchmarks.worklist", "--scans", 10, "--loop", 1, "--report-tokens", 5, "--output", tmp_path)
    results = json.loads((tmp_path / "worklist.json").read_text(encoding="utf-8-sig"))
    assert (tmp_path / "worklist.md").read_text(encoding="utf-8-sig") in said
    assert results["scans_run"] == 10 and results["same_reports"] == "1 of 1"
    assert min(results[name] for name in ("report_command", "one_process", "run")) > 0

"""`python -m benchmarks.reading`, tiny: both readers give what was written, or it fails."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import reading as benchmark


def test_every_packing(run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Path(benchmark.__file__), "--slices", 12, "--size", 48, "--repeats", 1, "--output", tmp_path)
    results = json.loads((tmp_path / "reading.json").read_text())
    assert (results["slices"], results["size"], [*results["packings"]]) == (12, 48, [*benchmark.PACKINGS])
    plain = results["packings"]["plain"]["bytes"]
    assert plain == 12 * 48 * 48 * 2
    for name, found in results["packings"].items():
        assert set(found["median"]) == {"ours", "SimpleITK"} and found["ratio"] > 0
        assert (found["bytes"] < plain) == (not name.startswith("plain"))
    assert "12 slices of 48 x 48" in capsys.readouterr().out


def test_other_values_fail(monkeypatch: pytest.MonkeyPatch, run: Callable[..., None], tmp_path: Path) -> None:
    monkeypatch.setitem(benchmark.READERS, "SimpleITK", lambda folder: np.zeros((4, 16, 16), np.int16))
    with pytest.raises(ValueError, match="plain: SimpleITK gives other values than were written"):
        benchmark_main(monkeypatch, tmp_path)
    assert not (tmp_path / "reading.json").exists()


def benchmark_main(monkeypatch: pytest.MonkeyPatch, output: Path) -> None:
    benchmark.main(["--slices", "4", "--size", "16", "--packings", "plain", "--repeats", "1", "--output", str(output)])

"""`python -m benchmarks.loading` at a small size: its figures measure what their names say."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import loading
from benchmarks.loading import BASELINE, BYTES, FLOAT, WORKERS, growth
from med3dvlm import read_volume
from med3dvlm.datasets.phantom import write_phantoms


@pytest.fixture(scope="module")
def scan(phantoms: Path) -> tuple[str, Path]:
    return "--scan", next(phantoms.rglob("*.nii.gz"))


@pytest.mark.slow
def test_loading_and_preparation(shell: Callable[..., str], scan: tuple[str, Path], tmp_path: Path) -> None:
    said = shell("python", "-m", "benchmarks.loading", *scan, "--size", "16,32,24", "--volumes", 6, "--runs", 1, "--output", tmp_path)
    results = json.loads((tmp_path / "data.json").read_text())
    assert set(results["loading"]) == set(WORKERS)
    for rows in results["loading"].values():
        assert set(rows) == {BASELINE, FLOAT, BYTES} and rows[BASELINE]["times"] == 1
        assert all(row["seconds"] > 0 for row in rows.values())
    assert set(results["preparation"]) == {"scan.nii.gz", "slices"}
    assert all(0 < row["share_decompressing"] < 1 for row in results["preparation"].values())
    assert (tmp_path / "data.md").read_text() in said and {path.name for path in tmp_path.iterdir()} >= {"data.json", "data.md"}


@pytest.mark.slow
def test_memory(shell: Callable[..., str], scan: tuple[str, Path], tmp_path: Path) -> None:
    shell("python", "-m", "benchmarks.loading", *scan, "--size", "16,32,24", "--memory", 15, "--batch", 3, "--output", tmp_path)
    results = json.loads((tmp_path / "data_memory.json").read_text())
    assert [volumes for volumes, _ in results["megabytes"]] == list(range(3, 16, 3))
    with Image.open(tmp_path / "data_memory.png") as picture:
        assert picture.format == "PNG"


def test_without_a_scan_phantoms_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "write_phantoms", partial(write_phantoms, detail=0.2))
    first, second = loading.sources(tmp_path, None, 2)
    assert first != second and all(len(read_volume(path).array) > 1 for path in (first, second))


def test_memory_growth_leaves_out_the_first_samples() -> None:
    samples = [(number, {"all": 10.0 if number < 500 else 100.0 + number / 100}) for number in range(100, 1600, 100)]
    assert growth(samples) == {"all": 8.0}  # of 600 to 1500: the first two and the last two

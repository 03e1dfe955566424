"""`python -m benchmarks.loading`, small: that it measures what it says, not how fast this machine is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.loading import BASELINE, BYTES, FLOAT, WORKERS, growth


@pytest.mark.slow
def test_loading_and_preparation(shell: Callable[..., str], tmp_path: Path) -> None:
    said = shell("python", "-m", "benchmarks.loading", "--size", "16,32,24", "--volumes", 6, "--runs", 1, "--output", tmp_path)
    results = json.loads((tmp_path / "data.json").read_text())
    assert set(results["loading"]) == set(WORKERS)
    for rows in results["loading"].values():
        assert set(rows) == {BASELINE, FLOAT, BYTES} and rows[BASELINE]["times"] == 1
        assert all(row["seconds"] > 0 for row in rows.values())
    assert set(results["preparation"]) == {"scan.nii.gz", "slices"}
    assert all(0 < row["share_decompressing"] < 1 for row in results["preparation"].values())
    assert (tmp_path / "data.md").read_text() in said and {path.name for path in tmp_path.iterdir()} >= {"data.json", "data.md"}


@pytest.mark.slow
def test_memory(shell: Callable[..., str], tmp_path: Path) -> None:
    shell("python", "-m", "benchmarks.loading", "--size", "16,32,24", "--memory", 60, "--batch", 3, "--output", tmp_path)
    results = json.loads((tmp_path / "data_memory.json").read_text())
    assert [volumes for volumes, _ in results["megabytes"]] == list(range(3, 61, 3))
    with Image.open(tmp_path / "data_memory.png") as picture:
        assert picture.format == "PNG"


def test_growth_is_that_after_the_beginning() -> None:
    samples = [(number, {"all": 10.0 if number < 500 else 100.0 + number / 100}) for number in range(100, 1600, 100)]
    assert growth(samples) == {"all": 8.0}  # of 600 to 1500: the first two and the last two

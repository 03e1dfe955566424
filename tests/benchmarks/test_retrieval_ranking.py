"""`python -m benchmarks.retrieval`, small: that it ranks, compares with one query at a time, and counts memory."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import retrieval as benchmark


def test_a_small_pool(run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Path(benchmark.__file__), "--pairs", 60, "--width", 24, "--output", tmp_path)
    results = json.loads((tmp_path / "retrieval.json").read_text())
    assert "60 images and texts, 24 wide" in capsys.readouterr().out
    assert (results["pairs"], results["width"]) == (60, 24) and 0 < results["image_to_text_r1"] < 1
    assert results["seconds"] > 0 and 0.05 < results["peak_gb"] < 100


def test_wrong_ranks_fail(monkeypatch: pytest.MonkeyPatch, run: Callable[..., None], tmp_path: Path) -> None:
    def wrong(images: np.ndarray, texts: np.ndarray) -> dict[str, np.ndarray]:
        return dict.fromkeys(("image_to_text", "text_to_image"), np.full(len(images), 7))

    monkeypatch.setattr("med3dvlm.metrics.retrieval.retrieval_ranks", wrong)
    with pytest.raises(ValueError, match="image_to_text: the partner of 0 has rank 7, but"):
        run(Path(benchmark.__file__), "--pairs", 30, "--width", 8, "--output", tmp_path)
    assert not (tmp_path / "retrieval.json").exists()


def test_pairs_are_found_in_part() -> None:
    images, texts = benchmark.pairs(40, 16)
    assert images.dtype == texts.dtype == np.float32 and images.shape == texts.shape == (40, 16)
    assert benchmark.plain_rank(3, images, images) == 1

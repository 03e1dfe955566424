"""`python -m benchmarks.zero_shot` at a small size: both implementations agree, and their encodings are counted."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import zero_shot
from benchmarks.zero_shot import check_equal
from med3dvlm import Med3DCLIP


def test_a_random_model(run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, texts = [], []
    encode_image, encode_text = Med3DCLIP.encode_image, Med3DCLIP.encode_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Med3DCLIP, "encode_image", lambda self, volumes: images.append(len(volumes)) or encode_image(self, volumes))
        patch.setattr(
            Med3DCLIP, "encode_text", lambda self, **tokens: texts.append(len(tokens["input_ids"])) or encode_text(self, **tokens)
        )
        run(Path(zero_shot.__file__), "--size", "16,32,32", "--studies", 3, "--runs", 1, "--output", tmp_path)
    results = json.loads((tmp_path / "zero_shot.json").read_text())
    assert len(images) == (18 + 1) * (1 + 3)  # a warm-up volume and three
    assert sum(texts) == 36 * (1 + 1) + 36 * (3 + 1)
    assert results["times"] == pytest.approx(results["literal"]["seconds"] / results["ours"]["seconds"]) and results["difference"] < 1e-6
    assert (tmp_path / "zero_shot.md").read_text() in capsys.readouterr().out


def test_a_trained_model(run: Callable[..., None], chests: SimpleNamespace, tmp_path: Path) -> None:
    data = ("--data", chests.root / "prepared", "--split", "valid_fixed")
    run(Path(zero_shot.__file__), "--model", chests.clip, *data, "--studies", 2, "--runs", 1, "--output", tmp_path)
    assert json.loads((tmp_path / "zero_shot.json").read_text())["size"] == [32, 64, 64]
    with pytest.raises(ValueError, match="--model and --data belong together"):
        run(Path(zero_shot.__file__), "--model", chests.clip)


def test_implementations_that_differ_are_an_error() -> None:
    one = torch.tensor([[0.25, 0.5]])
    assert check_equal(one, one + 9e-6) == pytest.approx(9e-6, rel=0.01)
    with pytest.raises(ValueError, match="the two ways differ by 2.0e-05 in a probability"):
        check_equal(one, one - 2e-5)

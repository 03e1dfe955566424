"""GradCache: a batch in chunks has the loss and the gradients of the whole batch, in float64."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import DistilBertConfig

from med3dvlm import Med3DCLIP, Med3DCLIPConfig, programs
from med3dvlm.training import stage1_siglip
from med3dvlm.training.grad_cache import backward_in_parts, split_pairs
from tests.launching import launch

VIT = {"patch": [8, 16, 16], "width": 16, "depth": 2, "heads": 2}  # no batch norm
TEXT = DistilBertConfig(
    vocab_size=50, max_position_embeddings=16, dim=16, hidden_dim=24, n_layers=2, n_heads=2, dropout=0.0, attention_dropout=0.0
)


def clip(loss: str, encoder: str = "vit3d_naive", **options: object) -> Med3DCLIP:
    config = Med3DCLIPConfig(encoder, options or VIT, (16, 32, 32), text_config=TEXT, projection_dim=8, loss=loss)
    return Med3DCLIP(config).double().train()


def pairs(texts: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (7 * texts, 9))
    return {"pixel_values": torch.rand(7, 1, 16, 32, 32).double(), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def in_parts(model: Med3DCLIP, batch: dict[str, Tensor], size: int) -> Tensor:
    def backward(_: int, compute: Callable[[], Tensor]) -> None:
        compute().backward()

    return backward_in_parts(model, split_pairs(batch, size), lambda part: model(**part, return_loss=False), backward)


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("loss", ["siglip", "clip"])
def test_gradients_equal_those_of_the_whole_batch(loss: str, texts: int, size: int) -> None:
    """Measured: 3e-15 of the largest gradient of each weight."""
    whole = clip(loss)
    parts, batch = copy.deepcopy(whole), pairs(texts)
    expected = whole(**batch).loss
    expected.backward()
    assert in_parts(parts, batch, size).item() == pytest.approx(expected.item(), rel=1e-12)
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert (one.grad - other.grad).abs().max() <= 1e-11 * one.grad.abs().max().clamp_min(1e-3), name


def test_dropout_draws_the_same_in_both_passes() -> None:
    """The results equal a single pass with the same seed, chunk by chunk."""
    whole = clip("siglip")
    whole.text_encoder.config.dropout = 0.5
    for module in whole.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    parts, batch = copy.deepcopy(whole), pairs(1)
    torch.manual_seed(3)
    outputs = [whole(**part, return_loss=False) for part in split_pairs(batch, 3)]
    expected = whole.contrast(torch.cat([one.image_embeds for one in outputs]), torch.cat([one.text_embeds for one in outputs]))
    expected.backward()
    torch.manual_seed(3)
    assert in_parts(parts, batch, 3).item() == pytest.approx(expected.item(), rel=1e-12)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-14)


def test_running_statistics_count_each_chunk_once() -> None:
    once = clip("siglip", "dcformer_nano", widths=[4, 4, 8, 8, 8], stem_layers=1)
    parts, batch = copy.deepcopy(once), pairs(1)
    with torch.no_grad():
        for part in split_pairs(batch, 3):
            once(**part, return_loss=False)
    in_parts(parts, batch, 3)
    for (name, one), other in zip(once.named_buffers(), parts.buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-12), name


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_in_chunks_equals_training_with_whole_batches(
    processes: int, prepared: Path, tiny_models: SimpleNamespace, tmp_path: Path
) -> None:
    still = json.dumps({"dropout": 0, "attention_dropout": 0})
    flags = (
        "--config", "smoke/stage1_siglip", "--data", prepared, "--text-encoder", tiny_models.text_encoder, "--train-text", "true",
        "--cache-features", "false", "--text-options", still, "--encoder", "vit3d_naive", "--encoder-options", json.dumps(VIT), "--image-stages", 1,
        "--lr-scheduler-type", "constant", "--sentences", 2,
    )  # fmt: skip
    found = []
    for name, more in (("whole", ()), ("parts", ("--chunk-size", 1 if processes > 1 else 3))):
        words = [str(word) for word in (*flags, "--output-dir", tmp_path / name, *more)]
        if name == "whole" or processes == 1:
            assert programs.run(stage1_siglip.main, words) == 0
        else:
            words += ["--per-device-train-batch-size", "2"]
            codes = launch("torchrun", processes, "stages/stage1_siglip.py", *words, log=tmp_path / "log")
            assert codes == [0] * processes, (tmp_path / "log").read_text()[-3000:]
        found.append([json.loads(line)["loss"] for line in (tmp_path / name / "losses.jsonl").read_text().splitlines()])
    assert found[1] == pytest.approx(found[0], rel=1e-5) and len(found[0]) == 4


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--deepspeed", "deepspeed/zero2"), "chunk_size does not go with DeepSpeed"),
        (("--dense-weight", "1"), "chunk_size does not go with dense_weight"),
    ],
)
def test_incompatible_settings_are_refused(
    flags: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "smoke/stage1_siglip", "--data", str(tmp_path), "--output-dir", str(tmp_path), "--chunk-size", "2", *flags]
    with pytest.raises(SystemExit, match="2"):
        programs.run(stage1_siglip.main, words)
    assert sentence in capsys.readouterr().err

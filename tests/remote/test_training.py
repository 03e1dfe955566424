"""Training on data at an address equals training on the disk, also after a kill within an epoch: same losses and weights, and no file is
fetched twice."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from med3dvlm.training.nodes import COMPLETE
from tests.launching import launch
from tests.remote.server import serving

ENCODER = {"widths": [8, 8, 16, 24, 32], "stem_layers": 1, "layer_scale": 0.1, "stem_stride": 2}
BERT = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SETTINGS = (
    "--config", "stages/configs/smoke/stage1_siglip.yaml", "--text-encoder", "new", "--train-text", "true", "--cache-features", "false",
    "--text-options", json.dumps(BERT), "--encoder-options", json.dumps(ENCODER), "--gradient-checkpointing", "true", "--max-steps", 8,
    "--augmentation", "intensity", "--per-device-train-batch-size", 2, "--dataloader-num-workers", 1, "--disable-tqdm", "true",
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_learn_the_same_from_an_address(prepared: Path, tmp_path: Path) -> None:
    """The steps cross the end of an epoch, with augmentation and workers; the first training is killed after 3 of an epoch's steps."""
    log = tmp_path / "log"

    def begin(data: object, output: Path, *flags: object, kill_at: Path | None = None) -> list[int]:
        words = (*SETTINGS, "--data", data, "--output-dir", output, *flags)
        return launch("torchrun", 2, "stages/stage1_siglip.py", *words, log=log, kill_at=kill_at)

    def train(data: object, output: Path, *flags: object) -> dict[int, float]:
        codes = begin(data, output, *flags)
        assert codes == [0, 0], log.read_text()[-5000:]
        return {line["step"]: line["loss"] for line in map(json.loads, (output / "losses.jsonl").read_text().splitlines())}

    local = train(prepared, tmp_path / "local")
    flags = ("--data-cache", tmp_path / "cache", "--data-cache-size", "1GB", "--save-steps", 3)
    with serving(prepared) as server:
        codes = begin(server.address, tmp_path / "remote", *flags, kill_at=tmp_path / "remote" / "checkpoint-3" / COMPLETE)
        assert codes[0] == -9, log.read_text()[-5000:]
        found = train(server.address, tmp_path / "remote", *flags)
        assert "continuing from" in log.read_text()
    assert found == local and len(local) == 8
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("remote", "local"))
    assert all(weights[name].equal(value) for name, value in expected.items()) and weights.keys() == expected.keys()
    asked = [times for path, times in server.asked.items() if "volumes" in path]
    assert len(asked) == 22 and set(asked) == {1}

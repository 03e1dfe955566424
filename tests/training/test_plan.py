"""`med3dvlm plan`: parts worked by hand for a small model, and the message for one that does not fit."""

import json
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from med3dvlm.cli import main
from med3dvlm.training.plan import NF4_BYTES, Engine, Memory, _remedy, memory_of

SMALL = ("--gpu-memory", "8", "--encoder", "dcformer_nano", "--size", "32,64,64")


class Small(nn.Module):
    """A model with 128 frozen weights that can be quantised and 64 that train."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.ModuleDict({"layer": nn.Linear(64, 2, bias=False)}).requires_grad_(False)
        self.projector = nn.Linear(8, 8, bias=False)


@pytest.mark.parametrize(
    ("name", "quantized", "weights", "gradients", "optimiser", "communication"),
    [
        (None, False, 128 * 2 + 64 * 6, 64 * 4, 64 * 8, 64 * 4),
        (None, True, 128 * NF4_BYTES + 64 * 6, 64 * 4, 64 * 8, 64 * 4),
        ("deepspeed/zero2", False, 192 * 2, 64 * 2 / 4, 64 * 12 / 4, 64 * 2 * 2 + 64 * 2),
        ("deepspeed/zero3", False, 192 * 2 / 4, 64 * 2 / 4, 64 * 12 / 4, 64 * 2 * 2 + 192 * 2),
        ("deepspeed/zero3_offload", False, 0, 64 * 2 / 4, 0, 64 * 2 * 2 + 192 * 2),
    ],
)
def test_parts_by_hand(name: Any, quantized: bool, weights: float, gradients: float, optimiser: float, communication: float) -> None:
    arguments, asked = SimpleNamespace(weights_dtype=torch.bfloat16), Namespace(gpus=4, size=(2, 3, 5))
    memory = memory_of(Small(), arguments, asked, Engine.read(name), quantized, (1000.0, {"activations": 10.0, "logits": 5.0}))
    expected = {"weights": weights, "gradients": gradients, "optimiser": optimiser, "communication": communication}
    assert {part: memory.fixed[part] for part in expected} == expected
    assert memory.each == {"activations": 10, "logits": 5, "volumes": 120}
    fixed = sum(memory.fixed.values())
    assert memory.total(3) == fixed + 405 and memory.fits(fixed + 404) == 2 and memory.fits(fixed - 1) == 0


def test_a_plan_is_printed_and_one_that_does_not_fit_fails(
    tiny_models: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["plan", "--config", "smoke/stage3_lora", *SMALL, "--language-model", str(tiny_models.language_model), "--rows", "100"]
    assert main([*flags, "--volumes-per-second", "0.1"]) == 0
    said = capsys.readouterr().out
    layers = 2 * 4 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 48))  # rank 4: of queries and outputs, of keys and values, of the MLP
    assert f"{'language_model (LoRA)':28} {layers / 1e6:10.2f} M train" in said
    assert "steps                  4 of 4, 0.0 hours" in said and "| none * | whole |" in said
    assert main([*flags, "--gpu-memory", "0.001"]) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("It does not fit: a batch of 4 takes") and re.search(
        r"; not even a batch of 1 fits: it takes at least 0\.\d GB with --", last
    )
    for stage in ("stage1_siglip", "ct_clip"):
        assert (
            main(["plan", "--config", f"smoke/{stage}", *SMALL, "--text-encoder", str(tiny_models.text_encoder), "--max-text-length", "60"])
            == 0
        )
    dense = ["plan", "--config", "smoke/segmentation", "--clip", str(tiny_models.clip), "--size", "32,64,64"]
    assert main([*dense, "--gpu-memory", "8"]) == 0
    assert f"{'head':28}" in capsys.readouterr().out


def test_settings_that_would_fit_are_named() -> None:
    """A batch of 4 has 60 bytes beside the fixed parts."""
    arguments = SimpleNamespace()
    ways = [("", Memory({"weights": 40.0}, {"activations": 20.0})), ("--a", Memory({"weights": 40.0}, {"activations": 17.0}))]
    more = ("--a --b", Memory({"weights": 30.0}, {"activations": 15.0}))
    assert _remedy([*ways, more], arguments, 4, 100.0) == "--per-device-train-batch-size 3 fits, and a batch of 4 fits with --a --b"
    assert _remedy(ways, arguments, 4, 100.0) == "--per-device-train-batch-size 3 fits"
    assert _remedy(ways, SimpleNamespace(chunk_size=4), 4, 58.0) == "--chunk-size 1 fits with --a"
    assert _remedy(ways, arguments, 4, 50.0) == "not even a batch of 1 fits: it takes at least 0.0 GB with --a"


def test_unknown_shapes_and_configurations_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "smoke/stage2_projector", *SMALL, "--language-model", "nobody/nothing"]) == 2
    assert "the shapes of nobody/nothing are not known here" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--config", "smoke/stage0_language_model", *SMALL])
    assert "not the settings of a stage (stage1_siglip, ct_clip, segmentation, stage2_projector, stage3_lora)" in capsys.readouterr().err


def test_the_package_knows_the_papers_models() -> None:
    """tests/stages/test_configs.py has them from the published files."""
    from med3dvlm.training.arguments import CONFIGS
    from tests.stages.test_configs import CLINICAL_BERT, QWEN_7B

    for name, expected in (("qwen2.5-7b-instruct", QWEN_7B), ("clinicalbert", CLINICAL_BERT)):
        found = json.loads(Path(CONFIGS / "models" / f"{name}.json").read_text(encoding="utf-8-sig"))
        assert {key: value for key, value in found.items() if key != "model_type"} == expected

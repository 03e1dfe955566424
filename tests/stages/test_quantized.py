"""Stages 2 and 3 on a language model in 4 bits: their output, and a merged model equal to the trained one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from med3dvlm import programs
from med3dvlm.checkpoints import load_adapted, load_vlm, merge_lora
from med3dvlm.checkpoints.hub import push
from med3dvlm.models.vlm import Med3DVLM
from med3dvlm.training import stage2_projector, stage3_lora
from tests.launching import launch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

Run = Callable[..., Path]
NF4 = ("--quantize", "nf4")
NAMES = {stage2_projector: "stage2_projector", stage3_lora: "stage3_lora"}


@pytest.fixture
def language_model(tiny_models: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder with a language model whose layers have enough inputs for a block."""
    config = AutoConfig.from_pretrained(tiny_models.language_model, hidden_size=64, intermediate_size=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(tiny_models.language_model).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.fixture
def run(prepared: Path, tiny_models: SimpleNamespace, language_model: Path, tmp_path: Path) -> Run:
    """run(stage, name, "--flag", value, ...) runs a smoke recipe on the tiny models and returns its output folder."""
    inputs = {
        stage2_projector: ("--clip", tiny_models.clip, "--language-model", language_model),
        stage3_lora: ("--merged", "", "--lora-dropout", 0),
    }

    def started(stage: Any, name: str, *flags: object) -> Path:
        words = ("--config", f"smoke/{NAMES[stage]}", "--data", prepared, "--output-dir", tmp_path / name, *inputs[stage], *flags)
        assert programs.run(stage.main, [str(word) for word in words]) == 0
        return tmp_path / name

    return started


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


def inputs_of(model: Med3DVLM, length: int = 12) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (1, model.config.num_image_tokens + length), generator=generator)
    ids[0, : model.config.num_image_tokens] = model.config.image_token_id
    volume = torch.rand(1, 1, *model.config.size, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": volume}


def test_stage2_can_refer_to_its_language_model_by_path(run: Run, language_model: Path, tmp_path: Path) -> None:
    whole = run(stage2_projector, "whole")
    named = run(stage2_projector, "named", "--save-language-model", "false")
    with safe_open(named / "model.safetensors", "pt") as file:
        assert not any(name.startswith("language_model.") for name in file.keys())  # noqa: SIM118
    one, other = load_vlm(whole)[0], load_vlm(named)[0]
    inputs = inputs_of(one)
    with torch.no_grad():
        assert torch.allclose(one(**inputs).logits, other(**inputs).logits, atol=1e-5)
    assert load_vlm(named, dtype=torch.bfloat16)[0].language_model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="load it with med3dvlm.checkpoints.load_vlm"):
        Med3DVLM.from_pretrained(named)
    with pytest.raises(ValueError, match="does not hold its language model, .*; upload the merged model"):
        push(named, "somebody/model")
    copy = tmp_path / "copy"
    shutil.copytree(language_model, copy)
    config = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(
        json.dumps(config | {"language_model_source": config["language_model_source"] | {"place": str(copy)}})
    )
    load_vlm(named)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    with pytest.raises(ValueError, match="no longer the one that .* was trained with"):
        load_vlm(named)


def test_qlora_from_stage2_to_a_merged_model(run: Run, tmp_path: Path) -> None:
    """Projector and LoRA train in float32 on a quantised language model; merging keeps their effect."""
    base = run(stage2_projector, "base", *NF4, "--save-language-model", "false", "--gradient-checkpointing", "true")
    with safe_open(base / "checkpoint-4" / "training_state-00000.safetensors", "pt") as file:
        kinds = {tuple(key.split("/")[1].split(".")[:1]) + (key.split("/")[0] == "buffers",) for key in file.keys()}  # noqa: SIM118
    assert kinds == {("projector", False), ("vision_encoder", True)}
    output = run(
        stage3_lora, "adapter", "--model", base, *NF4, "--optim", "paged_adamw_32bit", "--gradient-checkpointing", "true", "--learning-rate", 0.01
    )  # fmt: skip
    assert json.loads((output / "quantization.json").read_text()) == {"method": "nf4", "double_quantization": True}
    adapted, _ = load_adapted(output)
    inputs = inputs_of(adapted.get_base_model())
    with torch.no_grad():
        expected = adapted(**inputs).logits
    plain = load_vlm(base)[0]
    merge_lora(output, tmp_path / "merged")
    merged = load_vlm(tmp_path / "merged")[0]
    with torch.no_grad():
        spread = expected.std()
        assert (merged(**inputs).logits - expected).abs().max() < 1e-4 * spread
        assert (plain(**inputs).logits - expected).abs().max() > 0.1 * spread
    record = json.loads((tmp_path / "merged" / "merged_from.json").read_text())
    assert 0.01 < record["relative_error_of_quantized_weights"]["nf4"] < 0.25
    assert merged.config.language_model_source is None


@pytest.mark.parametrize(("stage", "flags"), [(stage2_projector, ("--save-language-model", "false")), (stage3_lora, ())])
def test_a_quantized_training_resumes(stage: Any, flags: tuple[object, ...], run: Run) -> None:
    if stage is stage3_lora:
        flags = ("--model", run(stage2_projector, "base"), "--optim", "paged_adamw_32bit")
    flags += (*NF4, "--lr-scheduler-type", "constant")
    whole = run(stage, "whole", *flags)
    run(stage, "parts", *flags, "--max-steps", 2)
    assert losses(run(stage, "parts", *flags)) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "processes", "engine"), [("deepspeed", 2, "deepspeed/zero2"), ("torchrun", 2, "")])
def test_training_under_launchers(launcher: str, processes: int, engine: str, run: Run, prepared: Path, tmp_path: Path) -> None:
    base = run(stage2_projector, "base")
    alone = run(stage3_lora, "alone", "--model", base, *NF4, "--max-steps", 2)
    codes = launch(
        launcher, processes, "stages/stage3_lora.py", "--config", "smoke/stage3_lora", "--data", prepared, "--output-dir", tmp_path / "shared",
        "--model", base, "--merged", "", "--lora-dropout", 0, *NF4, "--max-steps", 2, "--per-device-train-batch-size", 4 // processes,
        "--deepspeed", engine, log=tmp_path / "log",
    )  # fmt: skip
    assert codes == [0] * processes, (tmp_path / "log").read_text()[-3000:]
    assert losses(tmp_path / "shared") == pytest.approx(losses(alone), rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "flags", "sentence"),
    [
        (stage2_projector, NF4, "quantize holds no whole language model to save; pass --save-language-model false"),
        (stage3_lora, (*NF4, "--deepspeed", "deepspeed/zero3"), "quantize does not go with ZeRO-3"),
        (stage3_lora, ("--quantize", "int3"), "quantize is 'int3' but must be nf4"),
        (stage3_lora, ("--optim", "paged_adamw_32bit", "--deepspeed", "deepspeed/zero2"), "which DeepSpeed does not take"),
    ],
)
def test_incompatible_settings_are_refused(
    stage: Any, flags: tuple[str, ...], sentence: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", f"smoke/{NAMES[stage]}", "--data", str(prepared), "--output-dir", str(tmp_path), *flags]
    with pytest.raises(SystemExit, match="2"):
        programs.run(stage.main, words)
    assert sentence in capsys.readouterr().err

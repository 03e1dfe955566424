"""The stage scripts as programs: killed and resumed, and started by deepspeed, torchrun and accelerate."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from med3dvlm.checkpoints import load_clip, load_vlm
from med3dvlm.training import stage0_language_model, stage1_siglip, stage2_projector, stage3_lora
from tests.launching import launch
from tests.stages.running import Run, name_of


def smoke(stage: ModuleType, prepared: Path, output: Path, models: SimpleNamespace) -> tuple[object, ...]:
    name = name_of(stage)
    parts = {
        stage0_language_model: (),
        stage1_siglip: ("--text-encoder", models.text_encoder),
        stage2_projector: ("--clip", models.clip, "--language-model", models.language_model),
        stage3_lora: ("--model", models.vlm, "--merged", output.parent / "merged"),
    }[stage]
    return (f"stages/{name}.py", "--config", f"stages/configs/smoke/{name}.yaml", "--data", prepared, "--output-dir", output, *parts)


@pytest.mark.slow
def test_a_repeatedly_killed_training_equals_an_uninterrupted_one(
    tmp_path: Path, prepared: Path, tiny_models: SimpleNamespace, shell: Callable[..., str]
) -> None:
    """In stage 3 dropout and conversations depend on step and epoch; weights and losses are equal bit for bit."""
    flags = smoke(stage3_lora, prepared, tmp_path / "unused", tiny_models)[1:]
    shell("python", "tests/drivers/killed_training.py", "stage3_lora", tmp_path, *flags, "--max-steps", 8, "--save-steps", 3)
    assert json.loads((tmp_path / "codes.json").read_text()) == [0, *[-signal.SIGKILL] * 6, 0]
    whole, killed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    curves = [
        [(row["step"], row["loss"]) for row in map(json.loads, (tmp_path / name / "losses.jsonl").read_text().splitlines())]
        for name in ("whole", "killed")
    ]
    assert curves[0] == curves[1] and [step for step, _ in curves[0]] == list(range(1, 9))
    assert not (tmp_path / "killed" / "saving").exists() and load_vlm(tmp_path / "killed" / "merged")


@pytest.mark.slow
def test_deepspeed_zero2_on_two_processes_has_the_losses_of_one(
    tmp_path: Path, prepared: Path, tiny_models: SimpleNamespace, run: Callable[..., Run], shell: Callable[..., str], free_port: str
) -> None:
    """In stage 2 no batch norm depends on a process's part of the batch. The training is started twice; the second continues the first.

    Worst difference measured: 8e-8 of the losses, 3e-3 of the distance that the weights moved.
    On the same batches a model that does not learn has losses that are higher by 0.004 to 0.005: equal losses mean equal weights.
    """
    rate = ("--learning-rate", 0.1, "--lr-scheduler-type", "constant")
    one = run(stage2_projector, *rate, "--per-device-train-batch-size", 4)
    untrained = run(stage2_projector, "--learning-rate", 0, "--per-device-train-batch-size", 4)
    command = (*smoke(stage2_projector, prepared, tmp_path / "two", tiny_models), *rate, "--per-device-train-batch-size", 2)
    engine, log = ("--deepspeed", "ds_configs/zero2.json", "--use-cpu", "true"), tmp_path / "log"
    assert launch("deepspeed", 2, *command, "--max-steps", 2, *engine, log=log) == [0, 0], log.read_text()
    shell("deepspeed", "--num_accelerators", 2, "--master_port", free_port, *command, "--max-steps", 4, *engine)
    two = Run(tmp_path / "two", {}, {}, set(), set())
    assert two.record["processes"] == 2 and two.record["settings"]["deepspeed"] == "ds_configs/zero2.json"
    assert two.losses == pytest.approx(one.losses, rel=1e-5) and len(two.losses) == 4
    assert abs(one.losses[0] - one.losses[-1]) > 0.01
    assert all(without - learned > 0.003 for without, learned in zip(untrained.losses[1:], one.losses[1:], strict=True))
    assert list(two.output.glob("checkpoint-4/training_state-*.safetensors"))
    trained = load_vlm(two.output)[0].state_dict()
    moved, apart = (
        torch.cat([(values[name] - one.after[name]).flatten() for name in sorted(one.trainable)]).norm() for values in (one.before, trained)
    )
    assert apart < 0.02 * moved  # all parameters together: Adam makes much of rounding where one's gradient is nearly nothing


@pytest.mark.slow
def test_torchrun_on_two_processes(
    tmp_path: Path, prepared: Path, tiny_models: SimpleNamespace, shell: Callable[..., str], free_port: str
) -> None:
    """Stage 1 on two processes gathers their texts."""
    command = smoke(stage1_siglip, prepared, tmp_path / "out", tiny_models)
    shell("torchrun", "--nproc_per_node", 2, "--master_port", free_port, *command, "--train-text", "true", "--max-steps", 2)
    assert Run(tmp_path / "out", {}, {}, set(), set()).record["processes"] == 2
    assert load_clip(tmp_path / "out")


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path, prepared: Path, tiny_models: SimpleNamespace, shell: Callable[..., str]) -> None:
    command = smoke(stage3_lora, prepared, tmp_path / "out", tiny_models)
    shell("accelerate", "launch", "--cpu", *command, "--max-steps", 2, "--bf16", "true")
    assert load_vlm(tmp_path / "merged")

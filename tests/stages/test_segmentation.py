"""Segmentation and stage 1 with a dense loss, with and without DeepSpeed, in float32 and bfloat16, and resuming."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from med3dvlm.checkpoints import load_clip, load_segmenter
from med3dvlm.datasets.mask_prompts import MaskDataset
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.training.dense import SEGMENTER
from med3dvlm.training.trainer import COMPLETE
from tests.launching import launch
from tests.stages.test_launched import PAIRS

pytestmark = pytest.mark.slow
ZERO2 = ("--deepspeed", "ds_configs/zero2.json")
Train = Callable[..., Path]
STEPS = 12
DECODER = ("--decoder-widths", "8,8,8,8", "--embedding-dim", 8, "--embedding-stride", 2, "--prompts", 4)


@pytest.fixture(scope="module")
def train(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(stage, name, flags...) trains a stage on four studies, with three for validation, and returns its output folder."""
    root = tmp_path_factory.mktemp("segmentation")
    ids = [study.id for study in PreparedData(prepared).studies("train")]
    (root / "few.json").write_text(json.dumps({"train": ids[:4], "validation": ids[4:7]}))

    def run(stage: str, name: str, *flags: object, bf16: bool = False, processes: int = 1, kill_at: str | None = None) -> Path:
        output = root / name
        common = (
            "--data", prepared, "--split-file", root / "few.json", "--output-dir", output, "--bf16", bf16, "--max-steps", STEPS, "--save-steps",
            100, "--per-device-train-batch-size", 4 // processes, "--train-sampling-strategy", "sequential", "--lr-scheduler-type",
            "constant", "--disable-tqdm", "true", "--learning-rate", 0.01,
        )  # fmt: skip
        own = (*PAIRS, *DECODER) if stage == "stage1_siglip" else ("--config", "stages/configs/smoke/segmentation.yaml", *DECODER)
        kill = None if kill_at is None else output / kill_at
        launcher = "deepspeed" if "--deepspeed" in flags else "python" if processes == 1 else "torchrun"
        log = root / f"{name}.log"
        codes = launch(launcher, processes, f"stages/{stage}.py", *own, *common, *flags, log=log, kill_at=kill)
        assert codes == [0] * processes if kill is None else codes[0] == -9, log.read_text()[-5000:]
        return output

    return run


@pytest.fixture(scope="module")
def clip(train: Train) -> Path:
    return train("stage1_siglip", "clip", "--max-steps", 2)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("attention", [True, False])
def test_losses_of_a_decoder_under_deepspeed_in_both_types(attention: bool, train: Train, clip: Path) -> None:
    flags = ("--clip", clip, "--dual-cross-attention", attention)
    exact = train("segmentation", f"plain_{attention}", *flags)
    expected = losses(exact)
    assert len(expected) == STEPS and min(expected[-3:]) < 0.97 * expected[0]
    for bf16 in (False, True):
        curve = losses(train("segmentation", f"zero2_{attention}_{bf16}", *flags, *ZERO2, bf16=bf16))
        assert curve == pytest.approx(expected, rel=0.05 if bf16 else 1e-3)
    after, before = weights(exact), weights(clip)
    for name in before:
        moved = not torch.equal(after[f"clip.{name}"], before[name])
        if name.startswith(("text_encoder.", "image_projection", "text_projection", "logit")):
            assert not moved, name
        elif not name.endswith(("depth.0.bias", "height.0.bias", "width.0.bias", "num_batches_tracked")):  # batch norm takes them out
            assert moved, name
    model, processor = load_segmenter(train("segmentation", f"zero2_{attention}_True", *flags, *ZERO2, bf16=True))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    coded = processor(text="lung nodule")
    with torch.no_grad():
        output = model(torch.rand(1, 1, *processor.image_processor.size), **coded, counts=torch.tensor([1]))
    assert output.logits.isfinite().all()


def test_the_loss_does_not_depend_on_the_distribution_of_a_batch(train: Train, clip: Path) -> None:
    """The vision encoder is frozen, because its batch norm would depend on the volumes of one process."""
    flags = ("--clip", clip, "--train-encoder", False, "--cache-features", False, "--max-steps", 4)
    whole = losses(train("segmentation", "whole_batch", *flags))
    assert losses(train("segmentation", "two_processes", *flags, processes=2)) == pytest.approx(whole, rel=1e-3)
    parts = ("--per-device-train-batch-size", 1, "--gradient-accumulation-steps", 4)
    assert losses(train("segmentation", "accumulated", *flags, *parts)) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("stage", ["segmentation", "stage1_siglip"])
def test_a_killed_training_resumes(stage: str, train: Train, clip: Path) -> None:
    flags = ("--max-steps", 6, "--save-steps", 2, *ZERO2)
    flags += ("--clip", clip) if stage == "segmentation" else ("--dense-weight", 0.5)
    whole = train(stage, f"whole_{stage}", *flags)
    killed = train(stage, f"killed_{stage}", *flags, kill_at=f"checkpoint-2/{COMPLETE}")
    assert not (killed / "run.json").exists()
    train(stage, f"killed_{stage}", *flags)
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-3)


def test_a_dense_loss_writes_a_clip_and_a_segmenter(train: Train) -> None:
    """The CLIP equals the segmenter's; the dense loss changes its encoder; further steps replace both."""
    curves = {}
    for bf16 in (False, True):
        flags = ("--dense-weight", 1.0, "--learning-rate", 0.003, *ZERO2)  # with larger steps rounding grows into another training
        output = train("stage1_siglip", f"dense_{bf16}", *flags, bf16=bf16)
        curves[bf16] = losses(output)
        own, within = weights(output), weights(output / SEGMENTER)
        assert all(torch.equal(own[name], within[f"clip.{name}"]) for name in own)
        model, processor = load_segmenter(output / SEGMENTER)
        assert load_clip(output)[1].to_dict() == processor.to_dict()
        assert not model.dtype.is_complex
    assert curves[True][:5] == pytest.approx(curves[False][:5], rel=0.05)
    before = weights(train("stage1_siglip", "dense_False", *flags) / SEGMENTER)
    after = weights(train("stage1_siglip", "dense_False", *flags, "--max-steps", STEPS + 2) / SEGMENTER)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    plain = losses(train("stage1_siglip", "without"))
    assert curves[False][0] > plain[0]


def test_the_validation_loss_equals_that_of_single_studies(train: Train, clip: Path, prepared: Path) -> None:
    flags = ("--clip", clip, "--max-steps", 1, "--learning-rate", 0, "--eval-strategy", "steps", "--eval-steps", 1)
    for size, processes in ((2, 1), (1, 2)):  # each its own model: the statistics of batch norm follow the batches of a process
        output = train("segmentation", f"validated_{size}", *flags, "--per-device-eval-batch-size", size, processes=processes)
        found = json.loads((output / "validation_losses.jsonl").read_text())["eval_loss"]
        model, processor = load_segmenter(output)
        data = PreparedData(prepared, split_file=output.parent / "few.json")
        rows = MaskDataset(data, "validation", 42, count=4)
        losses = []
        for number, study in enumerate(rows.studies):
            row = rows[number]
            prompts = {**processor(text=row["prompts"]), "counts": torch.tensor([len(row["prompts"])])}
            with torch.no_grad():
                losses.append(float(model(load_volumes(data, [study]), **prompts, masks=row["masks"][None]).loss))
        assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_wrong_settings(train: Train, clip: Path, tmp_path: Path, prepared: Path) -> None:
    for flags, sentence in (
        ((), "--clip is missing"),
        (("--clip", clip, "--decoder-widths", "8,x"), "must be whole numbers, as 32,32,64,128"),
        (("--clip", clip, "--segmentation-loss", "dice"), "known: dice_balanced_ce, dice_ce, dice_focal"),
        (("--clip", clip, "--cache-features", "true", "--train-text", "true"), "does not go with a text encoder that trains"),
    ):
        log = tmp_path / "log"
        given = (
            "--config",
            "stages/configs/smoke/segmentation.yaml",
            "--clip",
            "",
            "--data",
            prepared,
            "--output-dir",
            tmp_path / "out",
            *flags,
        )
        assert launch("python", 1, "stages/segmentation.py", *given, log=log) == [2]
        assert sentence in log.read_text()
        log.unlink()

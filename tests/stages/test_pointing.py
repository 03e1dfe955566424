"""Stage 3 with a segmenter: trainable parameters, with and without DeepSpeed, resuming, and the merged model's masks."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from med3dvlm.checkpoints import load_adapted, load_segmenter, load_vlm
from med3dvlm.datasets.conversations import ConversationCollator, ConversationDataset, ConversationOptions
from med3dvlm.datasets.pointing import PointingAnswers
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.training.trainer import COMPLETE
from tests.launching import launch

pytestmark = pytest.mark.slow
ZERO2 = ("--deepspeed", "ds_configs/zero2.json")
Train = Callable[..., Path]
STEPS = 12


@pytest.fixture(scope="module")
def train(prepared: Path, tiny_models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(name, flags...) trains stage 3 on four studies, with three for validation, and returns its output folder."""
    root = tmp_path_factory.mktemp("pointing")
    ids = [study.id for study in PreparedData(prepared).studies("train")]
    (root / "few.json").write_text(json.dumps({"train": ids[:4], "validation": ids[4:7]}))

    def run(name: str, *flags: object, bf16: bool = False, processes: int = 1, kill_at: str | None = None, code: int = 0) -> Path:
        output = root / name
        given = (
            "--config", "stages/configs/smoke/stage3_lora.yaml", "--model", tiny_models.vlm, "--segmenter", tiny_models.segmenter, "--merged",
            output / "merged", "--data", prepared, "--split-file", root / "few.json", "--output-dir", output, "--cache-features", "false",
            "--bf16", bf16, "--max-steps", STEPS, "--save-steps", 100, "--per-device-train-batch-size", 4 // processes, "--lora-dropout", 0,
            "--train-sampling-strategy", "sequential", "--lr-scheduler-type", "constant", "--disable-tqdm", "true", "--learning-rate", 0.01,
            "--closed", 0, "--follow-ups", 0,
        )  # fmt: skip
        kill = None if kill_at is None else output / kill_at
        launcher = "deepspeed" if "--deepspeed" in flags else "python" if processes == 1 else "torchrun"
        log = root / f"{name}.log"
        codes = launch(launcher, processes, "stages/stage3_lora.py", *given, *flags, log=log, kill_at=kill)
        assert codes == [code] * processes if kill is None else codes[0] == -9, log.read_text()[-5000:]
        return output

    return run


@pytest.fixture(scope="module")
def plain(train: Train) -> Path:
    return train("plain")


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


def test_trainable_parameters_change_and_the_decoder_does_not(plain: Path, tiny_models: SimpleNamespace) -> None:
    curve = losses(plain)
    assert len(curve) == STEPS and curve[-1] < curve[0] - 0.1
    merged, _ = load_vlm(plain / "merged")
    segmenter, _ = load_segmenter(tiny_models.segmenter)
    own = segmenter.head.state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in merged.pointing.head.state_dict().items())
    for name, weight in load_vlm(tiny_models.vlm)[0].vision_encoder.state_dict().items():
        assert torch.equal(weight, merged.vision_encoder.state_dict()[name])
    learned = load_file(plain / "adapter_model.safetensors")
    assert {name.partition(".pointing.")[2].split(".")[0] for name in learned if ".pointing." in name} == {"head", "projection", "token"}
    table, row = merged.language_model.get_input_embeddings().weight, merged.config.segmentation_config["pointing_token_id"]
    assert torch.equal(table[row], merged.pointing.token[0])


def test_the_merged_model_has_the_masks_of_the_adapted_one(plain: Path, prepared: Path) -> None:
    adapted, processor = load_adapted(plain)
    merged, again = load_vlm(plain / "merged")
    assert processor.pointing_token_id == again.pointing_token_id is not None
    data = PreparedData(prepared)
    rows = ConversationDataset(data, "train", ConversationOptions(closed=0, follow_ups=0), answers=PointingAnswers(data))
    row, pixels = rows[0], load_volumes(data, rows.studies[:1])
    for turns in row["conversations"]:
        ids = torch.tensor([processor.encode(turns)["input_ids"]])
        masks = []
        for model in (adapted.get_base_model(), merged):
            with torch.no_grad():
                queries = model.point(ids, model.encode_image(pixels))
                masks.append(model.pointing.draw(model.vision_encoder, model.vision_encoder(pixels), queries[None], pixels).logits)
        assert masks[0].shape[1] == (ids == processor.pointing_token_id).sum()
        torch.testing.assert_close(*masks, rtol=1e-4, atol=1e-4)


def test_losses_under_deepspeed_in_both_types(plain: Path, train: Train) -> None:
    for bf16 in (False, True):
        output = train(f"zero2_{bf16}", *ZERO2, bf16=bf16)
        assert losses(output)[:6] == pytest.approx(losses(plain)[:6], rel=0.05 if bf16 else 1e-3)
    model, _ = load_vlm(output / "merged")
    assert len({parameter.dtype for parameter in model.parameters()}) == 1


@pytest.mark.parametrize("decoder", [False, True])
def test_the_loss_does_not_depend_on_the_distribution_of_a_batch(decoder: bool, train: Train) -> None:
    flags = ("--max-steps", 3, "--merged", "", "--train-decoder", decoder)
    whole = losses(train(f"whole_{decoder}", *flags))
    assert losses(train(f"two_{decoder}", *flags, processes=2)) == pytest.approx(whole, rel=1e-3)
    parts = ("--per-device-train-batch-size", 1, "--gradient-accumulation-steps", 4)
    assert losses(train(f"accumulated_{decoder}", *flags, *parts)) == pytest.approx(whole, rel=1e-3)


def test_a_killed_training_resumes(train: Train) -> None:
    flags = ("--max-steps", 6, "--save-steps", 2, "--merged", "", *ZERO2)
    whole = train("to_the_end", *flags)
    killed = train("killed", *flags, kill_at=f"checkpoint-2/{COMPLETE}")
    assert not (killed / "run.json").exists()
    train("killed", *flags)
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-3)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, killed))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


def test_the_validation_loss_equals_that_of_single_rows(train: Train, prepared: Path) -> None:
    flags = ("--max-steps", 1, "--learning-rate", 0, "--eval-strategy", "steps", "--eval-steps", 1, "--mask-weight", 0.5)
    for size, processes in ((2, 1), (1, 2)):
        output = train(f"validated_{size}", *flags, "--per-device-eval-batch-size", size, processes=processes)
        found = json.loads((output / "validation_losses.jsonl").read_text())["eval_loss"]
        model, processor = load_vlm(output / "merged")
        data = PreparedData(prepared, split_file=output.parent / "few.json")
        rows = ConversationDataset(data, "validation", ConversationOptions(closed=0, follow_ups=0), 42, answers=PointingAnswers(data))
        words, masks, items = 0.0, 0.0, 0
        for number in range(len(rows)):
            batch = ConversationCollator(processor, 256)([rows[number]])
            batch["pixel_values"] = data.processor.dequantize(batch["pixel_values"])
            with torch.no_grad():
                output_of = model(**batch, num_items_in_batch=1)
            words += float(output_of.language_loss)
            masks += 0.5 * float(output_of.mask_losses.sum())
            items += int((batch["labels"][:, 1:] != -100).sum())
        assert found == pytest.approx(words / items + masks / len(rows), rel=1e-4)


def test_wrong_settings(train: Train, tiny_models: SimpleNamespace, plain: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_models.segmenter.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights = load_file(other / "model.safetensors")
    weights[next(name for name in weights if name.startswith("clip.vision_encoder."))] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for name, flags, sentence in (
        ("encoder", ("--segmenter", other), "is not that of the model, so that its decoder would misread it"),
        ("cached", ("--cache-features", "true"), "pass --cache-features false"),
        ("twice", ("--model", plain / "merged"), "the model points already, and a new decoder would replace its own"),
        ("kind", ("--segmenter", tiny_models.clip), "holds a model of type med3d_clip"),
    ):
        train(name, *flags, code=2)
        assert sentence in (plain.parent / f"{name}.log").read_text()


def test_a_pointing_model_can_be_trained_further_without_the_segmenter(train: Train, plain: Path) -> None:
    again = train("again", "--model", plain / "merged", "--segmenter", "", "--max-steps", 2)
    merged, _ = load_vlm(again / "merged")
    assert merged.pointing is not None

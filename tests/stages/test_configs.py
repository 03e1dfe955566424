"""Every recipe in stages/configs parses, and configs/paper holds the paper's numbers, including the count of trainable parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import DistilBertConfig, Qwen2Config

from med3dvlm import Med3DCLIP, Med3DCLIPConfig, Med3DVLM, Med3DVLMConfig
from med3dvlm.cli import PROGRAMS
from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.encoders import build_encoder, count_parameters
from med3dvlm.training import ct_clip, segmentation, stage0_language_model, stage2_projector, stage3_lora
from med3dvlm.training.arguments import StageArguments, find_config
from med3dvlm.training.contrastive import ContrastiveArguments
from med3dvlm.training.parsing import parse_arguments
from med3dvlm.training.run import lora_targets, train_only

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "stages" / "configs"
ARGUMENTS = {
    "stage0_language_model": stage0_language_model.Stage0Arguments,
    "stage1_siglip": ContrastiveArguments,
    "ct_clip": ct_clip.CTCLIPArguments,
    "stage2_projector": stage2_projector.Stage2Arguments,
    "stage3_lora": stage3_lora.Stage3Arguments,
    "segmentation": segmentation.SegmentationArguments,
}
PATHS = sorted(CONFIGS.rglob("*.yaml"))
GPUS = 8

# Qwen2.5-7B-Instruct and ClinicalBERT (a DistilBERT over the multilingual vocabulary), from their published config.json.
QWEN_7B = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
CLINICAL_BERT = {"vocab_size": 119547, "max_position_embeddings": 512, "dim": 768, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12}


def parse(path: Path, *flags: str) -> Any:
    """Return the stage's arguments for the CPU, without DeepSpeed, which would start here."""
    return parse_arguments(ARGUMENTS[path.stem], ["--config", str(path), "--deepspeed", "", "--use-cpu", "true", *flags])


def paper(stage: str) -> Any:
    return parse(CONFIGS / "paper" / f"{stage}.yaml", "--data", "x")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_parses_and_its_values_arrive(path: Path) -> None:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    arguments = parse(path, "--data", "x")
    for name, value in settings.items():
        if name not in ("data", "deepspeed", "use_cpu", "report_to"):
            if name == "augmentation":
                value = Augmentation.read(value).to_dict()  # every amount stands in the record of a run
            arrived = getattr(arguments, name)
            assert arrived == value or str(getattr(arrived, "value", arrived)) == str(value), name
    assert arguments.report_to == []  # nothing goes to a service unless asked for
    assert arguments.save_total_limit >= 2
    if "deepspeed" in settings:
        assert json.loads(find_config(settings["deepspeed"], ".json").read_text(encoding="utf-8"))["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_command_in_a_recipe_names_the_recipe(path: Path) -> None:
    said = path.read_text(encoding="utf-8")
    (stage,) = (name for name, (module, _) in PROGRAMS["train"].items() if module == f"training.{path.stem}")
    assert f"train {stage} --config {path.parent.name}/{path.stem}" in said


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_flags_override_the_recipe_and_unknown_ones_are_named(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = parse(path, "--data", "y", "--learning-rate", "0.5", "--max-steps", "3", "--output-dir", "there")
    assert (arguments.data, arguments.learning_rate, arguments.max_steps, arguments.output_dir) == ("y", 0.5, 3, "there")
    with pytest.raises(SystemExit, match="2"):
        parse(path, "--data", "y", "--learning-rat", "0.5")
    assert "unknown: --learning-rat 0.5; did you mean learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo", "smoke", "paper"])
def test_a_stage_reads_what_the_one_before_it_writes(name: str) -> None:
    settings = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (CONFIGS / name).glob("*.yaml")}
    if name != "paper":  # there the model comes from the hub, and both paths from the command line
        assert settings["stage2_projector"]["clip"] == settings["stage1_siglip"]["output_dir"]
        assert settings["stage2_projector"]["language_model"] == settings["stage0_language_model"]["output_dir"]
        assert settings["stage3_lora"]["model"] == settings["stage2_projector"]["output_dir"]
    outputs = [stage["output_dir"] for stage in settings.values()]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize(
    ("stage", "batch", "rate", "decay", "epochs"),
    [("stage1_siglip", 64, 1e-4, 0.1, 100), ("stage2_projector", 16, 1e-4, 0.0, 3), ("stage3_lora", 8, 5e-5, 0.0, 5)],
)
def test_the_papers_numbers(stage: str, batch: int, rate: float, decay: float, epochs: int) -> None:
    """The numbers are those of the Med3DVLM paper, section 3.4; the batch is that of all 8 GPUs."""
    arguments = paper(stage)
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * GPUS == batch
    assert (arguments.learning_rate, arguments.weight_decay, arguments.num_train_epochs) == (rate, decay, epochs)
    assert arguments.max_steps == -1  # or the epochs would not count
    assert arguments.lr_scheduler_type == "cosine" and arguments.get_warmup_steps(1000) == 30
    assert arguments.optim == "adamw_torch" and arguments.bf16 and arguments.gradient_accumulation_steps == 1
    settings = yaml.safe_load((CONFIGS / "paper" / f"{stage}.yaml").read_text(encoding="utf-8"))
    assert settings["deepspeed"] == "deepspeed/zero2"


def test_the_papers_models() -> None:
    first, second, third = (paper(stage) for stage in ("stage1_siglip", "stage2_projector", "stage3_lora"))
    assert (first.encoder, first.text_encoder, first.text_pooling) == ("dcformer_small", "medicalai/ClinicalBERT", "cls")
    assert (first.max_text_length, first.projection_dim, first.loss, first.image_stages) == (512, 768, "siglip", 1)
    assert first.train_text and not first.cache_features and not first.encoder_options
    assert (second.projector, second.projector_depth, second.language_model) == ("mixer", 2, "Qwen/Qwen2.5-7B-Instruct")
    assert (third.lora_rank, third.lora_alpha, third.lora_dropout, third.also_train) == (16, 32, 0.05, [])


def names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def mixer_layer(tokens: tuple[int, int], widths: tuple[int, int]) -> int:
    """Return the parameters of two layer norms, a token MLP and a channel MLP (paper, equations 6 and 7)."""
    return 4 * widths[0] + linear(*tokens) + linear(tokens[1], tokens[1]) + linear(*widths) + linear(widths[1], widths[1])


def test_dcformer_small_has_18_million_parameters() -> None:
    """The published definition has 18.245 M."""
    with torch.device("meta"):
        encoder = build_encoder("dcformer_small")
    assert round(count_parameters(encoder)["trainable"] / 1e6, 3) == 18.245
    assert [depth * height * width for depth, height, width in encoder.grids((128, 256, 256))] == [131072, 16384, 2048, 256, 32]


def test_stage1_at_the_papers_size() -> None:
    arguments = paper("stage1_siglip")
    config = Med3DCLIPConfig(
        arguments.encoder, arguments.encoder_options, (128, 256, 256), arguments.image_stages, DistilBertConfig(**CLINICAL_BERT),
        arguments.text_pooling, arguments.projection_dim, arguments.loss, arguments.logit_scale, arguments.logit_bias,
    )  # fmt: skip
    with torch.device("meta"):
        model = Med3DCLIP(config)
    train_only(model, lambda name: arguments.train_text or not name.startswith("text_encoder."))
    bert_layer = 4 * linear(768, 768) + linear(768, 3072) + linear(3072, 768) + 2 * 2 * 768
    bert = (119547 + 512) * 768 + 2 * 768 + 6 * bert_layer
    assert count_parameters(model.text_encoder)["trainable"] == bert == 134_734_080
    encoder = count_parameters(model.vision_encoder)["trainable"]
    assert count_parameters(model) == {"trainable": encoder + bert + 2 * linear(768, 768) + 2, "frozen": 0}


def test_stages_2_and_3_at_the_papers_size() -> None:
    second, third = paper("stage2_projector"), paper("stage3_lora")
    config = Med3DVLMConfig(
        "dcformer_small", projector=second.projector, projector_depth=second.projector_depth,
        text_config=Qwen2Config(**QWEN_7B), image_token_id=151665,
    )  # fmt: skip
    assert config.num_image_tokens == 256
    with torch.device("meta"):
        model = Med3DVLM(config)
    assert model.projector.num_tokens == 256
    assert count_parameters(model.language_model)["trainable"] == 7_615_616_512  # as Qwen's model card has it: 7.61 B

    train_only(model, lambda name: name.startswith("projector."))
    low = mixer_layer((256, 192), (384, 1792)) + mixer_layer((192, 128), (1792, 3584))
    high = mixer_layer((32, 64), (768, 1792)) + mixer_layer((64, 128), (1792, 3584))
    assert count_parameters(model)["trainable"] == low + high
    assert all(name.startswith("projector.") for name in names(model))

    with torch.device("meta"):
        adapted = stage3_lora.add_lora(model, third)
    head = 3584 // 28
    shapes = [(3584, 3584), (3584, 4 * head), (3584, 4 * head), (3584, 3584), (3584, 18944), (3584, 18944), (18944, 3584)]
    lora = 28 * sum(16 * (inputs + outputs) for inputs, outputs in shapes)
    assert lora == 40_370_176
    trainable = names(adapted)
    lora_names = {name for name in trainable if ".lora_A." in name or ".lora_B." in name}
    assert len(lora_names) == 28 * 7 * 2 and all(".language_model." in name for name in lora_names)
    assert all(".projector.modules_to_save." in name for name in trainable - lora_names)
    assert count_parameters(adapted)["trainable"] == lora + low + high
    assert "lm_head" not in lora_targets(model)


def test_every_setting_has_a_help_text() -> None:
    for kind in ARGUMENTS.values():
        ours = set(kind.__dataclass_fields__) - set(StageArguments.__mro__[1].__dataclass_fields__)
        assert all(kind.__dataclass_fields__[name].metadata.get("help") for name in ours)

"""Wrong input of the stage programs gives one sentence and leaves no files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from med3dvlm import VolumeProcessor
from med3dvlm.files import checksum
from med3dvlm.training import stage0_language_model, stage1_siglip, stage2_projector, stage3_lora
from tests.stages.running import Run, name_of

TWO_STEPS = ("--max-steps", 2, "--learning-rate", 0.01, "--cache-features", "false")


def spoilt(prepared: Path, destination: Path) -> Path:
    """The prepared data with a study that could not be prepared."""
    shutil.copytree(prepared, destination, ignore=shutil.ignore_patterns("features"))
    failure = {"study": "ct_case/9/Axial", "file": "x.nii.gz", "reason": "x.nii.gz is truncated."}
    content = json.dumps(failure) + "\n"
    (destination / "failures.jsonl").write_text(content)
    summary = json.loads((destination / "summary.json").read_text())
    summary["checksums"]["failures.jsonl"] = checksum(content.encode())
    (destination / "summary.json").write_text(json.dumps(summary))
    return destination


THINKING = (  # as Qwen3's: of earlier turns the thinking is left out
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# Language models of which something is wrong: name -> what makes one of a copy of the right one.
WRONG_MODELS: dict[str, Callable[[Path], Any]] = {
    "mute": lambda folder: [path.unlink() for path in folder.glob("token*")],
    "adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "broken": lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500]),
    "thinking": lambda folder: (folder / "chat_template.jinja").write_text(THINKING),
}


@pytest.mark.parametrize(
    ("stage", "flags", "sentence"),
    [
        (stage1_siglip, ("--data", "{tmp}/nothing"), "nothing holds no finished preparation (no summary.json); run: med3dvlm prepare"),
        (stage1_siglip, ("--data", "{spoilt}"), "the first is ct_case/9/Axial: x.nii.gz is truncated; mend the files"),
        (stage2_projector, ("--data", "{spoilt}"), "1 studies of"),
        (stage1_siglip, ("--encoder", "dcformer_tinny"), "known: dcformer_nano"),
        (stage1_siglip, ("--encoder-options", "stem_stride"), "is not valid JSON"),
        (stage1_siglip, ("--encoder-options", '{"stem_strides": 2}'), "stem_strides"),
        (stage1_siglip, ("--encoder-options", '{"stem_stride": 32}'), "32x64x64 voxels is too small"),
        (stage1_siglip, ("--loss", "sigclip"), "known: siglip, clip"),
        (stage1_siglip, ("--text-encoder", "package:no_such_package"), "the package no_such_package is not installed"),
        (stage1_siglip, ("--text-encoder", "{tmp}/nothing"), "nothing is neither a folder here nor a model that the Hugging Face hub"),
        (stage1_siglip, ("--output-dir", "{tmp}/file/out"), "file"),
        (stage2_projector, ("--clip", "{tmp}/empty"), "empty holds no model: config.json and *.safetensors are expected"),
        (stage2_projector, ("--clip", "{tmp}/nothing"), "nothing is not a directory"),
        (stage2_projector, ("--projector", "perceiver"), "known: mlp, low_high_mlp, mixer"),
        (stage2_projector, ("--max-length", 8, "--cache-features", "false"), "raise max_length"),
        (stage2_projector, ("--data", "{other}"), "the model takes volumes of size (32, 64, 64), but"),
        (stage3_lora, ("--data", "{other}"), "was prepared with (32, 64, 96); prepare it anew"),
        (stage3_lora, ("--model", "{tmp}/empty"), "empty holds no model"),
        (stage3_lora, ("--also-train", "vision_encoder"), "would not be trained; pass --cache-features false"),
        (stage3_lora, ("--also-train", "nose"), "also_train names 'nose', which is not a module of the model"),
        (stage3_lora, ("--also-train", "language_model"), "but its layers get LoRA"),
        (stage3_lora, ("--also-train", "low"), "lies in a module that trains as a whole"),
        (stage3_lora, ("--model", ""), "--model is missing; name the output of stage 2"),
        (stage3_lora, ("--lora-rank", 0), "lora_rank is 0 but must be at least 1"),
        (stage3_lora, ("--merged", "{models}/vlm"), "holds a model of another origin, which the one of"),
        (stage2_projector, ("--language-model", "{models}/clip"), "holds a model of type med3d_clip, not a language model"),
        (stage2_projector, ("--language-model", "{models}/text_encoder"), "is a model of type distilbert, which is not a language model"),
        (stage2_projector, ("--language-model", "{tmp}/empty"), "empty holds no language model: config.json is expected"),
        (stage2_projector, ("--language-model", "{tmp}/nothing"), "nothing is neither a folder here nor"),
        (stage2_projector, ("--language-model", "{tmp}/mute"), "holds no tokenizer"),
        (stage2_projector, ("--language-model", "{tmp}/adapter"), "holds an adapter, not a whole language model; merge it first"),
        (stage2_projector, ("--language-model", "{tmp}/broken"), "model.safetensors is damaged or incomplete"),
        (stage2_projector, ("--language-model", "{tmp}/thinking"), "rewrites earlier turns"),
        (stage2_projector, ("--language-model", "{tmp}/thinking"), "or pass --follow-ups 0"),
        (stage2_projector, ("--output-dir", "{models}/vlm"), "holds a model or checkpoints without identity.json"),
        (stage2_projector, ("--report-to", "wandb"), "report_to is 'wandb', which is unknown or not installed here"),
        (stage2_projector, ("--lr-scheduler-type", "cosine_with_min_lr"), "does not go with lr_scheduler_kwargs None"),
        (stage2_projector, ("--eval-strategy", "steps", "--validation-split", "nope"), "no studies of split 'nope'"),
        (stage1_siglip, ("--text-encoder", "{models}/clip"), "holds a model of type med3d_clip, not a text encoder"),
        (stage1_siglip, ("--text-options", '{"n_heads": 3}'), "no text encoder can be made with text_options {'n_heads': 3}"),
        (stage1_siglip, ("--text-options", '{"foo": 3}'), "text_options has foo, which a model of type distilbert does not know"),
        (stage1_siglip, ("--encoder-options", '{"stem_stride": 0}'), "encoder_options: stem_stride is 0 but must be at least 1"),
        (stage1_siglip, ("--image-stages", 9), "image_stages is 9 but must be from 1 to 5, the stages of dcformer_nano"),
        (stage1_siglip, ("--max-text-length", 65), "max_text_length is 65 but the text encoder reads 64 tokens"),
        (stage0_language_model, ("--max-length", 40), "40 tokens do not hold what stands before an answer"),
        (stage0_language_model, ("--heads", 5), "heads must be 1, 3 or even"),
    ],
)
def test_wrong_input(
    stage: ModuleType,
    flags: tuple[object, ...],
    sentence: str,
    run: Callable[..., Run],
    prepared: Path,
    tiny_models: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, change in WRONG_MODELS.items():
        if f"{{tmp}}/{name}" in flags:
            change(Path(shutil.copytree(tiny_models.language_model, tmp_path / name)))
    if "{spoilt}" in flags:
        spoilt(prepared, tmp_path / "spoilt")
    if "{other}" in flags:
        shutil.copytree(prepared, tmp_path / "other", ignore=shutil.ignore_patterns("features"))
        VolumeProcessor("m3d", size=(32, 64, 96)).save_pretrained(tmp_path / "other")
    places = {"{tmp}": tmp_path, "{spoilt}": tmp_path / "spoilt", "{other}": tmp_path / "other", "{models}": tiny_models.vlm.parent}
    for word, place in places.items():
        flags = tuple(str(flag).replace(word, str(place)) for flag in flags)
    with pytest.raises(SystemExit) as stop:
        run(stage, *flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"{name_of(stage)}.py: error: " in said and sentence in said.split("error: ", 1)[1]
    assert not list(tmp_path.glob("run*/*.safetensors"))


def test_a_template_that_rewrites_earlier_turns_is_usable_without_follow_ups(
    run: Callable[..., Run], tiny_models: SimpleNamespace, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_models.language_model, tmp_path / "thinking"))
    WRONG_MODELS["thinking"](model)
    assert run(stage2_projector, "--language-model", model, "--follow-ups", 0, "--max-steps", 1).losses


def test_failed_studies_can_be_excluded(run: Callable[..., Run], prepared: Path, tmp_path: Path) -> None:
    assert run(stage1_siglip, *TWO_STEPS, "--data", spoilt(prepared, tmp_path / "spoilt"), "--exclude-failures", True).losses

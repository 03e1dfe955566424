"""`convert_published` beyond the reference numbers (test_published_layout): shards, wrappers, LoRA, settings, the command."""

import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import med3dvlm.checkpoints.convert.conversion
from med3dvlm import Med3DChat, Med3DVLM
from med3dvlm.checkpoints import convert_published, load_clip, load_encoder, load_vlm
from med3dvlm.checkpoints.convert.weights import Checkpoint, checksum, find_weights, write_safetensors
from med3dvlm.cli import main
from tests import released
from tests.golden_weights import published_weights, volume

# What is written


def test_the_checksum_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    source = released.nano(tmp_path / "released")
    whole = convert_published(source, tmp_path / "whole", size=released.SMALL)
    parts = convert_published(source, tmp_path / "parts", size=released.SMALL, shard_bytes=1_100_000)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert whole.checksum == parts.checksum == checksum(Checkpoint(find_weights(tmp_path / "parts")))
    assert len(files) > 2
    assert max((tmp_path / "parts" / name).stat().st_size for name in files) < 1_200_000
    loaded = load_encoder(tmp_path / "parts").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items())
    changed = convert_published(
        released.nano(tmp_path / "other", **{"encoder.s1.0.scale": torch.zeros(32)}), tmp_path / "changed", size=released.SMALL
    )
    assert changed.checksum != whole.checksum


def test_written_files_are_safetensors_of_every_type(tmp_path: Path) -> None:
    tensors = {
        "a.half": torch.randn(3, 5).half(), "b.flag": torch.tensor([True]), "c.scalar": torch.tensor(3), "d.brain": torch.randn(7).bfloat16(),
        "e.empty": torch.empty(4, 0, 2), "f.double": torch.randn(1, 2, dtype=torch.float64), "g.view": torch.randn(4, 6).T,
    }  # fmt: skip
    stored = {name: med3dvlm.checkpoints.convert.weights.Stored(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    digest = write_safetensors(tmp_path, stored, tensors.__getitem__)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    assert checksum(Checkpoint([tmp_path / "model.safetensors"])) == digest


def test_a_size_that_no_table_lists_goes_into_the_options(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in published_weights("dcformer_nano").items() if not name.startswith("encoder.s4.")}
    convert_published(released.write_pickle(tmp_path / "pretrained_ViT.bin", weights), tmp_path / "ours", size=released.SMALL)
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert settings["encoder_options"]["blocks"] == [1, 1, 1]
    assert load_encoder(tmp_path / "ours").widths == (32, 32, 64, 128)


def test_weights_wrapped_for_several_processes(tmp_path: Path) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in published_weights("dcformer_nano").items()}
    done = convert_published(
        released.write_pickle(tmp_path / "a.pth", {"state_dict": wrapped}), tmp_path / "ours", size=released.SMALL, verify=True
    )
    assert done.checksum == convert_published(released.nano(tmp_path / "bare"), tmp_path / "same", size=released.SMALL).checksum


@pytest.mark.parametrize("whole", [False, True])
def test_m3d_clip_equals_monai(whole: bool, tmp_path: Path) -> None:
    """An encoder of two blocks, alone and within a CLIP, equals MONAI's ViT with the same weights."""
    from monai.networks.nets.vit import ViT

    reference = ViT(1, (8, 32, 48), (4, 16, 16), 768, 3072, 2, 12, proj_type="perceptron", classification=True, post_activation=None)
    names = re.compile(r"cls_token|patch_embedding\..*|norm\..*|blocks\.\d\.(norm[12]|mlp\.linear[12]|attn\.(qkv|out_proj))\..*")
    weights = {name: torch.randn_like(tensor) * 0.05 for name, tensor in reference.state_dict().items() if names.fullmatch(name)}
    reference.load_state_dict(weights, strict=False)
    prefix = "vision_encoder." if whole else ""
    beside = {"language_encoder.pooler.dense.bias": torch.ones(3), "logit_scale": torch.ones(())} if whole else {}
    file = released.write_pickle(tmp_path / "pytorch_model.bin", {prefix + name: tensor for name, tensor in weights.items()} | beside)
    done = convert_published(file, tmp_path / "ours", size=(8, 32, 48), verify=True)
    assert done.left_out == tuple(beside)
    scan = torch.rand(1, 1, 8, 32, 48)
    with torch.no_grad():
        hidden = reference.cls_token.expand(1, -1, -1), reference.patch_embedding(scan)
        x = torch.cat(hidden, dim=1)
        for block in reference.blocks:
            x = block(x)
        torch.testing.assert_close(load_encoder(tmp_path / "ours")(scan)[-1], reference.norm(x)[:, 1:], rtol=1e-4, atol=1e-4)


# The language model's side


def test_the_converted_vlm_answers_and_keeps_how_it_generates(tmp_path: Path) -> None:
    source = released.vlm(tmp_path / "released", rope_theta=1000000.0)
    GenerationConfig(eos_token_id=[2, 7], do_sample=True, top_p=0.8).save_pretrained(source)
    convert_published(source, tmp_path / "ours")
    model, processor = load_vlm(tmp_path / "ours")
    assert model.language_model.generation_config.eos_token_id == [2, 7]
    assert model.config.text_config.rope_parameters["rope_theta"] == 1000000.0
    assert (processor.image_processor.recipe, processor.image_processor.resize) == ("m3d", "trilinear")
    answer = Med3DChat.from_pretrained(tmp_path / "ours", device="cpu").ask(volume("volume-full")[0], "Which plane?", max_new_tokens=3)
    assert answer.tokens > 0


def test_saving_keeps_the_language_models_generation_settings(tiny_models: Any, tmp_path: Path) -> None:
    model, _ = load_vlm(tiny_models.vlm)
    model.language_model.generation_config.eos_token_id = [1, 5]
    model.save_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == [1, 5]
    assert Med3DVLM.from_pretrained(tmp_path).language_model.generation_config.eos_token_id == [1, 5]


def test_stored_type_is_kept(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in released.vlm_weights().items()}
    source = released.write_shards(released.vlm_settings(tmp_path / "released"), weights)
    convert_published(source, tmp_path / "ours", verify=True)
    model, _ = load_vlm(tmp_path / "ours")
    assert model.language_model.dtype == torch.bfloat16
    assert torch.equal(model.language_model.lm_head.weight, weights["lm_head.weight"])


def lora_files(folder: Path) -> tuple[Path, Path, dict[str, Tensor]]:
    """Returns model_with_lora.bin as training writes it, the adapter, and the language model as PEFT merges it (r 4, alpha 12)."""
    from peft import LoraConfig, get_peft_model

    weights = released.vlm_weights()
    settings = json.loads((released.GOLDEN / "vlm_tiny_config.json").read_text())
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **settings))
    language.load_state_dict({name: weights[name] for name in language.state_dict()})
    adapted = get_peft_model(language, LoraConfig(r=4, lora_alpha=12, target_modules=r".*_proj", init_lora_weights=False))
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    vision = {f"base_model.model.{name}": weights[name] for name in weights if ".vision_tower." in name or ".mm_projector." in name}
    complete = released.write_pickle(folder / "complete" / "model_with_lora.bin", state | vision)
    adapter = {name.replace(".default", ""): tensor for name, tensor in state.items() if ".lora_" in name}
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12}))
    return complete, folder / "adapter", {name: tensor.clone() for name, tensor in adapted.merge_and_unload().state_dict().items()}


def test_lora_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    complete, adapter, merged = lora_files(tmp_path)
    base = released.vlm(tmp_path / "base")
    released.refused("no tokenizer", complete, tmp_path / "ours")
    one = convert_published(complete, tmp_path / "one", base=released.vlm_settings(tmp_path / "settings"), lora_alpha=12, verify=True)
    two = convert_published(adapter, tmp_path / "two", base=base, verify=True)
    assert one.merged == two.merged == 14  # seven matrices in each of two layers
    assert one.checksum == two.checksum
    ours = load_vlm(tmp_path / "one")[0].language_model.state_dict()
    plain = released.vlm_weights()
    for name, expected in merged.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(ours[name], plain[name]) == ("_proj.weight" not in name)
    default = convert_published(complete, tmp_path / "three", base=base)  # alpha 32
    assert default.checksum != one.checksum


def test_lora_that_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    _, adapter, _ = lora_files(tmp_path)
    released.refused("holds LoRA for model.layers.0.* give the base model by --base", adapter, tmp_path / "ours")
    factors = load_file(adapter / "adapter_model.safetensors")
    half = {name: tensor for name, tensor in factors.items() if "lora_B" not in name}
    save_file(half, adapter / "adapter_model.safetensors")
    released.refused("only one of its two factors", adapter, tmp_path / "ours", base=released.vlm(tmp_path / "base"))
    (adapter / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    released.refused("another kind", adapter, tmp_path / "ours", base=tmp_path / "base")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    released.refused("id 510, the tokenizer", released.vlm(tmp_path / "released", img_token_id=510), tmp_path / "ours")
    released.vlm(tmp_path / "without")
    for file in (tmp_path / "without").glob("token*"):
        file.unlink()
    released.refused("no tokenizer in .* by --base", tmp_path / "without", tmp_path / "ours")
    texts = released.text_encoder(tmp_path / "words", "clip_text_config.json")
    released.refused("--text-encoder is for an image-text model, but this is", tmp_path / "without", tmp_path / "ours", text_encoder=texts)
    released.refused("no config.json", released.write_pickle(tmp_path / "alone" / "all.bin", released.vlm_weights()), tmp_path / "ours",
            base=text_only(tmp_path / "text"))  # fmt: skip
    released.refused("model type 'llava-x'; known are vlm_qwen", released.vlm(tmp_path / "llava", model_type="llava-x"), tmp_path / "ours")


def text_only(folder: Path) -> Path:
    released.vlm_tokenizer().save_pretrained(folder)
    return folder


def test_a_clip_needs_to_know_its_text_encoder(tmp_path: Path) -> None:
    source = released.clip(tmp_path / "released")
    released.refused("no tokenizer in .* by --text-encoder, as medicalai/ClinicalBERT", source, tmp_path / "ours")
    released.tiny_parts.tokenizer().save_pretrained(source)
    unknown = "1000 words of width 128, which is not known"
    released.refused(unknown, source, tmp_path / "ours")
    texts = released.text_encoder(tmp_path / "text", "clip_text_config.json")
    settings = json.loads((texts / "config.json").read_text())
    (texts / "config.json").write_text(json.dumps(settings | {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    released.refused(unknown, source, tmp_path / "ours", text_encoder=texts)  # whose code is not run


def test_a_tokenizer_with_custom_code_is_read_without_running_it(tmp_path: Path) -> None:
    texts = tmp_path / "text"
    texts.mkdir()
    (texts / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lung", "clear"]))
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "do_lower_case": True}
    (texts / "tokenizer_config.json").write_text(json.dumps(settings))
    (texts / "own.py").write_text("raise SystemExit('run')")
    assert med3dvlm.checkpoints.convert.conversion._tokenizer(texts)("Lung clear")["input_ids"] == [2, 5, 6, 3]


# The commands, and loading


def test_the_command_converts_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = released.nano(tmp_path / "released")
    assert main(["convert", str(source), str(tmp_path / "new" / "ours"), "--size", "32,64,64", "--verify"]) == 0
    said = capsys.readouterr().out
    checked = convert_published(source, tmp_path / "again", size=released.SMALL).checksum
    assert f"holds DCFormer (pretrained_ViT.bin): 192 tensors, sha256 {checked}" in said
    assert "equals the source bit for bit" in said
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ours"]
    assert main(["convert", str(tmp_path / "missing"), str(tmp_path / "b")]) == 2
    assert "nor the id of a model" in capsys.readouterr().err


def test_nothing_is_left_when_the_disk_is_full(tmp_path: Path) -> None:
    source = released.nano(tmp_path / "released")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        released.refused("File too large", source, tmp_path / "ours", size=released.SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_models_of_another_type_are_told_apart(tiny_models: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of type med3dvlm, not med3d_clip; load it with load_vlm"):
        load_clip(tiny_models.vlm)
    with pytest.raises(ValueError, match=r"of type med3d_clip, not med3dvlm; load it with load_clip"):
        load_vlm(tiny_models.clip)
    with pytest.raises(ValueError, match=r"of type vlm_qwen, not med3dvlm; convert it first with `med3dvlm convert`"):
        load_vlm(released.vlm(tmp_path / "released"))
    convert_published(released.nano(tmp_path / "file"), tmp_path / "encoder", size=released.SMALL)
    with pytest.raises(ValueError, match=r"not med3d_clip; load it with load_encoder"):
        load_clip(tmp_path / "encoder")


def test_the_encoder_of_any_model_loads(tiny_models: Any) -> None:
    for path, model in ((tiny_models.clip, load_clip(tiny_models.clip)[0]), (tiny_models.vlm, load_vlm(tiny_models.vlm)[0])):
        expected = model.vision_encoder.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_encoder(path).state_dict().items())


def test_files_of_the_result_open_elsewhere(tmp_path: Path) -> None:
    convert_published(released.nano(tmp_path / "released"), tmp_path / "ours", size=released.SMALL)
    with safe_open(tmp_path / "ours" / "model.safetensors", framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert len(list(opened.keys())) == 192

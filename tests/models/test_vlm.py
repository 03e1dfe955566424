"""Med3DVLM: insertion of the image, outputs, gradients, LoRA layers, and language models of several families."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DistilBertConfig

from med3dvlm import Med3DCLIP, Med3DCLIPConfig, Med3DVLM, Med3DVLMConfig
from med3dvlm.models.vlm_processor import IGNORED
from med3dvlm.training.run import lora_targets, train_only
from tests.tiny_parts import FAMILIES, language_model

SIZE = (40, 56, 72)
ENCODER = {"widths": [4, 4, 8, 8, 16], "layer_scale": 0.5}
IMAGE_TOKEN = 400  # beyond the language model's vocabulary


def build(
    family: str = "qwen2",
    size: tuple[int, int, int] = SIZE,
    projector: str = "mixer",
    levels: Sequence[int] = (-2, -1),
    position_embedding: bool = False,
    **settings: Any,
) -> Med3DVLM:
    text_model = language_model(family, **settings)
    image = {"projector": projector, "image_levels": levels, "position_embedding": position_embedding}
    config = Med3DVLMConfig("dcformer_nano", ENCODER, size, text_config=text_model.config, image_token_id=IMAGE_TOKEN, **image)
    model = Med3DVLM(config, language_model=text_model)
    with torch.no_grad():
        for name, parameter in model.projector.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(3)  # so that answers depend on the image
    return model.eval()


def batch_of(model: Med3DVLM, lengths: tuple[int, ...] = (9, 4), before: int = 3, answer: int = 3) -> dict[str, torch.Tensor]:
    """Return rows of random tokens with image tokens after the first few, padded on the right; the last tokens are labelled."""
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


def test_image_features_replace_the_placeholders(model: Med3DVLM) -> None:
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
def test_every_family_gives_a_loss_and_names_of_its_linear_layers(family: str) -> None:
    model = build(family).train()
    model(**batch_of(model)).loss.backward()
    lora = get_peft_model(model, LoraConfig(target_modules=lora_targets(model)))
    adapted = {name.split(".lora_A")[0] for name, _ in lora.named_parameters() if ".lora_A" in name}
    linear = {name for name, module in model.language_model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == len(linear) > 0
    assert not any("vision_encoder" in name or "projector" in name or "head" in name or "embed_out" in name for name in adapted)
    every = [name for name, module in build(family).language_model.get_decoder().named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(every) == len(adapted)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_given_language_model_keeps_its_attention(attention: str) -> None:
    text_model = language_model("llama")
    text_model.set_attn_implementation(attention)
    config = Med3DVLMConfig("dcformer_nano", ENCODER, (24, 40, 32), text_config=text_model.config, image_token_id=IMAGE_TOKEN)
    assert Med3DVLM(config, language_model=text_model).language_model.config._attn_implementation == attention


def test_the_parts_of_stage_1_are_unchanged() -> None:
    text_config = DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    clip = Med3DCLIP(Med3DCLIPConfig("dcformer_nano", ENCODER, (24, 40, 32), text_config=text_config, projection_dim=8))
    text_model = language_model("llama")
    model = Med3DVLM.from_parts(clip, text_model, IMAGE_TOKEN, projector="low_high_mlp")
    assert model.vision_encoder is clip.vision_encoder and model.language_model is text_model
    assert (model.config.size, model.config.encoder_options, model.config.projector) == ((24, 40, 32), ENCODER, "low_high_mlp")
    assert model.config.text_config.model_type == "llama"


def test_batch_norm_of_a_frozen_encoder_does_not_change() -> None:
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


def test_batch_norm_of_a_training_encoder_follows_its_batches() -> None:
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


@pytest.mark.parametrize("levels", [(-2, -1), (-3, -2), (-4, -1)])
def test_any_two_levels_of_the_encoder_become_tokens(levels: tuple[int, int], tmp_path: Path) -> None:
    model = build(projector="low_high_mlp", levels=levels, position_embedding=True)
    outputs = model.vision_encoder(torch.zeros(1, 1, *SIZE))
    assert model.config.num_image_tokens == outputs[levels[0]].shape[1] + outputs[levels[1]].shape[1]
    low, high = model.encode_image(torch.zeros(1, 1, *SIZE))
    torch.testing.assert_close(low, outputs[levels[0]])
    torch.testing.assert_close(high, outputs[levels[1]])
    model.save_pretrained(tmp_path)
    again = Med3DVLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again.projector(low, high), model.projector(low, high))


@pytest.mark.parametrize("levels", [(-1, -2), (-1,), (0, 1), (-9, -1)])
def test_missing_levels_of_the_encoder_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="image_levels is"):
        build(levels=levels)

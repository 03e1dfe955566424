"""The released layouts: our models with the released names' weights give the released code's numbers (tests/golden)."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from med3dvlm import Med3DCLIP, Med3DCLIPConfig, Med3DVLM, Med3DVLMConfig
from med3dvlm.encoders import build_encoder
from med3dvlm.projectors import build_projector
from med3dvlm.published import from_published, load_published
from tests.golden_weights import GOLDEN, difference, generator, golden, manifest, published_weights, volume

TOLERANCE = 1e-4  # of the reference's spread; the worst measured is 3.3e-6 (projector_mixer)
LOGITS_TOLERANCE = 5e-4  # through all of the model; 2.1e-4 measured
NO_ACTIVATION = {"stem_activation": False}
IMAGE_TOKEN = 511


def encoder_with_published_weights(name: str) -> torch.nn.Module:
    encoder = build_encoder(name, **NO_ACTIVATION)
    load_published(encoder, published_weights(name), "encoder")
    return encoder.eval()


@pytest.mark.parametrize("name", ["dcformer_nano", "dcformer_naive", "dcformer_tiny", "dcformer_small"])
def test_encoder_gives_the_released_numbers_at_every_stage(name: str) -> None:
    with torch.no_grad():
        stages = encoder_with_published_weights(name)(volume("volume-small"))
    assert len(stages) == 5
    for number, tokens in enumerate(stages):
        assert tokens.shape == tuple(golden()[f"{name}/stage{number}/shape"])
        assert difference(tokens, golden()[f"{name}/stage{number}/every97"], 97) < TOLERANCE


@pytest.mark.parametrize("name", ["dcformer_naive", "dcformer_small"])
def test_encoder_gives_the_released_numbers_at_full_size(name: str) -> None:
    with torch.no_grad():
        stages = encoder_with_published_weights(name)(volume("volume-full"))
    for number, tokens in enumerate(stages):
        assert tokens.shape == tuple(golden()[f"{name}/full/stage{number}/shape"])
        assert difference(tokens, golden()[f"{name}/full/stage{number}/every997"], 997) < TOLERANCE


def test_the_comparison_notices_swapped_axes_and_an_activation() -> None:
    encoder = encoder_with_published_weights("dcformer_nano")
    activated = build_encoder("dcformer_nano", stem_activation=True).eval()
    activated.stem[0].load_state_dict(encoder.stem[0].state_dict())
    activated.stem[2].load_state_dict(encoder.stem[1].state_dict())
    activated.stem[4].load_state_dict(encoder.stem[2].state_dict())
    activated.stem[6].load_state_dict(encoder.stem[3].state_dict())
    reference = golden()["dcformer_nano/stage0/every97"]
    with torch.no_grad():
        assert difference(encoder(volume("volume-small").transpose(3, 4))[0], reference, 97) > 0.1
        assert difference(activated(volume("volume-small"))[0], reference, 97) > 0.1


@pytest.mark.parametrize("name", ["mixer", "mlp", "low_high_mlp"])
def test_projector_gives_the_released_numbers(name: str) -> None:
    projector = build_projector(name, (256, 32), (384, 768), 256)
    load_published(projector, published_weights(f"projector_{name}"), "projector")
    low = torch.from_numpy(generator("low").standard_normal((2, 256, 384), dtype=np.float32))
    high = torch.from_numpy(generator("high").standard_normal((2, 32, 768), dtype=np.float32))
    with torch.no_grad():
        tokens = projector(low, high)
    assert tokens.shape == tuple(golden()[f"projector_{name}/shape"])
    assert difference(tokens, golden()[f"projector_{name}/every97"], 97) < TOLERANCE


def test_clip_gives_the_released_embeddings_and_loss() -> None:
    text_config = json.loads((GOLDEN / "clip_text_config.json").read_text(encoding="utf-8"))["distilbert"]
    config = Med3DCLIPConfig(encoder="dcformer_small", encoder_options=NO_ACTIVATION, size=(32, 64, 64), text_config=text_config)
    model = Med3DCLIP(config).eval()
    load_published(model, published_weights("clip_siglip_tiny_text"), "clip")
    ids, mask = (torch.from_numpy(golden()[f"clip/{name}"]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        output = model(volume("volume-small"), ids, mask)
    assert difference(output.image_embeds, golden()["clip/image_embeds"]) < TOLERANCE
    assert difference(output.text_embeds, golden()["clip/text_embeds"]) < TOLERANCE
    assert output.loss.item() == pytest.approx(golden()["clip/siglip_loss"], rel=TOLERANCE)


@pytest.fixture(scope="module")
def published_vlm() -> Med3DVLM:
    text_config = json.loads((GOLDEN / "vlm_tiny_config.json").read_text(encoding="utf-8"))
    config = Med3DVLMConfig(
        encoder="dcformer_small",
        encoder_options=NO_ACTIVATION,
        text_config=AutoConfig.for_model("qwen2", **text_config),
        image_token_id=IMAGE_TOKEN,
        image_splice="published",
    )
    model = Med3DVLM(config).eval()
    load_published(model, published_weights("vlm_tiny_qwen2"), "vlm")
    return model


@pytest.fixture(scope="module")
def image_features(published_vlm: Med3DVLM) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return published_vlm.encode_image(volume("volume-full"))


def test_vlm_gives_the_released_logits_and_words(published_vlm: Med3DVLM, image_features: tuple[torch.Tensor, torch.Tensor]) -> None:
    ids = torch.from_numpy(golden()["vlm/input_ids"])
    with torch.no_grad():
        logits = published_vlm(ids, image_features=image_features).logits
    assert difference(logits[0, -8:], golden()["vlm/logits_last8"]) < LOGITS_TOLERANCE
    assert difference(logits, golden()["vlm/logits_every997"], 997) < LOGITS_TOLERANCE
    words = published_vlm.generate(
        ids, image_features=image_features, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert words.tolist() == golden()["vlm/greedy12"].tolist()


def test_published_splice_is_one_late_in_a_padded_batch_too(
    published_vlm: Med3DVLM, image_features: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ids = torch.from_numpy(golden()["vlm/input_ids"])
    padded = torch.nn.functional.pad(ids, (5, 0))
    with torch.no_grad():
        alone = published_vlm.embed(ids, image_features)
        behind_padding = published_vlm.embed(padded, image_features)
    assert torch.equal(behind_padding[:, 5:], alone)
    table = published_vlm.get_input_embeddings().weight
    assert torch.equal(alone[0, 0], table[IMAGE_TOKEN])  # the first placeholder keeps its embedding
    assert torch.equal(alone[0, 257:], table[ids[0, 257:]])  # the word at 256 is lost, the others stand


def test_published_splice_needs_text_behind_the_image(published_vlm: Med3DVLM, image_features: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="needs text after the image"):
        published_vlm.embed(torch.full((1, 256), IMAGE_TOKEN), image_features)


def test_mask_splice_differs_from_the_published(published_vlm: Med3DVLM, image_features: tuple[torch.Tensor, torch.Tensor]) -> None:
    ids = torch.from_numpy(golden()["vlm/input_ids"])
    published_vlm.config.image_splice = "mask"
    try:
        with torch.no_grad():
            logits = published_vlm(ids, image_features=image_features).logits
    finally:
        published_vlm.config.image_splice = "published"
    assert difference(logits[0, -8:], golden()["vlm/logits_last8"]) > 0.01


def test_every_tensor_of_the_released_7b_model_has_its_place() -> None:
    text_config = AutoConfig.for_model(
        "qwen2",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    )
    config = Med3DVLMConfig(encoder_options=NO_ACTIVATION, text_config=text_config, image_splice="published")
    with torch.device("meta"):
        model = Med3DVLM(config)
        released = {name: torch.empty(shape) for name, shape in manifest()["vlm_qwen2.5_7b"].items()}
    ours = from_published(released, "vlm")
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert config.num_image_tokens == 256


def test_weights_that_do_not_fit_are_named() -> None:
    encoder = build_encoder("dcformer_nano", **NO_ACTIVATION)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    weights = published_weights("dcformer_nano")
    del weights["encoder.s1.0.scale"]
    weights["encoder.s4.1.scale"] = torch.ones(256)
    weights["encoder.s2.0.scale"] = torch.ones(65)
    with pytest.raises(ValueError, match=r"lack stages\.0\.1\.scale; they have besides stages\.3\.2\.scale; .* \(65,\) instead of \(64,\)"):
        load_published(encoder, weights, "encoder")
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    with pytest.raises(ValueError, match="has no vq.codebook"):
        from_published({"vq.codebook": torch.ones(1)}, "encoder")
    with pytest.raises(ValueError, match="'clap' is unknown; known: encoder, projector, clip, vlm"):
        from_published({}, "clap")

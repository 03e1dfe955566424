"""The released layouts: files with the released names, converted and loaded, give the released code's numbers (tests/golden)."""

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from med3dvlm import Med3DVLM, Med3DVLMConfig, VolumeProcessor
from med3dvlm.checkpoints import convert_published, load_clip, load_encoder, load_projector, load_vlm
from med3dvlm.checkpoints.convert.architecture import architecture
from med3dvlm.checkpoints.convert.names import LAYOUTS, Layout, recognise, reshaped, to_ours, to_published
from med3dvlm.encoders import Encoder, build_encoder
from tests import released
from tests.golden_weights import difference, generator, golden, manifest, published_weights, volume

TOLERANCE = 1e-4  # of the reference's spread; the worst measured is 3.3e-6 (projector_mixer)
LOGITS_TOLERANCE = 5e-4  # through all of the model; 2.1e-4 measured
SMALL = (32, 64, 64)
CT_VOLUME = (40, 80, 80)
LAYOUT_OF = {  # reference model -> how it is recognised
    **{f"dcformer_{name}": "dcformer" for name in ("nano", "naive", "tiny", "small")},
    **{f"projector_{name}": f"projector_{name}" for name in ("mixer", "mlp", "low_high_mlp")},
    "clip_siglip_tiny_text": "clip",
    "vlm_tiny_qwen2": "vlm_mixer",
    "vlm_qwen2.5_7b": "vlm_mixer",
    "ctvit_small": "ctvit",
    "ctvit_ct_clip": "ctvit",
    "ct_clip_small": "ct_clip",
    "dcformer_naive_ct_rate": "dcformer_ct_rate",
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Encoder]:
    """A released encoder by name, converted once."""
    root = tmp_path_factory.mktemp("encoders")

    @cache
    def converted(name: str) -> Encoder:
        file = released.write_pickle(root / name / "pretrained_ViT.bin", published_weights(name))
        assert convert_published(file, root / "ours" / name, size=SMALL, verify=True).left_out == ()
        return load_encoder(root / "ours" / name)

    return converted


@pytest.mark.parametrize("name", LAYOUT_OF)
def test_every_released_name_converts_and_converts_back(name: str) -> None:
    layout = LAYOUTS[recognise(manifest()[name])]
    assert layout is LAYOUTS[LAYOUT_OF[name]]
    for there, shape in manifest()[name].items():
        pair = to_ours(layout, there)
        assert pair is not None, there
        if pair.ours is None:
            continue
        assert to_published(layout, pair.ours) == pair
        ours = reshaped(tuple(shape), pair.axes)
        assert ours is not None
        assert reshaped(ours, pair.axes, backwards=True) == tuple(shape)
        assert reshaped((*shape, 1, 1), pair.axes) is None or not pair.axes


@pytest.mark.parametrize("name", ["dcformer_nano", "dcformer_naive", "dcformer_tiny", "dcformer_small"])
def test_encoder_gives_the_released_numbers_at_every_stage(name: str, encoder: Callable[[str], Encoder]) -> None:
    with torch.no_grad():
        stages = encoder(name)(volume("volume-small"))
    assert len(stages) == 5
    for number, tokens in enumerate(stages):
        assert tokens.shape == tuple(golden()[f"{name}/stage{number}/shape"])
        assert difference(tokens, golden()[f"{name}/stage{number}/every97"], 97) < TOLERANCE


@pytest.mark.parametrize("name", ["dcformer_naive", "dcformer_small"])
def test_encoder_gives_the_released_numbers_at_full_size(name: str, encoder: Callable[[str], Encoder]) -> None:
    with torch.no_grad():
        stages = encoder(name)(volume("volume-full"))
    for number, tokens in enumerate(stages):
        assert tokens.shape == tuple(golden()[f"{name}/full/stage{number}/shape"])
        assert difference(tokens, golden()[f"{name}/full/stage{number}/every997"], 997) < TOLERANCE


def test_the_comparison_notices_swapped_axes_and_an_activation(encoder: Callable[[str], Encoder]) -> None:
    nano = encoder("dcformer_nano")
    activated = build_encoder("dcformer_nano", stem_activation=True).eval()
    for layer in range(4):
        activated.stem[2 * layer].load_state_dict(nano.stem[layer].state_dict())
    reference = golden()["dcformer_nano/stage0/every97"]
    with torch.no_grad():
        assert difference(nano(volume("volume-small").transpose(3, 4))[0], reference, 97) > 0.1
        assert difference(activated(volume("volume-small"))[0], reference, 97) > 0.1


def test_older_dcformer_takes_one_of_its_doubled_norms_and_no_codebook(tmp_path: Path) -> None:
    """The file is as the training script stores it: weights under "model", beside its arguments."""
    weights = published_weights("dcformer_naive_ct_rate")
    file = released.write_pickle(tmp_path / "checkpoint-14.pth", {"model": weights, "epoch": 14, "args": argparse.Namespace(lr=1e-4)})
    done = convert_published(file, tmp_path / "ours", size=SMALL, verify=True)
    assert len(done.left_out) == 183
    assert all(name.startswith("vq.") or ".norm." in name for name in done.left_out)
    assert "-1000..200 HU" in str(done)
    volumes = VolumeProcessor.from_pretrained(tmp_path / "ours")
    assert (volumes.recipe, volumes.size, volumes.hu_range) == ("ct_rate", SMALL, (-1000, 200))
    older = load_encoder(tmp_path / "ours")
    depth, height, width = older.grids(SMALL)[-1]
    with torch.no_grad():
        last = older(volume("volume-small"))[-1].unflatten(1, (depth, height, width)).permute(0, 4, 2, 3, 1)  # (B, C, h, w, d)
    assert last.shape == tuple(golden()["dcformer_naive_ct_rate/shape"])
    assert difference(last, golden()["dcformer_naive_ct_rate/last_stage_bchwd/every7"], 7) < TOLERANCE


def test_ctvit_gives_the_released_tokens_before_and_after_the_codebook(tmp_path: Path) -> None:
    convert_published(
        released.write_pickle(tmp_path / "ctvit.pt", published_weights("ctvit_small")), tmp_path / "ours", size=CT_VOLUME, verify=True
    )
    ctvit = load_encoder(tmp_path / "ours")
    volumes = VolumeProcessor.from_pretrained(tmp_path / "ours")
    assert (volumes.recipe, volumes.size, volumes.hu_range) == ("ct_clip", CT_VOLUME, (-1000, 1000))
    with torch.no_grad():
        tokens, codes = ctvit(2 * volume("volume-ctvit") - 1)  # recipe ct_clip gives -1..1
    assert (1, *ctvit.grids(CT_VOLUME)[0], 64) == tuple(golden()["ctvit_small/shape"])
    assert difference(tokens, golden()["ctvit_small/tokens_before_vq/every17"], 17) < TOLERANCE
    assert difference(codes, golden()["ctvit_small/tokens/every17"], 17) < TOLERANCE


def test_ctvit_has_the_released_size_by_default() -> None:
    layout, shapes = LAYOUTS["ctvit"], {name: tuple(shape) for name, shape in manifest()["ctvit_ct_clip"].items()}
    plan = architecture(layout, _ours(layout, shapes), shapes, {}, None, None)
    with torch.device("meta"):
        found, default = plan.build(), build_encoder("ctvit")
    assert {name: tuple(tensor.shape) for name, tensor in found.state_dict().items()} == _ours(layout, shapes)
    assert [(name, tensor.shape) for name, tensor in found.state_dict().items()] == [
        (name, tensor.shape) for name, tensor in default.state_dict().items()
    ]
    assert plan.size == (240, 480, 480)
    assert default.patch == found.patch


@pytest.mark.parametrize("name", ["mixer", "mlp", "low_high_mlp"])
@pytest.mark.parametrize("prefix", ["", "model.mm_projector."])
def test_projector_gives_the_released_numbers(name: str, prefix: str, tmp_path: Path) -> None:
    """The projector is loaded alone and from mm_projector.bin, which also holds embeddings."""
    weights = {prefix + key: tensor for key, tensor in published_weights(f"projector_{name}").items()}
    beside = {"model.embed_tokens.weight": torch.ones(5, 3)} if prefix else {}
    done = convert_published(released.write_pickle(tmp_path / "mm_projector.bin", weights | beside), tmp_path / "ours", verify=True)
    assert done.left_out == tuple(beside)
    projector = load_projector(tmp_path / "ours")
    low = torch.from_numpy(generator("low").standard_normal((2, 256, 384), dtype=np.float32))
    high = torch.from_numpy(generator("high").standard_normal((2, 32, 768), dtype=np.float32))
    with torch.no_grad():
        tokens = projector(low, high)
    assert tokens.shape == tuple(golden()[f"projector_{name}/shape"])
    assert difference(tokens, golden()[f"projector_{name}/every97"], 97) < TOLERANCE


def test_clip_gives_the_released_embeddings_and_loss(tmp_path: Path) -> None:
    texts = released.text_encoder(tmp_path / "text", "clip_text_config.json")
    convert_published(released.clip(tmp_path / "released"), tmp_path / "ours", text_encoder=texts, verify=True)
    model, processor = load_clip(tmp_path / "ours")
    volumes = processor.image_processor
    assert (volumes.recipe, volumes.size, len(processor.tokenizer) > 0) == ("m3d", SMALL, True)
    ids, mask = (torch.from_numpy(golden()[f"clip/{name}"]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        output = model(volume("volume-small"), ids, mask)
    assert difference(output.image_embeds, golden()["clip/image_embeds"]) < TOLERANCE
    assert difference(output.text_embeds, golden()["clip/text_embeds"]) < TOLERANCE
    assert output.loss.item() == pytest.approx(golden()["clip/siglip_loss"], rel=TOLERANCE)


def test_ct_clip_gives_the_released_embeddings(tmp_path: Path) -> None:
    file = released.write_pickle(tmp_path / "CT-CLIP_v2.pt", published_weights("ct_clip_small"))
    texts = released.text_encoder(tmp_path / "text", "ct_clip_text_config.json")
    convert_published(file, tmp_path / "ours", text_encoder=texts, size=CT_VOLUME, verify=True)
    model, _ = load_clip(tmp_path / "ours")
    assert (model.config.encoder, model.config.loss, model.config.image_pooling) == ("ctvit", "clip", "frames")
    ids, mask = (torch.from_numpy(golden()[f"ct_clip_small/{name}"]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        assert difference(model.encode_image(2 * volume("volume-ctvit") - 1), golden()["ct_clip_small/image"]) < TOLERANCE
        assert difference(model.encode_text(ids, mask), golden()["ct_clip_small/text"]) < TOLERANCE
    assert model.logit_scale.item() == pytest.approx(published_weights("ct_clip_small")["temperature"].item())


@pytest.fixture(scope="module")
def published_vlm(tmp_path_factory: pytest.TempPathFactory) -> Med3DVLM:
    root = tmp_path_factory.mktemp("vlm")
    convert_published(released.vlm(root / "released"), root / "ours", verify=True)
    model, processor = load_vlm(root / "ours")
    assert model.config.image_splice == "published"
    assert (model.config.image_token_id, processor.num_image_tokens) == (released.IMAGE_TOKEN_ID, 256)
    # The released prompt: the image, the question at once behind it, and no turns.
    row = processor.encode([{"role": "user", "content": "Which organ?"}], generate=True)["input_ids"]
    words = processor.tokenizer("Which organ?", add_special_tokens=False)["input_ids"]
    assert row == [released.IMAGE_TOKEN_ID] * 256 + words
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


def test_published_splice_is_shifted_by_one_also_in_a_padded_batch(
    published_vlm: Med3DVLM, image_features: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ids = torch.from_numpy(golden()["vlm/input_ids"])
    padded = torch.nn.functional.pad(ids, (5, 0))
    with torch.no_grad():
        alone = published_vlm.embed(ids, image_features)
        behind_padding = published_vlm.embed(padded, image_features)
    assert torch.equal(behind_padding[:, 5:], alone)
    table = published_vlm.get_input_embeddings().weight
    assert torch.equal(alone[0, 0], table[released.IMAGE_TOKEN_ID])  # the first placeholder keeps its embedding
    assert torch.equal(alone[0, 257:], table[ids[0, 257:]])  # the word at 256 is lost, the others stand


def test_published_splice_needs_text_after_the_image(published_vlm: Med3DVLM, image_features: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="needs text after the image"):
        published_vlm.embed(torch.full((1, 256), released.IMAGE_TOKEN_ID), image_features)


def test_mask_splice_differs_from_the_published_splice(published_vlm: Med3DVLM, image_features: tuple[torch.Tensor, torch.Tensor]) -> None:
    ids = torch.from_numpy(golden()["vlm/input_ids"])
    published_vlm.config.image_splice = "mask"
    try:
        with torch.no_grad():
            logits = published_vlm(ids, image_features=image_features).logits
    finally:
        published_vlm.config.image_splice = "published"
    assert difference(logits[0, -8:], golden()["vlm/logits_last8"]) > 0.01


def test_every_tensor_of_the_released_7b_model_is_converted() -> None:
    """The settings are the published ones, including those of the rotary embedding."""
    layout, shapes = LAYOUTS["vlm_mixer"], {name: tuple(shape) for name, shape in manifest()["vlm_qwen2.5_7b"].items()}
    settings = {
        "model_type": "vlm_qwen", "vocab_size": 151666, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False, "img_token_id": 151665, "input_size": [256, 256, 128], "mm_mlp_depth": 2,
    }  # fmt: skip
    plan = architecture(layout, _ours(layout, shapes), shapes, settings, None, None)
    with torch.device("meta"):
        model = plan.build()
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == _ours(layout, shapes)
    config = plan.config
    assert isinstance(config, Med3DVLMConfig)
    assert (config.num_image_tokens, config.image_token_id, config.image_splice) == (256, 151665, "published")
    expected = AutoConfig.for_model("qwen2", rope_theta=1000000.0)
    assert (config.text_config.rope_parameters, config.text_config.vocab_size) == (expected.rope_parameters, 152064)
    assert config.text_config.rope_parameters["rope_theta"] == 1000000.0
    assert not hasattr(config.text_config, "img_token_id")


def _ours(layout: Layout, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    pairs = {name: to_ours(layout, name) for name in shapes}
    return {pair.ours: reshaped(shapes[name], pair.axes) for name, pair in pairs.items() if pair.ours is not None}

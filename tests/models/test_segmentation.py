"""Med3DSegmenter: logits against the formula, prompts in every form, losses against plain sums, windows, and the way to disk and back."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from med3dvlm.checkpoints import load_clip, load_encoder, load_segmenter
from med3dvlm.models.mask_losses import SEGMENTATION_LOSSES
from med3dvlm.models.segmentation import Med3DSegmenter, Med3DSegmenterConfig, Med3DSegmenterOutput
from tests.models.test_clip import SIZE, VIT, tiny_clip

VOLUMES, PROMPTS = 2, 3


def segmenter(**settings: object) -> Med3DSegmenter:
    torch.manual_seed(0)
    options: dict[str, object] = {"decoder_widths": [8, 4, 8, 8], "embedding_dim": 5, "attention_heads": 2}
    return Med3DSegmenter.from_clip(tiny_clip(), **options | settings).eval()


def batch() -> dict[str, Tensor]:
    mask = torch.ones(VOLUMES, PROMPTS, 7, dtype=torch.long)
    mask[1, 0, 4:] = mask[0, 2, 2:] = 0
    return {
        "pixel_values": torch.rand(VOLUMES, 1, *SIZE),
        "input_ids": torch.randint(0, 30, (VOLUMES, PROMPTS, 7)),
        "attention_mask": mask,
    }


@pytest.mark.parametrize("settings", [{}, {"dual_cross_attention": False}, {"embedding_stride": 2}, {"embedding_stride": 4}])
def test_a_logit_is_the_scaled_product_of_query_and_voxel_embedding(settings: dict[str, object]) -> None:
    model, given = segmenter(**settings), batch()
    with torch.no_grad():
        output = model(**given)
        encoder = model.clip.vision_encoder
        cells, whole = model.head.features(encoder(given["pixel_values"]), encoder.grids(SIZE), given["pixel_values"])
        voxels = model.head.voxel_embeddings(cells, SIZE)
        stride = model.config.embedding_stride
        assert voxels.shape == (VOLUMES, 5, *(-(-length // stride) for length in SIZE))
        assert output.logits.shape == (VOLUMES, PROMPTS, *SIZE)
        assert output.presence.shape == (VOLUMES, PROMPTS)
        for volume in range(VOLUMES):
            for prompt in range(PROMPTS):
                ids, mask = given["input_ids"][volume, prompt], given["attention_mask"][volume, prompt]
                query = model.query(model.clip.pool_text(ids[None], mask[None]))[0]
                scale, bias = model.head.scale.item(), model.head.bias.item()
                logits = scale * sum(query[channel] * voxels[volume, channel] for channel in range(5)) + bias
                if stride == 1:
                    torch.testing.assert_close(output.logits[volume, prompt], logits, rtol=1e-4, atol=1e-4)
                highest = sorted(logits.flatten().tolist())[-8:]
                every = scale * (model.head.embed(cells[volume]).unflatten(-1, (5, -1)) * query[:, None]).sum(dim=-2)  # of cells' parts
                weights = every.amax(dim=-1).exp()  # (d, h, w)
                mean = (cells[volume] * weights[..., None]).sum(dim=(0, 1, 2)) / weights.sum()
                presence = sum(highest) / 8 + scale * float(query @ (whole[volume] + model.head.evidence(mean)))
                assert output.presence[volume, prompt].item() == pytest.approx(presence, abs=1e-4)


def test_prompts_may_come_laid_end_to_end_or_encoded_before() -> None:
    model, given = segmenter(), batch()
    with torch.no_grad():
        expected = model(**given)
        features = model.clip.pool_text(given["input_ids"].flatten(0, 1), given["attention_mask"].flatten(0, 1))
        encoded = model(given["pixel_values"], text_features=features.unflatten(0, (VOLUMES, PROMPTS)))
        torch.testing.assert_close(encoded.logits, expected.logits)
        chosen = torch.tensor([0, 1, 2, 3])  # three prompts of the first volume, one of the second
        ids, mask = (given[name].flatten(0, 1)[chosen] for name in ("input_ids", "attention_mask"))
        fewer = model(given["pixel_values"], ids, mask, counts=torch.tensor([3, 1]))
    torch.testing.assert_close(fewer.logits[0], expected.logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fewer.logits[1, 0], expected.logits[1, 0], rtol=1e-4, atol=1e-4)
    assert fewer.logits[1, 1:].sigmoid().max() == 0
    assert fewer.presence[1, 1:].sigmoid().max() == 0


def test_a_language_models_query_points_like_a_prompt() -> None:
    model, given = segmenter(), batch()
    with torch.no_grad():
        expected = model(**given)
        queries = model.queries(model.clip.pool_text(given["input_ids"].flatten(0, 1), given["attention_mask"].flatten(0, 1)))
        stages = model.clip.vision_encoder(given["pixel_values"])
        found = model.segment_from_queries(stages, queries.unflatten(0, (VOLUMES, PROMPTS)), given["pixel_values"])
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.presence, expected.presence)


@pytest.mark.parametrize("kind", SEGMENTATION_LOSSES)
def test_the_loss_is_the_formula(kind: str) -> None:
    """Dice over prompts that are there; cross entropy (focal: times (1-p)^2; balanced: 0.2 and 5 times the mean within and outside of the mask)
    over all voxels; a tenth of the cross entropy of presence."""
    model = segmenter(segmentation_loss=kind)
    logits, presence = torch.randn(1, 2, 2, 2, 2, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)
    masks = torch.zeros(1, 2, 2, 2, 2, dtype=torch.bool)
    masks[0, 0, 0, 1] = True
    total, probabilities = 0.0, logits.sigmoid()
    for prompt, inside in ((0, 2), (1, 0)):
        for value, wanted in zip(probabilities[0, prompt].flatten().tolist(), masks[0, prompt].flatten().tolist(), strict=True):
            right = value if wanted else 1 - value
            weight = {"dice_ce": 1 / 8, "dice_focal": (1 - right) ** 2 / 8, "dice_balanced_ce": 0.1 if wanted else 5 / (8 - inside)}[kind]
            total -= math.log(right) * weight / 2
    overlap = sum(
        value for value, wanted in zip(probabilities[0, 0].flatten().tolist(), masks[0, 0].flatten().tolist(), strict=True) if wanted
    )
    dice = 1 - 2 * overlap / (float(probabilities[0, 0].sum()) + 2)
    there = -math.log(presence[0, 0].sigmoid()) - math.log(1 - presence[0, 1].sigmoid())
    output = Med3DSegmenterOutput(logits=logits, presence=presence)
    assert model.loss(output, masks).item() == pytest.approx(total + dice + 0.1 * there / 2, rel=1e-5)
    only_first = torch.tensor([[True, False]])
    expected = model.loss(Med3DSegmenterOutput(logits=logits[:, :1], presence=presence[:, :1]), masks[:, :1]).item()
    assert model.loss(output, masks, only_first).item() == pytest.approx(expected)


def test_tokens_learn_whether_their_cells_hold_what_is_asked_for() -> None:
    model, given = segmenter(token_levels=[-5, -4], token_weight=0.5).double(), batch()
    masks = torch.rand(VOLUMES, PROMPTS, *SIZE) > 0.9995  # a few voxels: most cells hold none
    masks[0, 1] = False  # absent
    given["pixel_values"] = given["pixel_values"].double()
    encoder = model.clip.vision_encoder
    whole = model(**given, masks=masks)
    plain = model.loss(whole, masks)
    queries = model.queries(model.clip.pool_text(given["input_ids"].flatten(0, 1), given["attention_mask"].flatten(0, 1)))

    def share(voxel: list[int], level: int) -> tuple[int, ...]:
        """The cell of an even division of the volume."""
        return tuple(at // math.ceil(length / cells) for at, length, cells in zip(voxel, SIZE, encoder.grids(SIZE)[level], strict=True))

    expected = 0.0
    for level in (-5, -4):
        tokens, grid = encoder(given["pixel_values"])[level], encoder.grids(SIZE)[level]
        for volume in range(VOLUMES):
            for prompt in range(PROMPTS):
                query = queries[volume * PROMPTS + prompt]
                losses: dict[bool, list[float]] = {True: [], False: []}
                for cell, place in enumerate(itertools.product(*map(range, grid))):
                    held = any(share(voxel, level) == place for voxel in masks[volume, prompt].nonzero().tolist())
                    logit = query @ model.tokens[str(level)](tokens[volume, cell]) / 5**0.5 + model.token_bias[str(level)](query)
                    losses[held].append(math.log1p(math.exp(-logit.item() if held else logit.item())))
                expected += sum(sum(each) / max(len(each), 1) for each in losses.values()) / (2 * VOLUMES * PROMPTS)
    assert float(whole.loss - plain) == pytest.approx(0.5 * expected, rel=1e-6)
    first = model(**given, masks=masks, decoded=1)
    assert torch.allclose(first.logits, whole.logits[:1])
    assert float(first.loss) == pytest.approx(float(model.loss(first, masks[:1]) + 0.5 * expected), rel=1e-6)


def test_every_part_of_the_decoder_learns() -> None:
    model, given = segmenter(token_levels=[-1]).train(), batch()
    masks = torch.zeros(VOLUMES, PROMPTS, *SIZE, dtype=torch.bool)
    masks[:, 1, 2:5, 3:9, 4:20] = True
    model(**given, masks=masks).loss.backward()
    parts = {"head": model.head, "query": model.query, "tokens": model.tokens, "encoder": model.clip.vision_encoder.stages}
    for part, module in parts.items():
        without = {name for name, parameter in module.named_parameters() if parameter.grad is None or not parameter.grad.any()}
        without = {name for name in without if not name.endswith("key.bias")}  # a shift of keys changes all attention scores alike
        assert not without or part == "encoder" and all(name.endswith("bias") for name in without), without  # batch norm takes them out


def test_a_large_scan_is_seen_in_windows() -> None:
    """Where a scan is one window the answer is the model's; elsewhere a window that was moved sees the same."""
    model, given = segmenter(), batch()
    with torch.no_grad():
        features = model.clip.pool_text(given["input_ids"][0], given["attention_mask"][0])
        expected = model(given["pixel_values"], text_features=features.expand(VOLUMES, -1, -1))
        found = model.sliding_window(given["pixel_values"], features)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.presence, expected.presence, rtol=1e-4, atol=1e-4)
        scan = torch.cat([given["pixel_values"][:1], given["pixel_values"][1:]], dim=3)  # twice as high
        halves = model.sliding_window(scan, features, overlap=0.0)
    assert halves.logits.shape == (1, PROMPTS, SIZE[0], 2 * SIZE[1], SIZE[2])
    torch.testing.assert_close(halves.logits[0, :, :, : SIZE[1]], expected.logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(halves.logits[0, :, :, SIZE[1] :], expected.logits[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(halves.presence[0], expected.presence.amax(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_give_equal_logits(dtype: torch.dtype, tmp_path: Path) -> None:
    model, given = segmenter().to(dtype), batch()
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    with torch.no_grad():
        expected = model(**given)
        for loaded in (Med3DSegmenter.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
            assert isinstance(loaded, Med3DSegmenter)
            assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
            output = loaded.eval()(**given)
            torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)  # memory is aligned otherwise: 1e-6
            torch.testing.assert_close(output.presence, expected.presence, rtol=1e-5, atol=1e-5)
    assert expected.logits.dtype == torch.float32


def test_bfloat16_is_float32_but_for_rounding() -> None:
    """Measured: 0.04 of the spread on average."""
    model, given = segmenter(), batch()
    with torch.no_grad():
        expected = model(**given).logits
        found = model.bfloat16()(**given).logits
    assert (found - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"input_ids": None}, "pass one of the two"),
        ({"counts": torch.tensor([1, 2])}, "add up to that"),
        ({"input_ids": torch.ones(3, 2, 7, dtype=torch.long), "attention_mask": torch.ones(3, 2, 7, dtype=torch.long)}, "for 2 volumes"),
        ({"masks": torch.zeros(2, 3, 4, 4, 4)}, r"masks are \(2, 3, 4, 4, 4\)"),
    ],
)
def test_wrong_arguments_get_a_sentence(change: dict[str, Tensor | None], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), torch.no_grad():
        segmenter()(**batch() | change)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"segmentation_loss": "dice"}, "known: dice_balanced_ce, dice_ce, dice_focal"),
        ({"embedding_stride": 3}, "must divide the stem's stride, 4"),
        ({"decoder_widths": [8, 8]}, "must be 4, one for each output"),
        ({"attention_level": 4}, "there are 4, from 0 to 3"),
    ],
)
def test_wrong_settings_get_a_sentence(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        segmenter(**settings)


def test_encoders_without_stages_of_falling_resolution_are_refused() -> None:
    with pytest.raises(ValueError, match="take a dcformer"):
        Med3DSegmenter(Med3DSegmenterConfig(tiny_clip(encoder="vit3d_naive", **VIT).config))


def test_a_folder_holds_all_that_a_scan_needs(tiny_models: SimpleNamespace, tmp_path: Path) -> None:
    clip, processor = load_clip(tiny_models.clip)
    for part in (Med3DSegmenter.from_clip(clip, embedding_dim=8), processor):
        part.save_pretrained(tmp_path)
    model, processor = load_segmenter(tmp_path)
    assert processor.max_text_length == 64  # of the text encoder
    coded = processor(text=["lung nodule", "pleural effusion"])
    pixels = torch.rand(1, 1, *model.clip.config.size)
    with torch.no_grad():
        output = model(pixels, coded["input_ids"][None], coded["attention_mask"][None])
    assert output.logits.shape == (1, 2, *model.clip.config.size)
    assert load_encoder(tmp_path).widths == clip.vision_encoder.widths
    with pytest.raises(ValueError, match="load it with load_segmenter"):
        load_clip(tmp_path)

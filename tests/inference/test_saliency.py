"""Saliency maps of phrases and answers against their formulas, and their placement in the scan: a bright blob is found again."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel

from med3dvlm import Med3DChat, Med3DCLIP, Med3DCLIPConfig, Volume, VolumeProcessor
from med3dvlm.datasets.store import PreparedData
from med3dvlm.inference.saliency import PhraseSaliency, SaliencyMap, answer_saliency, place, weighted_features
from med3dvlm.prompts import REPORT_PROMPTS
from tests.encoders.small import SMALL

# (recipe, settings): some sizes smaller than the scan's and some larger
PROCESSORS = [
    ("m3d", {"size": (7, 8, 8)}),  # 2 and 3 voxels of the cropped scan to one
    ("m3d", {"size": (40, 36, 44), "resize": "trilinear"}),
    ("hu_window", {"size": (7, 8, 8), "hu_range": (-900.0, 600.0)}),
    ("ct_rate", {"size": (20, 30, 28), "spacing": (1.8, 1.3, 1.0)}),  # cropped along some axes and padded along others
    ("ct_clip", {"size": (40, 60, 50), "spacing": (1.5, 0.75, 0.75)}),
]
ORIENTATIONS = [None, "SPL", "ILA", "PIL", "ASR", "LIP", "RSP"]  # axial, coronal and sagittal, as displayed, flipped and swapped
SHAPE, SPACING = (18, 27, 33), (2.2, 1.1, 0.9)


def scan(orientation: str | None, blob: tuple[int, int, int] | None) -> Volume:
    """Return an off-centre body in air, with a bright corner and a blob of 3 voxels' edge."""
    array = np.full(SHAPE, -1000, np.int16)
    array[3:17, 4:20, 8:32] = 0
    array[3:5, 4:6, 8:10] = 1000
    if blob is not None:
        array[tuple(slice(middle - 1, middle + 2) for middle in blob)] = 1000
    return Volume(array, SPACING, orientation, unit="HU", source="scan")


@pytest.mark.parametrize(("recipe", "settings"), PROCESSORS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_blob_is_found_again(recipe: str, settings: dict[str, object], orientation: str | None) -> None:
    """Its centre in the model's volume, mapped back, is its centre in the scan, to half of the error that a shift by half a voxel causes."""
    processor = VolumeProcessor(recipe, **settings)
    for blob in ((6, 11, 17), (12, 14, 22)):
        volume = scan(orientation, blob)
        weights = (processor.transform(volume) - processor.transform(scan(orientation, None)))[0].numpy().astype(np.float64)
        assert weights.sum() > 0, "the blob must be in the picture"
        middle = [(weights * index).sum() / weights.sum() for index in np.indices(weights.shape)]
        placement = processor.placement(volume)
        found = placement @ [*middle, 1]
        assert np.abs(found[:3] - blob).max() < 0.25


@pytest.mark.parametrize(("recipe", "settings"), PROCESSORS)
@pytest.mark.parametrize("orientation", ["SPL", "ILA", "RSP"])
def test_heat_is_placed_on_the_blob(recipe: str, settings: dict[str, object], orientation: str) -> None:
    """The heat is the mean of each patch, as of an encoder; the overlay is highest within a patch of the blob."""
    processor, blob = VolumeProcessor(recipe, **settings), (7, 12, 18)
    volume = scan(orientation, blob)
    made = (processor.transform(volume) - processor.transform(scan(orientation, None)))[0].numpy()
    patch = (4, 4, 2) if recipe.startswith("ct") else (1, 2, 2)
    grid = tuple(length // edge for length, edge in zip(processor.size, patch, strict=True))
    values = np.zeros(grid, np.float32)
    for cell in itertools.product(*map(range, grid)):
        values[cell] = made[tuple(slice(index * edge, (index + 1) * edge) for index, edge in zip(cell, patch, strict=True))].max()
    cells = np.diag([*map(float, patch), 1.0])
    cells[:3, 3] = [(edge - 1) / 2 for edge in patch]
    overlay = place(SaliencyMap(values, cells, processor.size), volume, processor)
    assert overlay.shape == SHAPE and overlay.dtype == np.float32 and overlay.flags.c_contiguous
    assert overlay.min() == 0 and overlay.max() <= 1
    steps = np.abs(processor.placement(volume)[:3, :3]) @ np.array(patch)  # a cell's edges in voxels of the scan
    highest = np.argwhere(overlay >= overlay.max() - 1e-6)
    assert (np.abs(highest - blob) <= steps / 2 + 1.5).all(axis=1).any()
    coarse = place(SaliencyMap(values, cells, processor.size), volume, processor, step=2)
    np.testing.assert_array_equal(coarse, overlay[::2, ::2, ::2])


def test_placing_by_plain_loops() -> None:
    """Voxel by voxel: trilinear between cell centres, extended at the border, 0 where the scan was cropped."""
    processor = VolumeProcessor("m3d", size=(12, 10, 14))
    volume = scan("ILA", (6, 11, 17))
    generator = np.random.default_rng(0)
    values = generator.random((3, 2, 4)).astype(np.float32)
    cells = np.diag([4.0, 5.0, 3.5, 1.0])
    cells[:3, 3] = (1.5, 2.0, 0.0)
    overlay = place(SaliencyMap(values, cells, (12, 10, 14)), volume, processor)
    shown = np.clip((values - np.median(values)) / (values.max() - np.median(values)), 0, 1)
    inverse = np.linalg.inv(processor.placement(volume))
    outside = 0
    for voxel in generator.integers(0, SHAPE, (300, 3)):
        seen = (inverse @ [*voxel, 1])[:3]
        if (seen < -0.5).any() or (seen > np.array([12, 10, 14]) - 0.5).any():
            outside += 1
            assert overlay[tuple(voxel)] == 0
            continue
        place_in_grid = np.clip((seen - cells[:3, 3]) / np.diag(cells)[:3], 0, np.array(values.shape) - 1)
        expected = 0.0
        for corner in itertools.product((0, 1), repeat=3):
            index = np.minimum(np.floor(place_in_grid).astype(int) + corner, np.array(values.shape) - 1)
            share = np.abs(1 - np.array(corner) - (place_in_grid - np.floor(place_in_grid)))
            expected += share.prod() * shown[tuple(index)]
        assert overlay[tuple(voxel)] == pytest.approx(expected, abs=1e-6)
    assert 0 < outside < 300


def test_even_heat_shows_nothing() -> None:
    processor = VolumeProcessor("m3d", size=(12, 10, 14))
    heat = SaliencyMap(np.full((3, 2, 4), 0.5, np.float32), np.eye(4), (12, 10, 14))
    assert not place(heat, scan("SPL", (6, 11, 17)), processor).any()


def clip_with(family: str, **settings: object) -> tuple[Med3DCLIP, torch.Tensor]:
    """Return a contrastive model in float64 with a small encoder, and a volume."""
    torch.manual_seed(0)
    name, size, options = SMALL[family]
    text_config = DistilBertConfig(vocab_size=30, max_position_embeddings=16, dim=8, hidden_dim=12, n_layers=1, n_heads=2)
    if family in ("dcformer", "poolformer3d"):
        options, size = options | {"stem_stride": 2, "layer_scale": 0.5}, (36, 40, 70)  # 2 x 2 x 3 cells in the end
    config = Med3DCLIPConfig(name, options, size, text_config=text_config, projection_dim=6, **settings)
    model = Med3DCLIP(config, DistilBertModel(text_config)).eval().double().requires_grad_(False)
    return model, torch.rand(1, 1, *size).double()


@pytest.mark.parametrize(
    ("family", "level", "settings"),
    [
        ("dcformer", -1, {}),
        ("dcformer", -2, {"image_stages": 2}),
        ("dcformer", -3, {"image_stages": 2}),
        ("poolformer3d", -2, {}),
        ("vit3d", -1, {}),
        ("ctvit", -1, {"image_pooling": "frames", "projection_bias": False}),
    ],
)
def test_heat_is_the_increase_of_the_score_with_a_cell(family: str, level: int, settings: dict[str, object]) -> None:
    """Central differences move one channel of a cell from its mean and compute everything after it again; decreases are left out."""
    model, volume = clip_with(family, **settings)
    encoder, direction = model.vision_encoder, torch.randn(6).double()
    heat = weighted_features(encoder, volume, level, lambda: (model.encode_image(volume) @ direction).sum())
    outputs = encoder(volume)
    grid = encoder.grids(volume.shape[2:])[level]
    assert heat.values.shape == grid and heat.size == tuple(volume.shape[2:])
    moved = outputs[level] - outputs[level].mean(dim=1, keepdim=True)

    def score(tokens: torch.Tensor) -> float:
        changed = [*outputs]
        changed[len(outputs) + level] = tokens
        if family in ("dcformer", "poolformer3d"):  # the later stages see it too
            for number in range(len(outputs) + level, len(outputs) - 1):
                cells = encoder.grids(volume.shape[2:])[number]
                changed[number + 1] = encoder.stages[number](changed[number].unflatten(1, cells)).flatten(1, 3)
        stages = changed[-model.config.image_stages :]
        if model.config.image_pooling == "frames":
            pooled = stages[0].unflatten(1, (grid[0], -1)).mean(dim=1).flatten(1)
        else:
            pooled = torch.cat([each.mean(dim=1) for each in stages], dim=-1)
        embedded = pooled @ model.image_projection.weight.T + (model.image_projection.bias if model.config.projection_bias else 0)
        return float(embedded[0] / embedded.norm() @ direction)

    flat = heat.values.reshape(-1)
    assert np.abs(flat).max() > 1e-6
    for cell in range(0, len(flat), max(1, len(flat) // 4)):
        rises = 0.0
        for channel in range(moved.shape[2]):
            step = torch.zeros_like(moved)
            step[:, cell, channel] = moved[:, cell, channel] * 1e-4
            rises += max(0.0, (score(outputs[level] + step) - score(outputs[level] - step)) / 2e-4)
        assert flat[cell] == pytest.approx(rises, rel=1e-3, abs=float(1e-4 * flat.max()))


def test_levels_that_an_encoder_lacks_are_refused() -> None:
    model, volume = clip_with("dcformer")
    for level in (0, 2, -6):
        with pytest.raises(ValueError, match="-5 to -1"):
            weighted_features(model.vision_encoder, volume, level, lambda: model.encode_image(volume).sum())
    assert not any(stage._forward_hooks for stage in model.vision_encoder.stages)


def test_a_failed_score_leaves_no_hook() -> None:
    model, volume = clip_with("dcformer")

    def failing() -> torch.Tensor:
        model.encode_image(volume)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        weighted_features(model.vision_encoder, volume, -2, failing)
    assert not any(stage._forward_hooks for stage in model.vision_encoder.stages)


def test_phrases(tiny_models: SimpleNamespace, prepared: object) -> None:
    """Loaded from a directory, a tensor and a batch give equal heat, another phrase other heat, and no parameter gets a gradient."""
    finder = PhraseSaliency.from_pretrained(tiny_models.clip)
    data = PreparedData(prepared)
    pixels = data.processor.dequantize(data.volume(data.studies("test")[0]))
    heat, other = finder.saliency(pixels, "Pleural effusion.", level=-3), finder.saliency(pixels, "Liver mass.", level=-3)
    assert heat.values.shape == finder.model.vision_encoder.grids(data.processor.size)[-3]
    assert not np.allclose(heat.values, other.values)
    again = finder.saliency(pixels, " Pleural effusion. \n", level=-3)
    np.testing.assert_array_equal(heat.values, again.values)
    assert all(parameter.grad is None for parameter in finder.model.parameters())
    with pytest.raises(ValueError, match="phrase is empty"):
        finder.saliency(pixels, "  ")
    with pytest.raises(ValueError, match="med3dvlm, not med3d_clip"):
        PhraseSaliency.from_pretrained(tiny_models.vlm)


def test_answers(tiny_models: SimpleNamespace, prepared: object) -> None:
    """The heat of an answer is the increase of the summed log probabilities of its tokens; that of a part uses the part's tokens."""
    chat = Med3DChat.from_pretrained(tiny_models.vlm, device="cpu", dtype=torch.float32)
    chat.model.double()
    data = PreparedData(prepared)
    pixels = data.processor.dequantize(data.volume(data.studies("test")[0]))
    question, answer = REPORT_PROMPTS[0], "Lung nodule. No ascites."
    history = [{"role": "user", "content": "Which plane?"}, {"role": "assistant", "content": "Axial"}]
    messages = [*history, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    coded = chat.processor.encode(messages)["input_ids"]
    before = len(chat.processor.encode(messages[:-1], generate=True)["input_ids"])
    tokens = coded[before:]
    words = [chat.processor.tokenizer.decode(tokens[:count]) for count in range(len(tokens) + 1)]
    volume = pixels[None].double()
    with torch.no_grad():
        low, high = chat.model.vision_encoder(volume)[-2:]
    grid = chat.model.vision_encoder.grids(data.processor.size)[-1]
    moved = high - high.mean(dim=1, keepdim=True)

    def log_probabilities(features: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = chat.model(torch.tensor([coded]), image_features=(low, features)).logits[0]
        return torch.stack([logits[before + place - 1].log_softmax(-1)[token] for place, token in enumerate(tokens)])

    for part in (None, "No ascites"):
        start = 0 if part is None else answer.index(part)
        end = len(words[-1]) if part is None else start + len(part)
        meant = torch.tensor([len(words[place + 1]) > start and len(words[place]) < end for place in range(len(tokens))])
        heat = answer_saliency(chat, pixels, question, answer, history, part, level=-1)
        assert heat.values.shape == grid
        for cell in range(heat.values.size):
            rises = 0.0
            for channel in range(high.shape[2]):
                step = torch.zeros_like(high)
                step[:, cell, channel] = moved[:, cell, channel] * 1e-3
                rises += max(0.0, float((log_probabilities(high + step) - log_probabilities(high - step))[meant].sum()) / 2e-3)
            assert heat.values.reshape(-1)[cell] == pytest.approx(rises, rel=1e-3, abs=1e-5)
    for wrong, sentence in (
        ((question, " "), "no answer"),
        (("", answer), "no answer"),
        ((question, answer, None, "effusion"), "does not say"),
    ):
        with pytest.raises(ValueError, match=sentence):
            answer_saliency(chat, pixels, *wrong)

"""Augmentation: equal to scipy, within bounds, the same for the same key, without flips by default, and its errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from med3dvlm.datasets.augmentation import Augmentation, resample
from med3dvlm.datasets.conversations import ConversationDataset, ConversationOptions
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import PairDataset

GREY, HU = (0.0, 1.0), (-1.0, 1.0)
STILL = {"rotation": 0, "zoom": 0, "translation": 0, "crop": 0}


def keys(count: int, epoch: int = 0) -> torch.Tensor:
    return torch.tensor([(7, epoch, place) for place in range(count)])


def smooth(shape: tuple[int, ...] = (10, 20, 30), seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).random(shape)
    return ndimage.gaussian_filter(noise, 1.5).astype(np.float32) * 5 % 1


@pytest.mark.parametrize("shape", [(10, 20, 30), (7, 5, 9), (4, 6, 4)])
def test_the_affine_is_scipys(shape: tuple[int, int, int]) -> None:
    """Interpolation is linear, with 0 outside; scipy's origin is the first voxel. The worst difference measured is 1e-6."""
    volume, random = smooth(shape), np.random.default_rng(1)
    middle = (np.array(shape) - 1) / 2
    for _ in range(5):
        matrix, offset = np.eye(3) + random.uniform(-0.3, 0.3, (3, 3)), random.uniform(-2, 2, 3)
        padded = np.pad(volume, 8)  # scipy's grid-constant blends into the border over the same distance as torch
        expected = ndimage.affine_transform(
            padded, matrix, middle + 8 + offset - matrix @ middle, output_shape=shape, order=1, mode="constant"
        )
        found = resample(torch.from_numpy(volume)[None], matrix, offset)[0].numpy()
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("bounds", [GREY, HU])
@pytest.mark.parametrize("setting", ["default", "intensity", {"noise": 0.5, "shift": 0.5, "scale": 0.9, "share": 1}])
def test_values_stay_within_the_range_of_the_recipe(setting: str | dict, bounds: tuple[float, float]) -> None:
    low, high = bounds
    volumes = torch.from_numpy(smooth())[None, None].repeat(6, 1, 1, 1, 1) * (high - low) + low
    before = volumes.clone()
    changed = Augmentation.read(setting)(volumes, keys(6), bounds)
    assert changed.shape == volumes.shape and changed.dtype == torch.float32
    assert changed.min() >= low and changed.max() <= high and not torch.equal(changed, before)
    assert torch.equal(volumes, before)  # the batch itself is left alone


def test_outside_of_the_scan_is_air() -> None:
    """A translated scan that is bone to its edges holds bone, air and blends of the two."""
    moved = Augmentation(share=1, scale=0, shift=0, gamma=0, noise=0, zoom=0, crop=0, rotation=0, translation=0.3)
    changed = moved(torch.full((8, 1, 9, 21, 30), 0.75), keys(8), HU)
    assert changed.min() == -1 and changed.max() == pytest.approx(0.75, abs=1e-6)
    assert (changed == -1).float().mean() > 0.1 and ((changed > -1) & (changed < 0.74)).float().mean() < 0.19  # a layer an axis


def test_changes_follow_from_the_key_alone() -> None:
    volumes = torch.from_numpy(np.stack([smooth(seed=seed) for seed in range(4)]))[:, None]
    augment = Augmentation(share=1)
    whole = augment(volumes, keys(4), GREY)
    torch.manual_seed(99)
    torch.rand(3)  # other random numbers in between
    for place in (3, 1):  # in another order and batch
        assert torch.equal(augment(volumes[[place]], keys(4)[[place]], GREY)[0], whole[place])
    assert not torch.equal(augment(volumes, keys(4, epoch=1), GREY), whole)
    same = augment(volumes[[0, 0]], keys(2), GREY)
    assert not torch.equal(same[0], same[1])


def test_unaugmented_volumes_are_unchanged() -> None:
    volumes = torch.from_numpy(smooth())[None, None].repeat(400, 1, 1, 1, 1)[..., :6] * 2 - 1
    changed = Augmentation(share=0.3)(volumes, keys(400), HU)
    untouched = (changed == volumes).flatten(1).all(1).float().mean()
    assert 0.40 < untouched < 0.58  # 0.7 squared is 0.49
    assert torch.equal(Augmentation(share=0)(volumes, keys(400), HU), volumes)
    assert torch.equal(Augmentation(1, 0, 0, 0, 0, 0, 0, 0, 0)(volumes[:9], keys(9), GREY), volumes[:9].clamp(0, 1))


def test_default_augmentation_never_mirrors() -> None:
    """A bright corner stays in its octant over 200 draws of the default."""
    volume = torch.zeros(1, 1, 12, 24, 24)
    volume[..., 2:4, 4:8, 3:8] = 1
    changed = Augmentation(share=1)(volume.repeat(200, 1, 1, 1, 1), keys(200), GREY)
    for axis, length in ((2, 12), (3, 24), (4, 24)):
        weight = changed.clone().sub_(0.3).clamp_min_(0).sum(dim=tuple({1, 2, 3, 4} - {axis}))  # (200, length)
        centre = (weight * torch.arange(length)).sum(1) / weight.sum(1)
        assert centre.max() < (length - 1) / 2


def test_flips_are_made_where_requested() -> None:
    mirrored = Augmentation(share=0, flips=("width",))
    volumes = torch.from_numpy(smooth())[None, None].repeat(40, 1, 1, 1, 1)
    changed = mirrored(volumes, keys(40), GREY)
    flipped = sum(torch.equal(one, two.flip(-1)) for one, two in zip(changed, volumes, strict=True))
    kept = sum(torch.equal(one, two) for one, two in zip(changed, volumes, strict=True))
    assert flipped + kept == 40 and 10 < flipped < 30


def test_flips_are_refused_where_texts_name_sides(prepared: Path) -> None:
    data, mirrored = PreparedData(prepared), Augmentation(flips=("width",))
    for kind in (
        lambda: PairDataset(data, "train", 0, mirrored),
        lambda: ConversationDataset(data, "train", ConversationOptions(), augmentation=mirrored),
    ):
        with pytest.raises(ValueError, match=r"flips along width would make \d+ texts .* wrong, as they speak of sides .*leave flips out"):
            kind()
    mirrored.check(["A normal scan.", "Brightly copyrighted."])  # whole words only
    with pytest.raises(ValueError, match="the first says 'Left'"):
        mirrored.check(["Left kidney.", "x"])


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("much", "augmentation is 'much' but must be none, intensity, default or settings"),
        ({"rotate": 3}, "augmentation has no setting rotate; it has share, scale"),
        ({"rotation": 90}, "rotation is 90 but must be a number from 0 to 45"),
        ({"share": True}, "share is True but must be a number from 0 to 1"),
        ({"flips": "width"}, "flips is 'width' but must be a list of axes from depth, height, width"),
        ({"flips": ["left"]}, "must be a list of axes"),
        ("[1]", "must be none, intensity"),
    ],
)
def test_a_wrong_setting_is_named(setting: str | dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Augmentation.read(setting)


def test_settings_round_trip_through_json() -> None:
    assert Augmentation.read("none") is None and Augmentation.read(None) is None
    assert Augmentation.read('{"rotation": 5, "flips": ["depth"]}') == Augmentation(rotation=5, flips=("depth",))
    assert Augmentation.read(Augmentation(zoom=0.2).to_dict()) == Augmentation(zoom=0.2)
    assert all(getattr(Augmentation.read("intensity"), name) == 0 for name in STILL)


def test_the_recipes_of_the_demo_do_not_augment(repository: Path) -> None:
    for path in (repository / "stages" / "configs").glob("*/*.yaml"):
        assert ("augmentation: default" in path.read_text()) == (
            path.parent.name in ("paper", "single_gpu") and path.stem in ("segmentation", "stage1_siglip")
        ), path

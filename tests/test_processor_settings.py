"""Settings of a VolumeProcessor: checked, saved, loaded and replaced."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, PreTrainedConfig, ProcessorMixin

from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.volume import Volume, VolumeError
from tests.test_preprocessing import SIZE, phantom


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown recipe 'm4d'; known are m3d, hu_window"):
        VolumeProcessor("m4d")
    with pytest.raises(ValueError, match="Unknown resize 'cubic'; known are area, trilinear"):
        VolumeProcessor(resize="cubic")
    for size in ((128, 256), (0, 16, 16), (8, 16, 16.5)):
        with pytest.raises(ValueError, match="three whole numbers"):
            VolumeProcessor(size=size)
    with pytest.raises(ValueError, match="low < high"):
        VolumeProcessor(hu_range=(100, -100))
    for recipe, settings, message in (
        ("m3d", {"spacing": (1, 1, 1)}, "Recipe 'm3d' has no spacing but .* is given"),
        ("ct_rate", {"spacing": (1, 1)}, "spacing is .* but must be three positive numbers"),
        ("ct_rate", {"spacing": (1, 0, 1)}, "spacing is .* but must be three positive numbers"),
        ("ct_rate", {"resize": "area"}, "Recipe 'ct_rate' resamples 'trilinear' but resize is 'area'"),
        ("ct_clip", {"hu_range": (-1024, 600)}, "Recipe 'ct_clip' takes a hu_range of whole numbers within -1000..1000"),
        ("ct_clip", {"hu_range": (-160.5, 240)}, "Recipe 'ct_clip' takes a hu_range of whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            VolumeProcessor(recipe, **settings)
    with pytest.raises(TypeError, match="no setting .'sise'.; it has recipe, size"):
        VolumeProcessor(sise=(8, 8, 8))


def test_save_and_load(tmp_path: Path) -> None:
    processor = VolumeProcessor("hu_window", SIZE, hu_range=(-160, 240), resize="trilinear")
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == {
        "hu_range": [-160.0, 240.0],
        "image_processor_type": "VolumeProcessor",
        "recipe": "hu_window",
        "resize": "trilinear",
        "size": [8, 16, 12],
        "straighten": False,
    }
    loaded = VolumeProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    volume = Volume(phantom(), unit="HU")
    assert torch.equal(loaded.transform(volume), processor.transform(volume))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "preprocessor_config.json").read_text()) == saved


def test_a_ct_recipe_loads_with_its_spacing(tmp_path: Path) -> None:
    processor = VolumeProcessor("ct_clip", SIZE, spacing=(3, 1.5, 1.5), hu_range=(-1000, 200))
    processor.save_pretrained(tmp_path)
    loaded = VolumeProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict() and loaded.spacing == (3.0, 1.5, 1.5) and loaded.resize == "trilinear"


def test_settings_saved_before_there_was_a_spacing_still_load(tmp_path: Path) -> None:
    old = {"hu_range": [-1000.0, 1000.0], "image_processor_type": "VolumeProcessor", "recipe": "m3d", "resize": "area", "size": [8, 16, 12]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert VolumeProcessor.from_pretrained(tmp_path).to_dict() == VolumeProcessor("m3d", SIZE).to_dict()


def test_settings_can_be_replaced_when_loading_and_are_checked(tmp_path: Path) -> None:
    VolumeProcessor(size=SIZE).save_pretrained(tmp_path)
    loaded = VolumeProcessor.from_pretrained(tmp_path, size=[4, 8, 8], recipe="hu_window")
    assert (loaded.size, loaded.recipe) == ((4, 8, 8), "hu_window")
    with pytest.raises(ValueError, match="Unknown recipe"):
        VolumeProcessor.from_pretrained(tmp_path, recipe="m4d")


@pytest.mark.parametrize("recipe", ["m3d", "ct_rate"])
def test_straightening_is_off_by_default(tmp_path: Path, recipe: str) -> None:
    """When off, tilted and uneven scans are used as stored; when on, as `Volume.straighten` returns them, also after save and load."""
    lean = np.array([[0, 0, -1], [math.sin(0.3), -1, 0], [math.cos(0.3), 0, 0]])
    tilted = Volume(phantom(), (3, 1.5, 1.5), "SPL", lean, "HU")
    uneven = Volume(phantom(), (3, 1.5, 1.5), "SPL", unit="HU", slice_positions=tuple(np.cumsum(3 + 2 * (np.arange(len(phantom())) > 5))))
    upright = Volume(phantom(), (3, 1.5, 1.5), "SPL", unit="HU")
    off = VolumeProcessor(recipe, SIZE)
    VolumeProcessor(recipe, SIZE, straighten=True).save_pretrained(tmp_path)
    on = VolumeProcessor.from_pretrained(tmp_path)
    assert on.straighten and on.to_dict() != off.to_dict()
    for volume in (tilted, uneven):
        straight = volume.straighten()
        assert straight.array.shape != volume.array.shape
        assert torch.equal(off.transform(volume), off.transform(upright))
        assert torch.equal(on.transform(volume), off.transform(straight)) and torch.equal(on.transform(straight), off.transform(straight))
        np.testing.assert_array_equal(on.placement(straight), off.placement(straight))
        with pytest.raises(VolumeError, match=r"straightens this scan first; give what volume.straighten\(\) returns"):
            on.placement(volume)
    assert torch.equal(on.transform(upright), off.transform(upright))


class ScanConfig(PreTrainedConfig):
    model_type = "volume_processor_test"


class ScanProcessor(ProcessorMixin):
    def __init__(self, image_processor: VolumeProcessor) -> None:
        super().__init__(image_processor)


def test_auto_class_and_processor_mixin(tmp_path: Path) -> None:
    AutoImageProcessor.register(ScanConfig, slow_image_processor_class=VolumeProcessor, exist_ok=True)
    processor = VolumeProcessor(size=SIZE)
    processor.save_pretrained(tmp_path / "alone")
    assert AutoImageProcessor.from_pretrained(tmp_path / "alone").to_dict() == processor.to_dict()

    both = ScanProcessor(processor)
    both.save_pretrained(tmp_path / "both")
    loaded = ScanProcessor.from_pretrained(tmp_path / "both")
    assert loaded.image_processor.to_dict() == processor.to_dict()
    assert VolumeProcessor.from_pretrained(tmp_path / "both").to_dict() == processor.to_dict()
    volume = Volume(phantom())
    assert torch.equal(loaded(images=[volume])["pixel_values"], processor(volume)["pixel_values"])

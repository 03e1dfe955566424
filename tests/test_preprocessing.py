"""VolumeProcessor: orientation by marker voxels, recipes against plain numpy, the same tensor on every way."""

import itertools
import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, PreTrainedConfig, ProcessorMixin

from med3dvlm.preprocessing import RECIPES, VolumeProcessor, as_displayed, dequantize, quantize
from med3dvlm.volume import Volume, VolumeError, read_volume

SHAPE = (10, 20, 30)  # D, H, W: all different, so that swapped axes fail
SIZE = (8, 16, 12)
AXIS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}  # RAS axis and sign


def phantom(seed: int = 0) -> np.ndarray:
    """A noisy block of tissue in air, HU."""
    array = np.full(SHAPE, -1000, dtype=np.int16)
    array[1:9, 3:17, 4:28] = np.random.default_rng(seed).integers(-200, 300, (8, 14, 24))
    array[2, 5, 9] = 900
    return array


def patient() -> np.ndarray:
    """A physical phantom on a grid (x towards Right, y Anterior, z Superior), every voxel different."""
    return np.random.default_rng(1).permutation(12 * 16 * 20).reshape(12, 16, 20).astype(np.int16)


def stored(letters: str) -> np.ndarray:
    """The patient as an array whose axes grow towards `letters`, by plain index arithmetic."""
    source = patient()
    axes, signs = zip(*(AXIS[letter] for letter in letters), strict=True)
    shape = tuple(source.shape[axis] for axis in axes)
    result = np.empty(shape, source.dtype)
    for index in np.ndindex(shape):
        place = [0, 0, 0]
        for position, axis, sign, length in zip(index, axes, signs, shape, strict=True):
            place[axis] = position if sign > 0 else length - 1 - position
        result[index] = source[tuple(place)]
    return result


def write(path: Path, letters: str, tilt: float = 0.0) -> Path:
    """The patient in a NIfTI whose D, H, W axes grow towards `letters`, turned by `tilt` degrees about each axis."""
    directions = np.zeros((3, 3))
    for column, letter in enumerate(reversed(letters)):  # NIfTI's axes are W, H, D
        axis, sign = AXIS[letter]
        directions[axis, column] = sign
    cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    turn_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    turn_z = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn_x @ turn_z @ directions @ np.diag([1.5, 1.5, 1.5])
    nibabel.save(nibabel.Nifti1Image(stored(letters).transpose(), affine), path)
    return path


# Orientation


@pytest.mark.parametrize("displayed", ["SPL", "PIL", "LIP"])
@pytest.mark.parametrize("tilt", [0.0, 20.0])
def test_every_stored_orientation_of_a_plane_gives_the_same_tensor(tmp_path: Path, displayed: str, tilt: float) -> None:
    processor = VolumeProcessor(size=SIZE)
    expected = stored(displayed)
    reference = processor.transform(Volume(expected))  # without orientation: as displayed already
    along = [letters for letters in itertools.product("RLAPSI", repeat=3) if len({AXIS[x][0] for x in letters}) == 3]
    same_plane = ["".join(letters) for letters in along if AXIS[letters[0]][0] == AXIS[displayed[0]][0]]
    assert len(same_plane) == 16
    for letters in same_plane:
        volume = read_volume(write(tmp_path / "scan.nii", letters, tilt))
        assert volume.orientation == letters
        np.testing.assert_array_equal(as_displayed(volume)[0].numpy(), expected)
        assert torch.equal(processor.transform(volume), reference)


def test_a_lesion_in_the_right_upper_front_is_where_a_screen_shows_it(tmp_path: Path) -> None:
    body = np.zeros((12, 16, 20), np.int16)
    body[10, 14, 17] = 100  # right, anterior, superior
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    third_axis = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}
    found = {}
    for plane, order in third_axis.items():
        turned = affine.copy()
        turned[:3, :3] = affine[:3, :3][:, order]
        nibabel.save(nibabel.Nifti1Image(body.transpose(order), turned), tmp_path / f"{plane}.nii")
        volume = read_volume(tmp_path / f"{plane}.nii")
        assert volume.plane == plane
        found[plane] = tuple(int(i) for i in np.argwhere(as_displayed(volume)[0].numpy())[0])
    # axial: 18th slice from below, anterior is the top of the picture, the patient's right its left side
    assert found == {"axial": (17, 1, 1), "coronal": (1, 2, 1), "sagittal": (1, 2, 1)}


# Recipes against plain numpy


def area_resize(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Each new voxel is the mean of the old ones it touches, in plain loops."""
    result = np.empty(size)
    for index in np.ndindex(*size):
        box = tuple(slice(i * old // new, -((i + 1) * old // -new)) for i, old, new in zip(index, array.shape, size, strict=True))
        result[index] = array[box].astype(np.float64).mean()
    return result


def crop(array: np.ndarray) -> np.ndarray:
    places = np.argwhere(array > 0)
    return array[tuple(slice(a, b + 1) for a, b in zip(places.min(0), places.max(0), strict=True))]


@pytest.mark.parametrize("size", [SIZE, (16, 21, 40), (8, 14, 24)])
def test_m3d_against_numpy(size: tuple[int, int, int]) -> None:
    array = phantom().astype(np.float64)
    scaled = (array - array.min()) / (array.max() - array.min())
    expected = area_resize(crop(scaled), size)
    result = VolumeProcessor("m3d", size).transform(Volume(phantom()))
    assert result.shape == (1, *size) and result.dtype == torch.float32 and type(result) is torch.Tensor
    # half a grey step for the 8-bit grid, and a little for float32
    assert np.abs(result[0].numpy() - expected).max() <= 0.5 / 255 + 1e-6


def test_hu_window_against_numpy() -> None:
    expected = area_resize(crop((np.clip(phantom().astype(np.float64), -160, 240) + 160) / 400), SIZE)
    processor = VolumeProcessor("hu_window", SIZE, hu_range=(-160, 240))
    result = processor.transform(Volume(phantom(), unit="HU"))
    assert np.abs(result[0].numpy() - expected).max() <= 0.5 / 255 + 1e-6


def test_trilinear_against_torch() -> None:
    array = torch.from_numpy(phantom().astype(np.float32))
    scaled = torch.from_numpy(crop(((array - array.min()) / (array.max() - array.min())).numpy()))
    expected = torch.nn.functional.interpolate(scaled[None, None], SIZE, mode="trilinear", align_corners=False)[0]
    result = VolumeProcessor("m3d", SIZE, resize="trilinear").transform(Volume(phantom()))
    assert (result - expected).abs().max() <= 0.5 / 255 + 1e-6


def test_m3d_ignores_unit_and_type_of_the_same_picture() -> None:
    processor = VolumeProcessor(size=SIZE)
    whole = processor.transform(Volume(phantom(), unit="HU"))
    assert torch.equal(whole, processor.transform(Volume(phantom().astype(np.float32))))


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_same_bits_whatever_the_number_of_threads(recipe: str) -> None:
    processor, volume, threads = VolumeProcessor(recipe, SIZE), Volume(phantom(), unit="HU"), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(processor.transform(volume))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_transform_leaves_the_volume_alone() -> None:
    volume = Volume(phantom().astype(np.float32), orientation="SPL")
    VolumeProcessor(size=SIZE).transform(volume)
    np.testing.assert_array_equal(volume.array, phantom())


# The uint8 grid


def test_quantize_and_dequantize_are_inverse() -> None:
    grey = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantize(dequantize(grey)), grey)
    np.testing.assert_array_equal(dequantize(grey).numpy(), np.arange(256, dtype=np.float32) / np.float32(255))
    assert quantize(torch.tensor([0.0, 0.0019, 0.0020, 0.5, 0.999, 1.0])).tolist() == [0, 0, 1, 128, 255, 255]
    with pytest.raises(ValueError, match="Only values in 0..1"):
        quantize(torch.tensor([-1000.0, 40.0]))


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("resize", ["area", "trilinear"])
def test_prepared_store_and_direct_path_give_the_same_bits(tmp_path: Path, recipe: str, resize: str) -> None:
    processor = VolumeProcessor(recipe, SIZE, resize=resize)
    affine = np.diag([0.7, 0.8, 2.5, 1.0])
    nibabel.save(nibabel.Nifti1Image(phantom().transpose(), affine), tmp_path / "scan.nii.gz")
    direct = processor(tmp_path / "scan.nii.gz")["pixel_values"]

    prepared = quantize(processor.transform(read_volume(tmp_path / "scan.nii.gz")))
    assert prepared.dtype == torch.uint8
    np.save(tmp_path / "prepared.npy", prepared.numpy())
    stored_array = np.load(tmp_path / "prepared.npy")

    assert torch.equal(processor(stored_array)["pixel_values"], direct)
    assert torch.equal(processor(torch.from_numpy(stored_array)[0])["pixel_values"], direct)
    assert torch.equal(processor(direct[0])["pixel_values"], direct)
    assert torch.equal(dequantize(prepared)[None], direct)


# Calling it


def test_call_takes_volumes_paths_tensors_and_lists(tmp_path: Path) -> None:
    processor = VolumeProcessor(size=SIZE)
    nibabel.save(nibabel.Nifti1Image(phantom().transpose(), np.diag([-1.0, -1.2, 2.0, 1.0])), tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    path = tmp_path / "scan.nii"
    batch = processor([volume, path, str(path), processor.transform(volume)], return_tensors="pt")
    assert batch["pixel_values"].shape == (4, 1, *SIZE) and batch["pixel_values"].dtype == torch.float32
    assert all(torch.equal(item, batch["pixel_values"][0]) for item in batch["pixel_values"])
    assert torch.equal(processor.preprocess(volume).pixel_values, processor(volume).pixel_values)


def test_prepared_tensors_of_another_kind_are_refused() -> None:
    processor = VolumeProcessor(size=SIZE)
    with pytest.raises(ValueError, match=r"must be \(8, 16, 12\) or \(1, 8, 16, 12\) but is \(1, 10, 20, 30\)"):
        processor(torch.zeros(1, *SHAPE))
    for wrong in (torch.full(SIZE, 40.0), torch.full(SIZE, torch.nan), torch.zeros(SIZE, dtype=torch.int16)):
        with pytest.raises(ValueError, match="uint8 or floating point within 0..1"):
            processor(wrong)
    with pytest.raises(ValueError, match="empty list"):
        processor([])
    with pytest.raises(ValueError, match="'tf'"):
        processor(torch.zeros(SIZE), return_tensors="tf")


def test_volumes_that_a_recipe_cannot_use() -> None:
    processor = VolumeProcessor(size=SIZE)
    with pytest.raises(VolumeError, match="tiny.nii: the volume has only 3x20x30 voxels but at least 4"):
        processor(Volume(phantom()[:3], source="tiny.nii"))
    dot = np.zeros(SHAPE, np.int16)
    dot[2, 5, 9] = 1
    with pytest.raises(VolumeError, match="dot.nii: its foreground has only 1x1x1 voxels"):
        processor(Volume(dot, source="dot.nii"))
    window = VolumeProcessor("hu_window", SIZE)
    with pytest.raises(VolumeError, match="mr.nii: recipe 'hu_window' needs Hounsfield units .* 'arbitrary'"):
        window(Volume(phantom(), source="mr.nii"))
    air = phantom() // 100 - 2000
    with pytest.raises(VolumeError, match="air.nii: its foreground has only 0x0x0 voxels"):
        window(Volume(air.astype(np.int16), unit="HU", source="air.nii"))


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
    with pytest.raises(TypeError, match="no setting .'sise'.; it has recipe, size"):
        VolumeProcessor(sise=(8, 8, 8))


# With transformers


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
    }
    loaded = VolumeProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    volume = Volume(phantom(), unit="HU")
    assert torch.equal(loaded.transform(volume), processor.transform(volume))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "preprocessor_config.json").read_text()) == saved


def test_settings_can_be_replaced_when_loading_and_are_checked(tmp_path: Path) -> None:
    VolumeProcessor(size=SIZE).save_pretrained(tmp_path)
    loaded = VolumeProcessor.from_pretrained(tmp_path, size=[4, 8, 8], recipe="hu_window")
    assert (loaded.size, loaded.recipe) == ((4, 8, 8), "hu_window")
    with pytest.raises(ValueError, match="Unknown recipe"):
        VolumeProcessor.from_pretrained(tmp_path, recipe="m4d")


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


# A real scan


def test_real_head_ct() -> None:
    folder = os.environ.get("MED3DVLM_SHARED_DATA")
    if not folder:
        pytest.skip("MED3DVLM_SHARED_DATA is not set")
    volume = read_volume(Path(folder) / "head_ct.nii.gz")
    assert volume.shape == (108, 256, 256) and volume.spacing == pytest.approx((1.5, 0.957, 0.957), abs=1e-3)
    assert (volume.orientation, volume.plane, volume.unit, volume.array.dtype) == ("SAL", "axial", "HU", np.int16)
    # stored with rows towards Anterior: displayed, they are flipped, columns stay
    np.testing.assert_array_equal(as_displayed(volume)[0].numpy(), volume.array[:, ::-1])
    for recipe in RECIPES:
        result = VolumeProcessor(recipe, (32, 64, 64))(volume)["pixel_values"]
        assert result.shape == (1, 1, 32, 64, 64) and 0 <= result.min() and result.max() <= 1 and result.std() > 0.05

"""VolumeProcessor: orientation by marker voxels, recipes against plain numpy, and equal tensors from every kind of input."""

import itertools
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.recipes import RECIPES, as_displayed
from med3dvlm.volume import Volume, VolumeError, read_volume

SHAPE = (10, 20, 30)  # D, H, W: all different, so that swapped axes fail
SIZE = (8, 16, 12)
SPACING = (1.5, 0.9, 0.7)  # z, y, x in mm, none of them the CT recipes'
AXIS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}  # RAS axis and sign


def phantom(seed: int = 0) -> np.ndarray:
    """Return a noisy block of tissue in air, in HU."""
    array = np.full(SHAPE, -1000, dtype=np.int16)
    array[1:9, 3:17, 4:28] = np.random.default_rng(seed).integers(-200, 300, (8, 14, 24))
    array[2, 5, 9] = 900
    return array


def patient() -> np.ndarray:
    """Return an array (x towards Right, y Anterior, z Superior) whose voxels all differ."""
    return np.random.default_rng(1).permutation(12 * 16 * 20).reshape(12, 16, 20).astype(np.int16)


def stored(letters: str) -> np.ndarray:
    """Return the patient as an array with axes towards `letters`, by plain index arithmetic."""
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
    """Write the patient as NIfTI with axes D, H, W towards `letters`, turned by `tilt` degrees about each axis."""
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


def test_a_lesion_in_the_right_upper_front_is_at_its_display_position(tmp_path: Path) -> None:
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
    """Return the mean of the old voxels that each new one touches, in plain loops."""
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
    processor, threads = VolumeProcessor(recipe, SIZE), torch.get_num_threads()
    volume = Volume(phantom(), spacing=SPACING, unit="HU")
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(processor.transform(volume))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_transform_does_not_change_the_volume() -> None:
    volume = Volume(phantom().astype(np.float32), orientation="SPL")
    VolumeProcessor(size=SIZE).transform(volume)
    np.testing.assert_array_equal(volume.array, phantom())


# The CT recipes


def trilinear(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Interpolate at the centre of each new voxel between eight neighbours, in plain loops; the border is extended."""
    result = np.empty(size)
    for index in np.ndindex(*size):
        value = 0.0
        corners = []
        for place, old, new in zip(index, array.shape, size, strict=True):
            centre = min(max((place + 0.5) * old / new - 0.5, 0), old - 1)
            low = min(int(centre), old - 2)
            corners.append(((low, 1 - (centre - low)), (low + 1, centre - low)))
        for (z, a), (y, b), (x, c) in itertools.product(*corners):
            value += a * b * c * array[z, y, x]
        result[index] = value
    return result


def crop_or_pad(array: np.ndarray, size: tuple[int, ...], value: float) -> np.ndarray:
    """Crop or pad about the centre; for even sizes as CT-CLIP's public code does."""
    for axis, (old, new) in enumerate(zip(array.shape, size, strict=True)):
        start, before = max(old // 2 - new // 2, 0), max((new - old) // 2, 0)
        array = np.take(array, range(start, start + min(old, new)), axis)
        pads = [(0, 0)] * 3
        pads[axis] = (before, max(new - old, 0) - before)
        array = np.pad(array, pads, constant_values=value)
    return array


def by_hand(array: np.ndarray, spacing: tuple[float, ...], size: tuple[int, ...], low: float = -1000, high: float = 1000) -> np.ndarray:
    """Return recipe ct_rate of a scan stored "SPL", in plain loops: (D, W, H), since rows of the result run to the patient's left."""
    clipped = np.clip(array.astype(np.float64), -1000, 1000).transpose(0, 2, 1)
    along = (spacing[0] / 1.5, spacing[2] / 0.75, spacing[1] / 0.75)
    grid = tuple(int(round(length * factor, 6)) for length, factor in zip(clipped.shape, along, strict=True))
    placed = crop_or_pad(trilinear(clipped, grid), size, -1000)
    return (np.clip(placed, low, high) - low) / (high - low) * 2 - 1


@pytest.mark.parametrize("recipe", ["ct_rate", "ct_clip"])
@pytest.mark.parametrize("size", [(8, 24, 20), (16, 30, 31), (15, 25, 24), (4, 64, 6)])
def test_ct_recipes_against_plain_loops(recipe: str, size: tuple[int, int, int]) -> None:
    """Volumes are cropped along some axes and padded along others, by even and odd numbers."""
    array = phantom()
    array[0] = -3024  # padding and metal beside the patient
    array[5, 9, 9] = 3071
    result = VolumeProcessor(recipe, size).transform(Volume(array, spacing=(2.0, 0.9, 0.7), orientation="SPL", unit="HU"))
    assert result.shape == (1, *size) and result.dtype == torch.float32 and type(result) is torch.Tensor
    # half a step of 1 HU, and a little for float32
    assert np.abs(result[0].numpy() - by_hand(array, (2.0, 0.9, 0.7), size)).max() <= 0.5 / 1000 + 1e-6


def test_ct_rate_with_the_window_of_the_released_code() -> None:
    processor = VolumeProcessor("ct_rate", (8, 25, 20), hu_range=(-1000, 200))
    result = processor.transform(Volume(phantom(), spacing=SPACING, unit="HU"))
    assert np.abs(result[0].numpy() - by_hand(phantom(), SPACING, (8, 25, 20), -1000, 200)).max() <= 0.5 / 600 + 1e-6
    assert torch.equal(processor.dequantize(torch.tensor([-1000, -400, 200], dtype=torch.int16)), torch.tensor([-1.0, 0.0, 1.0]))


def test_volumes_of_the_target_spacing_are_not_resampled() -> None:
    """This includes a spacing of 0.7499999, from rounding in the affine."""
    size = (10, 30, 20)
    for spacing in ((1.5, 0.75, 0.75), (1.4999999, 0.7499999, 0.7500001)):
        result = VolumeProcessor("ct_rate", size).transform(Volume(phantom(), spacing=spacing, unit="HU"))
        np.testing.assert_array_equal(result[0].numpy(), phantom().transpose(0, 2, 1).astype(np.float32) / np.float32(1000))


def test_ct_recipes_bring_every_orientation_to_one(tmp_path: Path) -> None:
    """All 48 orientations of one patient, with different spacings, give equal tensors bit for bit."""
    mm = {"x": 0.7, "y": 0.9, "z": 2.0}
    names = "xyz"
    results = {}
    processor = VolumeProcessor("ct_rate", (14, 20, 17))
    for letters in ("".join(way) for way in itertools.product("RLAPSI", repeat=3) if len({AXIS[x][0] for x in way}) == 3):
        spacing = tuple(mm[names[AXIS[letter][0]]] for letter in letters)
        volume = Volume(stored(letters), spacing=spacing, orientation=letters, unit="HU")
        results[letters] = processor.transform(volume)
    assert len(results) == 48 and all(torch.equal(result, results["SPL"]) for result in results.values())
    assert results["SPL"].std() > 0.1
    np.testing.assert_allclose(results["SPL"][0].numpy(), by_hand(stored("SPL"), (2.0, 0.9, 0.7), (14, 20, 17)), atol=0.5 / 1000 + 1e-6)


def test_in_a_ct_recipe_rows_run_to_the_left_and_columns_to_the_back() -> None:
    body = np.full((10, 20, 30), -1000, np.int16)
    body[8, 2, 27] = 500  # stored SPL: upper, front, left
    place = np.argwhere(
        VolumeProcessor("ct_rate", (10, 30, 20)).transform(Volume(body, (1.5, 0.75, 0.75), "SPL", unit="HU"))[0].numpy() > 0
    )
    assert place.tolist() == [[8, 27, 2]]


def test_ct_recipes_refuse_unusable_units_and_spacings() -> None:
    processor = VolumeProcessor("ct_clip", SIZE)
    with pytest.raises(VolumeError, match="a.nii: recipe 'ct_clip' needs Hounsfield units but the unit is 'arbitrary'"):
        processor.transform(Volume(phantom(), spacing=SPACING, source="a.nii"))
    with pytest.raises(VolumeError, match="b.nii: recipe 'ct_clip' resamples to 1.5 x 0.75 x 0.75 mm but the spacing is unknown; state"):
        processor.transform(Volume(phantom(), unit="HU", source="b.nii"))
    with pytest.raises(
        VolumeError, match="makes 4666x40000x18 voxels of a scan with this spacing of 700 x 0.7 x 1e.03 mm, which is too many; state"
    ):
        processor.transform(Volume(phantom(), spacing=(700.0, 0.7, 1000.0), unit="HU"))
    with pytest.raises(
        VolumeError, match="makes 0x28x18 voxels of a scan with this spacing of 0.1 x 0.7 x 0.7 mm, which is too few; state"
    ):
        processor.transform(Volume(phantom(), spacing=(0.1, 0.7, 0.7), unit="HU"))


def test_sizes_of_the_papers() -> None:
    sizes = {"m3d": (128, 256, 256), "hu_window": (128, 256, 256), "ct_rate": (256, 512, 512), "ct_clip": (240, 480, 480)}
    assert {name: VolumeProcessor(name).size for name in RECIPES} == sizes
    assert {VolumeProcessor(name).spacing for name in ("ct_rate", "ct_clip")} == {(1.5, 0.75, 0.75)}


# The grid of whole numbers


@pytest.mark.parametrize(
    ("recipe", "dtype", "low", "high", "scale"),
    [("m3d", torch.uint8, 0, 255, 255), ("hu_window", torch.uint8, 0, 255, 255), ("ct_rate", torch.int16, -1000, 1000, 1000)],
)
def test_quantize_and_dequantize_are_inverse(recipe: str, dtype: torch.dtype, low: int, high: int, scale: int) -> None:
    processor = VolumeProcessor(recipe)
    whole = torch.arange(low, high + 1).to(dtype)
    assert processor.stored_dtype == dtype
    assert (
        torch.equal(processor.quantize(processor.dequantize(whole)), whole)
        and processor.quantize(processor.dequantize(whole)).dtype == dtype
    )
    np.testing.assert_array_equal(processor.dequantize(whole).numpy(), np.arange(low, high + 1, dtype=np.float32) / np.float32(scale))
    with pytest.raises(ValueError, match=rf"Only values in {low // scale}..1 can be quantised, not -1000 to 40"):
        processor.quantize(torch.tensor([-1000.0, 40.0]))


def test_values_are_rounded_to_the_nearest_grey_level() -> None:
    values = torch.tensor([0.0, 0.0019, 0.0020, 0.5, 0.999, 1.0])
    assert VolumeProcessor("m3d").quantize(values).tolist() == [0, 0, 1, 128, 255, 255]
    assert values.tolist()[3] == 0.5  # and are not changed themselves


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_prepared_store_and_direct_path_give_the_same_bits(tmp_path: Path, recipe: str) -> None:
    for resize in ("area", "trilinear") if recipe in ("m3d", "hu_window") else ("trilinear",):
        processor = VolumeProcessor(recipe, SIZE, resize=resize)
        affine = np.diag([0.7, 0.8, 2.5, 1.0])
        nibabel.save(nibabel.Nifti1Image(phantom().transpose(), affine), tmp_path / "scan.nii.gz")
        direct = processor(tmp_path / "scan.nii.gz")["pixel_values"]

        prepared = processor.quantize(processor.transform(read_volume(tmp_path / "scan.nii.gz")))
        assert prepared.dtype == processor.stored_dtype
        np.save(tmp_path / "prepared.npy", prepared.numpy())
        stored_array = np.load(tmp_path / "prepared.npy")

        assert torch.equal(processor(stored_array)["pixel_values"], direct)
        assert torch.equal(processor(torch.from_numpy(stored_array)[0])["pixel_values"], direct)
        assert torch.equal(processor(direct[0])["pixel_values"], direct)
        assert torch.equal(processor.dequantize(prepared)[None], direct)


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
    for wrong in (torch.full(SIZE, -1024, dtype=torch.int16), torch.full(SIZE, 1.5), torch.zeros(SIZE, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"int16 or floating point within -1\.\.1"):
            VolumeProcessor("ct_rate", SIZE)(wrong)
    with pytest.raises(ValueError, match="empty list"):
        processor([])
    with pytest.raises(ValueError, match="'tf'"):
        processor(torch.zeros(SIZE), return_tensors="tf")


def test_unusable_volumes_are_refused() -> None:
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
        processor = VolumeProcessor(recipe, (32, 64, 64))
        result = processor(volume)["pixel_values"]
        low, high = processor.grid.values
        assert result.shape == (1, 1, 32, 64, 64) and low <= result.min() and result.max() <= high and result.std() > 0.05

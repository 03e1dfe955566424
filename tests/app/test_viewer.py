"""The data sent to the browser, against nibabel's reorientation and numbers worked by hand."""

import itertools
import json

import nibabel.orientations
import numpy as np
import pytest

from med3dvlm.app.viewer import WINDOWS, default_window, describe, downsample, overlay, picture
from med3dvlm.geometry.orientation import for_screen
from med3dvlm.inference.saliency import SaliencyMap, place
from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.volume import Volume

ORIENTATIONS = ["".join(o) for axes in itertools.permutations(("LR", "PA", "IS")) for o in itertools.product(*axes)]


def volume_of(array: np.ndarray, orientation: str | None = "IPL", **more: object) -> Volume:
    return Volume(array, **{"spacing": (1.0, 1.0, 1.0), "orientation": orientation, "unit": "arbitrary", **more})


def unpacked(volume: Volume, **options: int) -> tuple[np.ndarray, dict]:
    """Returns the values (Z, Y, X) and the facts as the browser decodes them."""
    given = picture(volume, **options)
    facts = json.loads(json.dumps(given.facts))
    stored = np.frombuffer(b"".join(given.planes()), "<i2").reshape(facts["shape"])
    return facts["slope"] * stored.astype(np.float64) + facts["intercept"], facts


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_is_shown_as_a_radiologist_looks_at_it(orientation: str) -> None:
    array = np.random.default_rng(0).integers(-1000, 1000, (10, 20, 30)).astype(np.int16)
    spacing = (4.0, 0.5, 1.5)
    axes = nibabel.orientations.axcodes2ornt(tuple(orientation))
    ras = nibabel.orientations.apply_orientation(array, axes)  # (X, Y, Z) growing to right, anterior, superior

    values, facts = unpacked(volume_of(array, orientation, spacing=spacing))

    np.testing.assert_array_equal(values, ras[::-1, ::-1, ::-1].transpose(2, 1, 0))  # the first voxel is superior, anterior and right
    places = [int(axes[axis][0]) for axis in range(3)]  # of x, y, z that each stored axis runs along
    assert facts["spacing"] == [spacing[places.index(axis)] for axis in (2, 1, 0)]
    assert (facts["slope"], facts["intercept"], facts["note"]) == (1, 0, "")
    assert facts["names"]["coronal"] == "coronal"
    assert facts["edges"] == {"axial": "APRL", "coronal": "SIRL", "sagittal": "SIAP"}


@pytest.mark.parametrize("flipped", [1, -1])
def test_edges_between_two_directions_are_named_by_both(flipped: int) -> None:
    """The scan is turned by 40 degrees within the axial plane; the right edge points to the left and, less, to the front."""
    cosine, sine = np.cos(np.radians(40)), np.sin(np.radians(40))
    direction = np.array([[0, sine, -cosine * flipped], [0, -cosine, sine * flipped], [1, 0, 0]])  # columns D, H, W
    array = np.arange(6000, dtype=np.int16).reshape(10, 20, 30)
    shown = unpacked(volume_of(array, "SPL" if flipped > 0 else "SPR", direction=direction))[1]["edges"]
    assert shown["axial"] == ["AL", "PR", "RP", "LA"]
    assert shown["coronal"] == ["S", "I", "RP", "LA"] and shown["sagittal"] == ["S", "I", "AL", "PR"]


def test_fractions_keep_their_value_to_one_step_of_65534() -> None:
    array = np.random.default_rng(1).normal(3, 7, (10, 20, 30)).astype(np.float32)
    values, facts = unpacked(volume_of(array))
    assert np.abs(values - array).max() <= np.ptp(array) / 65534 * 0.51
    assert facts["window"] == pytest.approx([array.min(), array.max()])
    assert facts["presets"] == [] and facts["unit"] == ""


def test_a_scan_too_large_for_a_browser_is_reduced_and_reported() -> None:
    array = np.random.default_rng(2).integers(-1000, 1000, (4, 21, 31)).astype(np.int16)
    values, facts = unpacked(volume_of(array, spacing=(5.0, 0.5, 1.0)), max_voxels=4 * 21 * 31 // 4 + 1)
    assert facts["shape"] == [4, 10, 15] and facts["spacing"] == [5.0, 1.0, 2.0]
    assert "2 times coarser" in facts["note"]
    for z, y, x in ((0, 0, 0), (1, 4, 7), (3, 9, 14)):
        block = array[z, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert abs(values[z, y, x] - block.mean()) <= 0.5
    assert downsample(array, array.size)[1] == 1 and downsample(array, array.size - 1)[1] == 2
    thirds, block = downsample(array.astype(np.float32), array.size // 8)
    assert block == 3 and thirds[2, 1, 1] == pytest.approx(array[2, 3:6, 3:6].mean())


def test_windows() -> None:
    ramp = np.arange(-1000, 1000).reshape(10, 10, 20).astype(np.int16)
    facts = unpacked(volume_of(ramp, unit="HU"))[1]
    assert facts["presets"] == [[name, *window] for name, window in WINDOWS.items()]
    assert facts["window"] == [-160, 240] and facts["unit"] == "HU"
    assert default_window(volume_of(ramp)) == (-1000, 999)
    own = unpacked(volume_of(ramp, unit="HU", window=(-20.0, 130.0)))[1]  # offered; a CT opens as every CT does
    assert own["presets"] == [*facts["presets"], ["From file", -20, 130]] and own["window"] == [-160, 240]
    other = unpacked(volume_of(ramp, window=(-20.0, 130.0)))[1]
    assert other["presets"] == [["From file", -20, 130]] and other["window"] == [-20, 130]
    assert all(low < high for low, high in WINDOWS.values())


def test_a_volume_without_geometry_is_shown_as_stored() -> None:
    array = np.arange(10 * 20 * 30, dtype=np.int16).reshape(10, 20, 30)
    volume = Volume(array)
    values, facts = unpacked(volume)
    np.testing.assert_array_equal(values, array)
    assert facts["names"] == {"axial": "slices", "coronal": "rows", "sagittal": "columns"}
    assert facts["edges"] == {} and not facts["millimetres"]
    assert describe(volume, "NumPy array")["Orientation"] == "unknown, shown as stored"


def test_description_states_the_scan_and_nothing_that_identifies() -> None:
    array = np.zeros((10, 20, 30), np.int16)
    array[0, 0, 0] = 700
    tilt = np.array([[0, 0, -1], [np.sin(0.2), -np.cos(0.2), 0], [np.cos(0.2), np.sin(0.2), 0]], dtype=float)
    volume = Volume(array, (1.5, 0.75, 0.75), "SPL", tilt, "HU", "/tmp/secret/Doe^Jane.nii", ("The slices are uneven.",))
    rows = describe(volume, "NIfTI")
    text = str(rows)
    for fact in ("10 × 20 × 30", "1.5 × 0.75 × 0.75 mm", "15 × 15 × 22 mm", "SPL, axial slices, turned by 11.5°", "NIfTI"):
        assert fact in text
    for fact in ("Hounsfield units", "0 to 700", "CT (by its Hounsfield units)"):
        assert fact in text
    assert "secret" not in text and "Doe" not in text


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("step", "max_voxels"), [(1, 10**9), (4, 10**9), (4, 1700)])
def test_an_overlay_lies_where_its_voxels_are_shown(orientation: str, step: int, max_voxels: int) -> None:
    array = np.zeros((10, 24, 31), np.int16)
    place = (8, 4, 20)
    array[place] = 900
    volume = volume_of(array, orientation)
    shown = picture(volume, max_voxels)
    cells = (array / 900).astype(np.float32)[::step, ::step, ::step]
    laid = overlay(volume, shown, cells, step, "a phrase")
    seen = np.unravel_index(shown.stored.argmax(), shown.stored.shape)
    block = shown.block
    assert block == (1 if max_voxels > 10**6 else 3)
    exact = np.array(laid.facts["origin"]) + np.array(laid.facts["step"]) * np.argwhere(laid.heat)[0]  # of the one hot cell's middle
    assert np.abs(exact - seen).max() <= (0 if block == 1 else 0.34)
    assert laid.facts["peak"] == list(seen) and laid.heat.max() == 255 and laid.facts["shape"] == laid.heat.shape


@pytest.mark.parametrize("orientation", ["SPL", "LIP", "RAI"])
@pytest.mark.parametrize("recipe", ["m3d", "ct_rate"])
def test_the_crosshair_jumps_to_the_middle_of_the_hottest_cell_also_at_the_edge(orientation: str, recipe: str) -> None:
    """`place` extends the heat beyond the outermost cells and sets it to 0 where the scan was cropped."""
    size = (32, 64, 64)
    options = {"spacing": (3.0, 2.0, 2.0)} if recipe == "ct_rate" else {}
    processor = VolumeProcessor(recipe, size=size, **options)
    generator = np.random.default_rng(3)
    body = np.zeros((60, 96, 90), np.int16)
    body[4:, 8:90, 6:84] = generator.integers(100, 900, (56, 82, 78))
    volume = volume_of(body, orientation, spacing=(1.5, 1.25, 1.0), unit="HU")
    shown = picture(volume)
    order, flips = for_screen(volume.orientation)
    first, step = (7.5, 7.5, 7.5), (16, 16, 16)
    cells = np.diag([*step, 1.0])
    cells[:3, 3] = first
    for hot in ((0, 0, 0), (1, 3, 3), (0, 3, 1), (1, 1, 2)):
        values = generator.uniform(0, 0.4, (2, 4, 4)).astype(np.float32)
        values[hot] = 1
        laid = overlay(volume, shown, place(SaliencyMap(values, cells, size), volume, processor, 2), 2, "a phrase")
        middle = (processor.placement(volume) @ [*(np.array(first) + np.array(step) * hot), 1])[:3]  # in voxels of the volume
        middle = np.clip(middle, 0, np.array(volume.shape) - 1)
        seen = np.array(
            [middle[axis] if flip.step == 1 else volume.shape[axis] - 1 - middle[axis] for axis, flip in zip(order, flips, strict=True)]
        )
        assert np.abs(np.array(laid.facts["peak"]) - seen).max() <= 2.5  # heat stands at every second voxel
    flat = overlay(volume, shown, np.zeros((30, 48, 45), np.float32), 2, "a phrase")
    assert flat.facts["peak"] is None


@pytest.mark.parametrize("orientation", ORIENTATIONS[::7])
def test_lengths_are_those_of_the_patient_also_where_axes_are_sheared(orientation: str) -> None:
    array = np.arange(6000, dtype=np.int16).reshape(10, 20, 30)
    spacing = np.array([2.5, 0.8, 0.6])
    codes = nibabel.orientations.axcodes2ornt(tuple(orientation))
    direction = np.zeros((3, 3))
    for column, (axis, sign) in enumerate(codes):
        direction[int(axis), column] = sign
    tilted = direction[:, 0] + 0.35 * direction[:, 1]  # the stack leans along its rows, as with a tilted gantry
    direction[:, 0] = tilted / np.linalg.norm(tilted)
    volume = volume_of(array, orientation, spacing=tuple(spacing), direction=direction)
    order, flips = for_screen(volume.orientation)
    found = np.array(picture(volume).facts["metric"])
    for step in np.random.default_rng(5).normal(size=(5, 3)):
        stored = np.zeros(3)
        for shown, (axis, flip) in enumerate(zip(order, flips, strict=True)):
            stored[axis] = step[shown] * (flip.step or 1)
        assert np.sqrt(step @ found @ step) == pytest.approx(np.linalg.norm(direction @ (stored * spacing)))

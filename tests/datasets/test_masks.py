"""Masks on the processor's grid, against thresholds of the intensity and SimpleITK's resampling, and unusable masks."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.sparse import csr_matrix, save_npz

from med3dvlm import VolumeProcessor, read_volume
from med3dvlm.datasets.m3d_seg import write_masks
from med3dvlm.datasets.masks import pack, read_masks, unpack
from med3dvlm.datasets.preparation import prepare
from med3dvlm.datasets.store import PreparedData, volume_path
from med3dvlm.files import read_lines, write_lines
from med3dvlm.records import Mask, Records, Study, fields_of, read_studies

LESION = 600  # HU and more


def oblique(letters: str, turn: float, spacing: tuple[float, float, float]) -> np.ndarray:
    """Returns a NIfTI affine with axes along these letters, turned by these degrees about z and x."""
    a, b = np.deg2rad(turn), np.deg2rad(turn / 2)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    columns = np.zeros((3, 3))
    for axis, letter in enumerate(letters):
        columns["RASLPI".index(letter) % 3, axis] = 1 if letter in "RAS" else -1
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ columns * spacing
    affine[:3, 3] = (12.5, -40.0, 31.0)
    return affine


def body(shape: tuple[int, int, int] = (23, 17, 11), seed: int = 0) -> np.ndarray:
    """A box of tissue in air, with a ragged lesion."""
    random = np.random.default_rng(seed)
    array = np.full(shape, -1000, np.int16)
    inside = tuple(slice(2, length - 3) for length in shape)
    array[inside] = random.integers(-100, 300, array[inside].shape)
    lesion = tuple(slice(4, length - 5) for length in shape)
    array[lesion] = np.where(random.random(array[lesion].shape) < 0.5, 800, array[lesion])
    return array


def save(path: Path, array: np.ndarray, affine: np.ndarray | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    if affine is None:
        image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(image, path)
    return path


def study(masks: dict[str, Mask], image: str = "a.nii.gz", **more: Any) -> Study:
    return Study("a", "p", image, "A lesion.", {}, "train", "test", masks=masks, **more)


@pytest.fixture
def prepared_from(tmp_path: Path) -> Any:
    def run(studies: Study, processor: VolumeProcessor, **options: Any) -> dict[str, Any]:
        return prepare(tmp_path, Records([studies]), processor, tmp_path / "store", workers=1, **options)

    return run


@pytest.mark.parametrize("letters", ["LPS", "RAS", "PIR", "SLA"])
@pytest.mark.parametrize("recipe", ["hu_window", "ct_rate"])
def test_a_mask_is_where_the_intensities_are(letters: str, recipe: str, prepared_from: Any, tmp_path: Path) -> None:
    """For oblique, flipped, anisotropic and cropped scans, the prepared mask is where the prepared scan is bright."""
    spacing = (1.0, 1.4, 2.5)
    array = body()
    save(tmp_path / "a.nii.gz", array, oblique(letters, 20, spacing))
    save(tmp_path / "lesion.nii.gz", (array >= LESION).astype(np.uint8), oblique(letters, 20, spacing))
    volume = read_volume(tmp_path / "a.nii.gz")
    if recipe == "hu_window":  # crops to the tissue; each voxel is then repeated two or three times
        tissue = [length - 5 for length in array.shape]
        axes = np.abs(VolumeProcessor("hu_window", size=(8, 8, 8)).placement(volume)[:3, :3]).argmax(axis=0)
        size = [tissue[2 - of_scan] * times for of_scan, times in zip(axes, (2, 3, 2), strict=True)]
        processor = VolumeProcessor("hu_window", size=size)
    else:  # pads some axes and crops others, without resampling
        axes = np.abs(VolumeProcessor("ct_rate", spacing=(2, 2, 2)).placement(volume)[:3, :3]).argmax(axis=0)
        processor = VolumeProcessor("ct_rate", size=(14, 12, 25), spacing=[volume.spacing[axis] for axis in axes])
    prepared_from(study({"lesion": Mask("lesion.nii.gz")}), processor)
    data = PreparedData(tmp_path / "store")
    (found,) = data.studies("train")
    values = data.processor.dequantize(data.volume(found))[0]
    low, high = data.processor.grid.values
    bright = values >= low + (high - low) * (LESION + 1000) / 2000 - 1e-3
    mask = data.masks(found)
    assert data.mask_names(found) == ["lesion"] and mask.shape == (1, *data.processor.size) and mask.dtype == torch.bool
    assert 50 < mask.sum() and torch.equal(mask[0], bright)


def on_scan(root: Path, mask: Mask, name: str = "lesion") -> tuple[np.ndarray, list[str]]:
    ((found, voxels, doubts),) = read_masks(root, {name: mask}, read_volume(root / "a.nii.gz"))
    assert found == name
    return voxels, doubts


@pytest.mark.parametrize("letters", ["LPS", "RSA", "IAL"])
def test_a_mask_of_another_orientation_is_turned_to_the_scan(letters: str, tmp_path: Path) -> None:
    """The voxels are reoriented by nibabel; the result is exact."""
    array = body()
    affine = oblique("RAS", 15, (1.0, 1.4, 2.5))
    save(tmp_path / "a.nii.gz", array, affine)
    drawn = nib.Nifti1Image((array >= LESION).astype(np.uint8), affine)
    wanted = nib.orientations.axcodes2ornt(letters)
    nib.save(drawn.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), wanted)), tmp_path / "m.nii.gz")
    voxels, doubts = on_scan(tmp_path, Mask("m.nii.gz"))
    assert np.array_equal(voxels, (array >= LESION).T) and doubts == []


def test_a_mask_of_another_spacing_is_resampled_as_simpleitk_does(tmp_path: Path) -> None:
    array = body()
    save(tmp_path / "a.nii.gz", array, oblique("LPS", 15, (1.0, 1.4, 2.5)))
    fine = np.zeros((31, 27, 40), np.uint8)
    fine[8:20, 6:21, 9:33] = np.random.default_rng(3).random((12, 15, 24)) < 0.7
    affine = oblique("RAI", 5, (0.9, 0.8, 0.7))
    middle = oblique("LPS", 15, (1.0, 1.4, 2.5)) @ [11, 8, 5, 1]
    affine[:3, 3] += (middle - affine @ [15, 13, 20, 1])[:3]
    save(tmp_path / "m.nii.gz", fine, affine)
    voxels, _ = on_scan(tmp_path, Mask("m.nii.gz"))
    images = [sitk.ReadImage(str(tmp_path / name)) for name in ("m.nii.gz", "a.nii.gz")]
    expected = sitk.GetArrayFromImage(sitk.Resample(*images, sitk.Transform(), sitk.sitkNearestNeighbor)).astype(bool)
    assert expected.sum() > 100 and (voxels != expected).sum() <= 2  # places halfway between two voxels: none to two of 4301


def test_masks_of_several_labels_and_channels(tmp_path: Path) -> None:
    """A file of labels, channels first or last, and the sparse matrices of M3D-Seg give the same mask."""
    array = body()
    affine = oblique("LPS", 0, (1.0, 1.4, 2.5))
    save(tmp_path / "a.nii.gz", array, affine)
    lesion, tissue = array >= LESION, (array > -200) & (array < LESION)
    save(tmp_path / "labels.nii.gz", np.where(lesion, 7, np.where(tissue, 3, 0)).astype(np.uint8), affine)
    save(tmp_path / "first.nii.gz", np.stack([tissue, lesion]).astype(np.uint8), None)
    save(tmp_path / "last.nii.gz", np.stack([tissue, lesion], axis=-1).astype(np.uint8), affine)
    save(tmp_path / "one.nii.gz", lesion[None].astype(np.uint8), None)
    sparse = write_masks(tmp_path / "seg", [tissue.T, None, lesion.T], array.T.shape).relative_to(tmp_path).as_posix()
    released = csr_matrix(np.stack([tissue, np.zeros_like(lesion), lesion]).reshape(3, -1).astype(np.int32))
    save_npz(tmp_path / f"case_1.{(3, *array.shape)}.npz", released)
    cases = [
        Mask("labels.nii.gz", value=7),
        Mask("first.nii.gz", channel=1),
        Mask("last.nii.gz", channel=1),
        Mask("one.nii.gz", channel=0),
        Mask(sparse, channel=2),
        Mask(f"case_1.{(3, *array.shape)}.npz", channel=2),
    ]
    for mask in cases:
        assert np.array_equal(on_scan(tmp_path, mask)[0], lesion.T), mask
    assert not on_scan(tmp_path, Mask(sparse, channel=1))[0].any()


def test_unusable_masks_are_refused(tmp_path: Path, prepared_from: Any) -> None:
    array = body()
    affine = oblique("LPS", 0, (1.0, 1.4, 2.5))
    save(tmp_path / "a.nii.gz", array, affine)
    mask = (array >= LESION).astype(np.uint8)
    far = affine.copy()
    far[:3, 3] += 500
    save(tmp_path / "far.nii.gz", mask, far)
    save(tmp_path / "scores.nii.gz", mask * np.float32(0.4), affine)
    save(tmp_path / "many.nii.gz", mask * 2 + (array < 0), affine)
    save(tmp_path / "small.nii.gz", mask[:-1], None)
    save(tmp_path / "channels.nii.gz", np.stack([mask, mask])[:, 1:], None)
    np.savez(tmp_path / "damaged.npz", data=1)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "damaged.npz").read_bytes()[:60])
    save_npz(tmp_path / "unnamed.npz", csr_matrix(mask.reshape(1, -1)))
    for wrong, said in {
        Mask("none.nii.gz"): "none.nii.gz, a mask of .*a.nii.gz, is missing; restore it",
        Mask("far.nii.gz"): "mask of 'lesion': mask and scan do not overlap in the patient",
        Mask("scores.nii.gz"): "a mask holds whole numbers, .* save labels, not scores",
        Mask("many.nii.gz"): r"several labels \(0, 1, 2\); name one",
        Mask("small.nii.gz"): "mask and scan have 11x17x22 and 11x17x23 voxels and the mask has no geometry",
        Mask(
            "channels.nii.gz", channel=0
        ): "several masks in one file must be on the grid of their scan, 11x17x23, but the file is 11x17x22x2",
        Mask("far.nii.gz", channel=2): "channel 2 is named but the file holds one mask",
        Mask("cut.npz"): "cut.npz: this cannot be read as a sparse matrix",
        Mask("unnamed.npz", channel=0): "the name must end on the shape of the masks in it",
    }.items():
        with pytest.raises(ValueError, match=said):
            on_scan(tmp_path, wrong)
    summary = prepared_from(study({"lesion": Mask("far.nii.gz")}), VolumeProcessor("m3d", size=(6, 8, 8)))
    (failure,) = read_lines(tmp_path / "store" / "failures.jsonl")
    assert summary["failures"] == 1 and "do not overlap" in failure["reason"]


def test_a_mask_without_geometry_gives_a_warning(tmp_path: Path) -> None:
    """Some programs write the voxels of a mask without its geometry."""
    array = body()
    save(tmp_path / "a.nii.gz", array, oblique("LPS", 20, (1.0, 1.4, 2.5)))
    save(tmp_path / "m.nii.gz", (array >= LESION).astype(np.uint8), np.eye(4))
    voxels, doubts = on_scan(tmp_path, Mask("m.nii.gz"))
    assert np.array_equal(voxels, (array >= LESION).T) and "1 mm identity" in doubts[0]


def test_halving_takes_the_voxel_nearest_to_the_middle() -> None:
    """Of two equally near voxels it takes the one with the higher index, as torch's nearest-exact. One axis is flipped."""
    mask = np.random.default_rng(0).random((12, 16, 24)) < 0.4
    processor = VolumeProcessor("m3d", size=(8, 6, 12))
    placement = np.array([[0, 2, 0, 0.5], [-2, 0, 0, 14.5], [0, 0, 2, 0.5], [0, 0, 0, 1]])  # rows lead against the scan's
    values = torch.from_numpy(mask.transpose(1, 0, 2).astype(np.float32))[None, None]
    expected = torch.nn.functional.interpolate(values, (8, 6, 12), mode="nearest-exact")[0, 0].bool()
    assert torch.equal(processor.transform_mask(mask, placement).flip(0), expected)


def test_padding_holds_no_mask() -> None:
    placement = np.eye(4)
    placement[0, 3] = -2
    placed = VolumeProcessor("m3d", size=(9, 4, 5)).transform_mask(np.ones((4, 4, 5), bool), placement)
    assert placed.any(dim=2).any(dim=1).tolist() == [False] * 2 + [True] * 4 + [False] * 3


def test_a_mask_follows_a_scan_that_is_straightened(prepared_from: Any, tmp_path: Path) -> None:
    """In a sheared stack of two values, scan and mask are interpolated alike, so the mask is where the scan is bright."""
    lesion = np.zeros((24, 20, 14), bool)
    lesion[6:17, 5:14, 4:10] = np.random.default_rng(5).random((11, 9, 6)) < 0.8
    affine = oblique("LPS", 0, (1.0, 1.0, 2.0))
    affine[:3, 2] += (0, 0.93, 0)  # no voxel comes to lie halfway
    save(tmp_path / "a.nii.gz", np.where(lesion, 100, -1000).astype(np.int16), affine)
    save(tmp_path / "lesion.nii.gz", lesion.astype(np.uint8), affine)
    volume = read_volume(tmp_path / "a.nii.gz", unit="HU")
    straight = volume.straighten()
    assert straight.shape != volume.shape
    processor = VolumeProcessor("ct_rate", size=(14, 24, 33), spacing=straight.spacing, straighten=True)
    prepared_from(study({"lesion": Mask("lesion.nii.gz")}, reading={"unit": "HU"}), processor)
    data = PreparedData(tmp_path / "store")
    (found,) = data.studies("train")
    bright = data.processor.dequantize(data.volume(found))[0] >= -0.45
    assert bright.sum() > 200 and torch.equal(data.masks(found)[0], bright)


def test_packing_is_exact() -> None:
    random = np.random.default_rng(1)
    for share in (0.0, 0.01, 0.6, 1.0):
        mask = np.zeros((9, 13, 21), bool)
        mask[2:7, 3:11, 5:20] = random.random((5, 8, 15)) < share
        packed = pack(torch.from_numpy(mask))
        result = np.zeros_like(mask)
        if packed.voxels:
            unpack(packed.content, packed.box, result)
        assert np.array_equal(result, mask) and packed.voxels == mask.sum()


def test_stored_masks_are_small_checked_and_updated(tmp_path: Path, prepared_from: Any) -> None:
    array = body((40, 30, 20))
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    save(tmp_path / "a.nii.gz", array, affine)
    save(tmp_path / "lesion.nii.gz", (array >= LESION).astype(np.uint8), affine)
    save(tmp_path / "nothing.nii.gz", np.zeros(array.shape, np.uint8), affine)
    one = np.zeros(array.shape, np.uint8)
    one[0, 0, 0] = 1
    save(tmp_path / "air.nii.gz", one, affine)
    masks = {name: Mask(f"{name}.nii.gz") for name in ("nothing", "lesion", "air")}
    drawn = study(masks)
    processor = VolumeProcessor("m3d", size=(15, 25, 35))
    first = prepared_from(drawn, processor)
    assert first["masks"] == {"lesion": 1}
    assert set(first["warnings"]) >= {"some masks hold no voxel of the scan (...).", "some masks are lost by cropping and resizing (...)."}
    data = PreparedData(tmp_path / "store")
    (found,) = data.studies("train")
    assert found.masks == masks and data.mask_names(found) == ["lesion"]
    assert data.masks(found).shape == (1, 15, 25, 35) and data.masks(found).sum() > 100
    assert [int(mask.any()) for mask in data.masks(found, ["air", "lesion", "nothing"])] == [0, 1, 0]
    assert data.masks(found, []).shape == (0, 15, 25, 35)
    with pytest.raises(ValueError, match="study a of .* has no mask 'liver'; it has nothing, lesion, air"):
        data.masks(found, ["liver"])
    path = volume_path(tmp_path / "store", found)
    assert path.stat().st_size < 15 * 25 * 35 * (1 + 1 / 8) + 3000
    assert prepared_from(drawn, processor) == first

    save(tmp_path / "lesion.nii.gz", (array >= LESION).astype(np.uint8) * (np.arange(40)[:, None, None] < 20), affine)
    second = prepared_from(drawn, processor)
    assert second["fingerprint"] != first["fingerprint"]
    data = PreparedData(tmp_path / "store")
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    place = json.loads(content[8 : 8 + header])["mask 0"]["data_offsets"][0]
    content[8 + header + place + 9] ^= 4
    path.write_bytes(content)
    assert data.volume(found).any()  # which is whole
    with pytest.raises(ValueError, match="does not have the checksum of the index; run: med3dvlm prepare with --verify"):
        data.masks(found)
    prepared_from(drawn, processor, verify=True)
    assert PreparedData(tmp_path / "store").masks(found).sum() > 50


def test_records_with_masks_round_trip_and_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "studies.jsonl"
    known = [study({"a cyst": Mask("m.nii.gz", 3, None, "finding", "kidney", "left", "upper pole", "A cyst.")}), study({})]
    write_lines(path, map(fields_of, known))
    assert read_studies(path) == known
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert "masks" not in lines[1]  # so that manifests of data without masks are what they were
    for change, said in {
        "side": (("side", "up"), "side of the mask in m.nii.gz is 'up' but must be one of 'left'"),
        "file": (("file", "../m.nii.gz"), "file of a mask is '../m.nii.gz'"),
        "value": (("value", 0), "a label is not 0"),
        "age": (("age", 4), r"mask 'a cyst': missing fields \[\], unknown fields \['age'\]"),
    }.values():
        mask = lines[0]["masks"]["a cyst"] | dict([change])
        path.write_text(json.dumps(lines[0] | {"masks": {"a cyst": mask}}) + "\n")
        with pytest.raises(ValueError, match=f"line 1: .*{said}"):
            read_studies(path)

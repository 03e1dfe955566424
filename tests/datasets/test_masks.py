"""Masks on the processor's grid: equal to thresholds of the intensity, to SimpleITK's resampling, and whatever cannot be used named."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from med3dvlm import VolumeProcessor, read_volume
from med3dvlm.datasets.preparation import prepare
from med3dvlm.datasets.store import PreparedData
from med3dvlm.records import Mask, Study

LESION = 600  # HU and more


def oblique(letters: str, turn: float, spacing: tuple[float, float, float]) -> np.ndarray:
    """A NIfTI affine whose axes lead, but for a turn of so many degrees about z and x, where the letters say."""
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
    """Air around a box of tissue, with a ragged lesion in it."""
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
        return prepare(tmp_path, [studies], [], processor, tmp_path / "store", workers=1, **options)

    return run


@pytest.mark.parametrize("letters", ["LPS", "RAS", "PIR", "SLA"])
@pytest.mark.parametrize("recipe", ["hu_window", "ct_rate"])
def test_a_mask_is_where_the_intensities_are(letters: str, recipe: str, prepared_from: Any, tmp_path: Path) -> None:
    """Oblique, flipped, anisotropic and cropped: each voxel of the prepared mask is one where the prepared scan is bright."""
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

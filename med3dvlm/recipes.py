"""The recipes of the VolumeProcessor: steps from a Volume to a tensor (1, D, H, W), and the whole numbers that they end on.

A step takes the Volume, or what the step before it made. Add a recipe as a function that lists its steps, and a line in RECIPES.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from med3dvlm.volume import SPACING, Volume, VolumeError

DISPLAYED, CANONICAL = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}, "SLP"
AIR, BONE = -1000, 1000  # HU; what lies beyond is clipped by the CT recipes
SMALLEST, LARGEST = 4, 2**30  # voxels along any axis, and of a resampled volume in all (4 GiB; a whole body has 1 to 2)

Step = Callable[[Any], Any]


class Settings(Protocol):
    """The settings of a VolumeProcessor that a recipe reads."""

    recipe: str
    size: tuple[int, ...]
    spacing: tuple[float, ...] | None
    hu_range: tuple[float, ...]
    resize: str


@dataclass(frozen=True)
class Grid:
    """Whole numbers `low`..`high`, kept as `dtype`; k stands for (k - zero) / scale."""

    low: int
    high: int
    zero: float
    scale: float
    dtype: torch.dtype

    @property
    def values(self) -> tuple[float, float]:
        """Return the lowest and the highest value that a model sees."""
        return (self.low - self.zero) / self.scale, (self.high - self.zero) / self.scale

    def quantize(self, values: Tensor) -> Tensor:
        """Return the nearest whole numbers. Raises ValueError for values outside of the grid."""
        low, high = self.values
        if values.numel() and not (values.min() >= low - 1e-4 and values.max() <= high + 1e-4):
            raise ValueError(f"Only values in {low:g}..{high:g} can be quantised, not {values.min():g} to {values.max():g}.")
        return torch.mul(values, self.scale).add_(self.zero).round_().clamp_(self.low, self.high).to(self.dtype)

    def dequantize(self, whole: Tensor) -> Tensor:
        """Return the values of whole numbers, as float32."""
        values = whole.to(torch.float32, copy=True)
        if self.zero:
            values.sub_(self.zero)
        # Dividing by a number, CUDA multiplies by its reciprocal, which differs in the last bit; by a tensor it divides.
        return values.div_(torch.full((), self.scale, device=whole.device))


GREY = Grid(0, 255, 0, 255, torch.uint8)


def as_displayed(volume: Volume) -> torch.Tensor:
    """Return the voxels (1, D, H, W) as float32, flipped and H/W-swapped to the standard display of the volume's plane."""
    return oriented(volume, display(volume))[0]


def display(volume: Volume) -> str:
    """Return the letters of the standard display of the volume's plane."""
    return DISPLAYED[volume.plane or "axial"]


def reorientation(volume: Volume, wanted: str) -> NDArray[np.float64]:
    """Return the flips and swaps of axes that bring a volume to the orientation `wanted`, as nibabel writes them (3, 2). A volume without
    orientation is taken to be axial and as displayed on a screen.
    """
    from nibabel.orientations import axcodes2ornt, ornt_transform

    found: NDArray[np.float64] = ornt_transform(axcodes2ornt(volume.orientation or DISPLAYED["axial"]), axcodes2ornt(wanted))
    return found


def oriented(volume: Volume, wanted: str) -> tuple[torch.Tensor, list[Any]]:
    """Return the voxels (1, D, H, W) as float32 after those `reorientation`, and their spacing."""
    from nibabel.orientations import apply_orientation

    moved = reorientation(volume, wanted)
    array: NDArray[Any] = apply_orientation(volume.array, moved)
    spacing = list(volume.spacing or [None] * 3)
    spacing = [spacing[int(np.flatnonzero(moved[:, 0] == axis)[0])] for axis in range(3)]
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))[None], spacing


def require_hu(volume: Volume, recipe: str) -> Volume:
    """Return the volume itself if it is in Hounsfield units, else raise VolumeError."""
    if volume.unit != "HU":
        raise VolumeError(
            f"{volume.source}: recipe {recipe!r} needs Hounsfield units but the unit is {volume.unit!r}; "
            "state unit='HU' (--unit HU) if it is a CT, or prepare data and train by recipe 'm3d'."
        )
    return volume


def resample(volume: Volume, processor: Settings) -> Tensor:
    """Resample to the canonical orientation and the processor's spacing: voxels (1, D, H, W), clipped to AIR..BONE.

    Clipped first, so that padding of -3024 and metal do not bleed into their neighbours. Like the public code, this stretches
    the grid to a whole number of voxels, rounded down.
    """
    from monai.transforms.spatial.array import Resize

    recipe, wanted = processor.recipe, processor.spacing or ()
    if volume.spacing is None:
        raise VolumeError(
            f"{volume.source}: recipe {recipe!r} resamples to {' x '.join(f'{mm:g}' for mm in wanted)} mm but the spacing is unknown; "
            f"state {SPACING}, or prepare data and train by recipe 'm3d'."
        )
    data, spacing = oriented(volume, CANONICAL)
    # A little more, since 0.75 may be read as 0.7499999.
    size = [int(length * mm / new + 1e-3) for length, mm, new in zip(data.shape[1:], spacing, wanted, strict=True)]
    if min(size) < SMALLEST or math.prod(size) > LARGEST:
        stated, voxels = " x ".join(f"{mm:.3g}" for mm in volume.spacing), "x".join(map(str, size))
        raise VolumeError(
            f"{volume.source}: recipe {recipe!r} makes {voxels} voxels of a scan with this spacing of {stated} mm, which is too "
            f"{'few' if min(size) < SMALLEST else 'many'}; state the true {SPACING}."
        )
    data.clamp_(AIR, BONE)
    return Resize(tuple(size), mode="trilinear")(data) if tuple(size) != tuple(data.shape[1:]) else data


def m3d(processor: Settings) -> list[Step]:
    """M3D-Cap's preparation: min-max to 0..1, crop to what is above 0 (so above the minimum), resize.

    Source: M3D (arXiv 2404.00578) and its released preparation script; Med3DVLM (arXiv 2503.20047) at 128 x 256 x 256.
    """
    from monai.transforms.croppad.array import CropForeground
    from monai.transforms.intensity.array import ScaleIntensity
    from monai.transforms.spatial.array import Resize

    return [as_displayed, ScaleIntensity(0.0, 1.0), CropForeground(), Resize(processor.size, mode=processor.resize)]


def hu_window(processor: Settings) -> list[Step]:
    """Like m3d with a fixed window, for new training: clip to `hu_range`, scale to 0..1, crop to what is above its low end, resize."""
    from monai.transforms.croppad.array import CropForeground
    from monai.transforms.intensity.array import ScaleIntensityRange
    from monai.transforms.spatial.array import Resize

    low, high = processor.hu_range
    window = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)
    in_hu = partial(require_hu, recipe=processor.recipe)
    return [in_hu, as_displayed, window, CropForeground(), Resize(processor.size, mode=processor.resize)]


def ct_rate(processor: Settings) -> list[Step]:
    """CT-RATE: canonical orientation, clip, 0.75 x 0.75 x 1.5 mm, centre crop or pad with air to 512 x 512 x 256, scale to -1..1.

    Source: DCFormer (arXiv 2502.05091), implementation details; CT-CLIP (arXiv 2403.17834) has the same at 480 x 480 x 240.
    DCFormer's released code scales -1000..200 HU instead of -1000..1000: `hu_range=(-1000, 200)`, as converted weights have it.
    The paper clips last; the public preparation of CT-RATE clips before it resamples, and so does this (see `resample`).
    """
    from monai.transforms.croppad.array import ResizeWithPadOrCrop
    from monai.transforms.intensity.array import ScaleIntensityRange

    low, high = processor.hu_range
    return [
        partial(require_hu, recipe=processor.recipe),
        partial(resample, processor=processor),
        ResizeWithPadOrCrop(processor.size, mode="constant", constant_values=AIR),
        ScaleIntensityRange(low, high, -1.0, 1.0, clip=True),
    ]


@dataclass(frozen=True)
class Recipe:
    """The steps and their default settings; `spacing` is None where nothing is resampled to one."""

    steps: Callable[[Settings], list[Step]]
    size: tuple[int, int, int]
    spacing: tuple[float, float, float] | None = None
    resize: str = "area"


RECIPES: dict[str, Recipe] = {
    "m3d": Recipe(m3d, (128, 256, 256)),
    "hu_window": Recipe(hu_window, (128, 256, 256)),
    "ct_rate": Recipe(ct_rate, (256, 512, 512), (1.5, 0.75, 0.75), "trilinear"),
    "ct_clip": Recipe(ct_rate, (240, 480, 480), (1.5, 0.75, 0.75), "trilinear"),
}

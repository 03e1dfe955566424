"""From a Volume to the tensor that a model sees: the only preprocessing there is.

A *recipe* is a short list of steps. The first takes the Volume, the rest are MONAI transforms on a tensor
(1, D, H, W). A :class:`VolumeProcessor` holds the recipe's name and numbers, is saved beside the weights as
preprocessor_config.json, and is what preparation, training, evaluation, the command line and the app all call.

Recipes bring a volume to how its own acquisition plane is displayed, by flips and by swapping rows with columns, never
by resampling: questions about plane and side depend on exactly that. An oblique scan goes by its nearest axes, and a
volume without orientation is taken to be displayed that way already.

    axial       D inferior -> superior    rows anterior -> posterior    columns patient's right -> left    "SPL"
    coronal     D anterior -> posterior   rows superior -> inferior     columns patient's right -> left    "PIL"
    sagittal    D right -> left           rows superior -> inferior     columns anterior -> posterior      "LIP"

Every recipe ends on the grid of 8-bit grey values: `transform` returns k/255 with whole k. A prepared store therefore
keeps uint8 (`quantize`), and reading it back (`dequantize`) gives the same bits as the direct way from the scan file.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from med3dvlm.volume import Volume, VolumeError, read_volume

DISPLAYED = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}
RESIZE_MODES = ("area", "trilinear")
SMALLEST = 4  # voxels along any axis; below that there is nothing to recognise

Scan = Volume | str | os.PathLike[str] | torch.Tensor | NDArray[Any]
Step = Callable[[Any], Any]


def as_displayed(volume: Volume) -> torch.Tensor:
    """The voxels (1, D, H, W) as float32, flipped and H/W-swapped to the standard display of the volume's plane."""
    from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform

    array: NDArray[Any] = volume.array
    if volume.orientation is not None and volume.plane is not None:
        wanted = DISPLAYED[volume.plane]
        array = apply_orientation(array, ornt_transform(axcodes2ornt(volume.orientation), axcodes2ornt(wanted)))
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))[None]


def require_hu(volume: Volume) -> Volume:
    """The volume itself, if it is in Hounsfield units."""
    if volume.unit != "HU":
        raise VolumeError(
            f"{volume.source}: recipe 'hu_window' needs Hounsfield units but the unit is {volume.unit!r}; "
            "state unit='HU' in read_volume if it is a CT, or use recipe 'm3d'."
        )
    return volume


def m3d(processor: "VolumeProcessor") -> list[Step]:
    """M3D-Cap's preparation: min-max to 0..1, crop to what is above 0 (so above the minimum), resize."""
    from monai.transforms.croppad.array import CropForeground
    from monai.transforms.intensity.array import ScaleIntensity
    from monai.transforms.spatial.array import Resize

    return [as_displayed, ScaleIntensity(0.0, 1.0), CropForeground(), Resize(processor.size, mode=processor.resize)]


def hu_window(processor: "VolumeProcessor") -> list[Step]:
    """The same with a fixed window: clip to `hu_range`, scale to 0..1, crop to what is above its low end, resize."""
    from monai.transforms.croppad.array import CropForeground
    from monai.transforms.intensity.array import ScaleIntensityRange
    from monai.transforms.spatial.array import Resize

    low, high = processor.hu_range
    window = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)
    return [require_hu, as_displayed, window, CropForeground(), Resize(processor.size, mode=processor.resize)]


RECIPES: dict[str, Callable[["VolumeProcessor"], list[Step]]] = {"m3d": m3d, "hu_window": hu_window}


def quantize(values: torch.Tensor) -> torch.Tensor:
    """Values in 0..1 as uint8: round(255 x)."""
    if values.numel() and not (values.min() >= -1e-4 and values.max() <= 1 + 1e-4):
        raise ValueError(f"Only values in 0..1 can be quantised, not {values.min():g} to {values.max():g}.")
    return torch.round(values * 255).clamp(0, 255).to(torch.uint8)


def dequantize(grey: torch.Tensor) -> torch.Tensor:
    """uint8 as float32 in 0..1: grey / 255."""
    # Dividing by a number, CUDA multiplies by its reciprocal, which differs in the last bit; by a tensor it divides.
    return grey.to(torch.float32) / torch.full((), 255.0, device=grey.device)


class VolumeKwargs(TypedDict, total=False):
    """What transformers may hand on to VolumeProcessor, by from_pretrained or from a ProcessorMixin."""

    recipe: str
    size: Sequence[int]
    hu_range: Sequence[float]
    resize: str
    return_tensors: str | None


class VolumeProcessor(BaseImageProcessor):
    """Turns scans into a model's input.

    - `recipe`: a name in RECIPES.
    - `size`: (D, H, W) of the result in voxels.
    - `hu_range`: the window of recipe "hu_window", in HU; "m3d" does not use it.
    - `resize`: "area", MONAI's default, averages whatever falls into a new voxel, so that small lesions leave a trace;
      "trilinear" samples between the eight nearest voxels, as the released M3D preparation script does.

        processor = VolumeProcessor("m3d", size=(128, 256, 256))
        processor("scan.nii.gz")["pixel_values"]  # (1, 1, 128, 256, 256) float32 in 0..1

    The result depends on nothing but the scan and these settings: same file, same bits.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = VolumeKwargs  # type: ignore[assignment]

    def __init__(
        self,
        recipe: str = "m3d",
        size: Sequence[int] = (128, 256, 256),
        hu_range: Sequence[float] = (-1000.0, 1000.0),
        resize: str = "area",
        **kwargs: Any,
    ) -> None:
        """Raises ValueError for an unknown recipe or resize mode and for impossible numbers."""
        # from_pretrained passes on everything in the saved file, such as the class's name.
        unknown = set(kwargs) - {"image_processor_type", "processor_class", "auto_map"}
        if unknown:
            raise TypeError(f"VolumeProcessor has no setting {sorted(unknown)}; it has recipe, size, hu_range, resize.")
        super().__init__(**kwargs)
        if recipe not in RECIPES:
            raise ValueError(f"Unknown recipe {recipe!r}; known are {', '.join(RECIPES)}.")
        if resize not in RESIZE_MODES:
            raise ValueError(f"Unknown resize {resize!r}; known are {', '.join(RESIZE_MODES)}.")
        if len(size) != 3 or any(int(length) != length or length < 1 for length in size):
            raise ValueError(f"size is {size} but must be three whole numbers (D, H, W), as (128, 256, 256).")
        if len(hu_range) != 2 or not hu_range[0] < hu_range[1]:
            raise ValueError(f"hu_range is {hu_range} but must be (low, high) with low < high, as (-1000, 1000).")
        self.recipe = recipe
        self.size = tuple(int(length) for length in size)
        self.hu_range = tuple(float(limit) for limit in hu_range)
        self.resize = resize

    def transform(self, volume: Volume) -> torch.Tensor:
        """The recipe on one volume: (1, D, H, W) float32 in 0..1, on the uint8 grid (see the module's text).

        Raises VolumeError when the volume, or its foreground, has fewer than 4 voxels along an axis, and when the
        recipe needs Hounsfield units that the volume does not have.
        """
        data: Any = volume
        for step in RECIPES[self.recipe](self):
            depth, height, width = data.shape[-3:]
            if min(depth, height, width) < SMALLEST:
                what = "the volume has" if data is volume else "its foreground has"
                raise VolumeError(
                    f"{volume.source}: {what} only {depth}x{height}x{width} voxels but at least {SMALLEST} are needed "
                    "along each axis; give a larger scan."
                )
            data = step(data)
        plain = torch.as_tensor(data).as_subclass(torch.Tensor)
        return dequantize(quantize(plain))

    def preprocess(self, images: Scan | Sequence[Scan], return_tensors: str | None = "pt") -> BatchFeature:
        """One scan or a list of them to {"pixel_values": (B, 1, D, H, W) float32}.

        A scan is a Volume, a path, or an array that `transform` and perhaps `quantize` made before: (1, D, H, W) or
        (D, H, W) of exactly `size`, uint8 or floating point in 0..1. Raises ValueError for an array of another kind.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors is {return_tensors!r} but PyTorch tensors ('pt') are returned.")
        scans: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
        if not scans:
            raise ValueError("VolumeProcessor got an empty list; give at least one scan.")
        return BatchFeature({"pixel_values": torch.stack([self._one(scan) for scan in scans])})

    def __call__(  # type: ignore[override]
        self, images: Scan | Sequence[Scan], return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, return_tensors)

    def fetch_images(self, images: Any) -> Any:
        """ProcessorMixin calls this to load 2D pictures; scans are read in `preprocess`."""
        return images

    def _one(self, scan: Scan) -> torch.Tensor:
        if isinstance(scan, (str, os.PathLike)):
            scan = read_volume(scan)
        return self.transform(scan) if isinstance(scan, Volume) else self._prepared(torch.as_tensor(scan))

    def _prepared(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor that went through `transform` before: checked, (1, D, H, W) float32."""
        if tuple(values.shape) not in (self.size, (1, *self.size)):
            raise ValueError(
                f"A prepared tensor must be {self.size} or {(1, *self.size)} but is {tuple(values.shape)}; give raw voxels as a Volume."
            )
        if values.dtype == torch.uint8:
            return dequantize(values).reshape(1, *self.size)
        if not values.is_floating_point() or not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"A prepared tensor must be uint8 or floating point within 0..1, not {values.dtype} from "
                f"{values.min():g} to {values.max():g}; give raw voxels as a Volume."
            )
        return values.to(torch.float32).reshape(1, *self.size)

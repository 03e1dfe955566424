"""Preprocess a Volume to the tensor that a model sees; there is no other preprocessing.

A *recipe* is a short list of steps. The first take the Volume, the rest are MONAI transforms on a tensor (1, D, H, W).
A :class:`VolumeProcessor` holds the recipe's name and numbers, is saved beside the weights as preprocessor_config.json,
and is what preparation, training, evaluation, the command line and the app all call.

    m3d, hu_window     0..1: the volume as its own plane is displayed, cropped to what is above the lowest value, resized
    ct_rate, ct_clip   -1..1: a CT in one canonical orientation, resampled to one spacing, cropped or padded about its middle

The first two go by how the volume's own acquisition plane is displayed, by flips and by swapping rows with columns, never
by resampling: questions about plane and side depend on exactly that. An oblique scan goes by its nearest axes, and a
volume without orientation is taken to be displayed that way already.

    axial       D inferior -> superior    rows anterior -> posterior    columns patient's right -> left    "SPL"
    coronal     D anterior -> posterior   rows superior -> inferior     columns patient's right -> left    "PIL"
    sagittal    D right -> left           rows superior -> inferior     columns anterior -> posterior      "LIP"

The other two bring every volume to "SLP", an axial picture with rows and columns swapped. The public code of CT-CLIP and
DCFormer takes the NIfTI axes (x, y, z) as stored, in CT-RATE L, P, S, and feeds the network (z, x, y): so the released
weights saw the patient.

Every recipe ends on a :class:`Grid` of whole numbers, which a prepared store keeps (`quantize`): 8-bit grey values, or HU
in int16. Reading them back (`dequantize`) gives the same bits as the direct way from the scan file, on any device.
"""

import os
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from med3dvlm.geometry.sampling import sample
from med3dvlm.recipes import AIR, BONE, CANONICAL, GREY, RECIPES, SMALLEST, Grid, display, reorientation
from med3dvlm.volume import Volume, VolumeError, read_volume

RESIZE_MODES = ("area", "trilinear")
Scan = Volume | str | os.PathLike[str] | torch.Tensor | NDArray[Any]
SETTINGS = ("recipe", "size", "spacing", "hu_range", "resize", "straighten")


class VolumeKwargs(TypedDict, total=False):
    """The keyword arguments that transformers may pass to VolumeProcessor, from from_pretrained or a ProcessorMixin."""

    recipe: str
    size: Sequence[int] | None
    spacing: Sequence[float] | None
    hu_range: Sequence[float]
    resize: str | None
    straighten: bool
    return_tensors: str | None


class VolumeProcessor(BaseImageProcessor):
    """Turns scans into a model's input.

    - `recipe`: a name in RECIPES. What follows has the recipe's default where it is not given.
    - `size`: (D, H, W) of the result in voxels.
    - `spacing`: (z, y, x) in mm of "ct_rate" and "ct_clip", along the result's D, H and W; the others have none.
    - `hu_range`: the window in HU of all but "m3d", which does not use it; for the CT recipes whole numbers in -1000..1000.
    - `resize`: "area", MONAI's default, averages whatever falls into a new voxel, so that small lesions leave a trace;
      "trilinear" samples between the eight nearest voxels, as the released M3D preparation script and the CT recipes do.
    - `straighten`: first resample tilted or unevenly spaced slices to a regular grid (`Volume.straighten`); the published recipes do not.

        processor = VolumeProcessor("m3d", size=(128, 256, 256))
        processor("scan.nii.gz")["pixel_values"]  # (1, 1, 128, 256, 256) float32 in 0..1
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = VolumeKwargs  # type: ignore[assignment]

    def __init__(
        self,
        recipe: str = "m3d",
        size: Sequence[int] | None = None,
        hu_range: Sequence[float] = (-1000.0, 1000.0),
        resize: str | None = None,
        spacing: Sequence[float] | None = None,
        straighten: bool = False,
        **kwargs: Any,
    ) -> None:
        """Raise ValueError for an unknown recipe or resize mode, for impossible numbers, and for settings that the recipe does not have."""
        # from_pretrained passes on everything in the saved file, such as the class's name.
        if unknown := set(kwargs) - {"image_processor_type", "processor_class", "auto_map"}:
            raise TypeError(f"VolumeProcessor has no setting {sorted(unknown)}; it has {', '.join(SETTINGS)}.")
        super().__init__(**kwargs)
        if recipe not in RECIPES:
            raise ValueError(f"Unknown recipe {recipe!r}; known are {', '.join(RECIPES)}.")
        defaults = RECIPES[recipe]
        size = defaults.size if size is None else size
        resize = defaults.resize if resize is None else resize
        if resize not in RESIZE_MODES:
            raise ValueError(f"Unknown resize {resize!r}; known are {', '.join(RESIZE_MODES)}.")
        if len(size) != 3 or any(int(length) != length or length < 1 for length in size):
            raise ValueError(f"size is {size} but must be three whole numbers (D, H, W), as (128, 256, 256).")
        if len(hu_range) != 2 or not hu_range[0] < hu_range[1]:
            raise ValueError(f"hu_range is {hu_range} but must be (low, high) with low < high, as (-1000, 1000).")
        if defaults.spacing is None and spacing is not None:
            raise ValueError(f"Recipe {recipe!r} has no spacing but {spacing} is given; leave it out, or use recipe 'ct_rate'.")
        if defaults.spacing is not None:
            spacing = defaults.spacing if spacing is None else spacing
            if len(spacing) != 3 or not all(0 < mm < 100 for mm in spacing):
                raise ValueError(f"spacing is {spacing} but must be three positive numbers (z, y, x) in mm, as {defaults.spacing}.")
            if resize != defaults.resize:
                raise ValueError(f"Recipe {recipe!r} resamples {defaults.resize!r} but resize is {resize!r}; leave it out.")
            if not AIR <= hu_range[0] < hu_range[1] <= BONE or any(int(limit) != limit for limit in hu_range):
                raise ValueError(f"Recipe {recipe!r} takes a hu_range of whole numbers within {AIR}..{BONE}, not {hu_range}.")
        self.recipe = recipe
        self.size = tuple(int(length) for length in size)
        self.spacing = None if spacing is None else tuple(float(mm) for mm in spacing)
        self.hu_range = tuple(float(limit) for limit in hu_range)
        self.resize = resize
        self.straighten = bool(straighten)

    @property
    def grid(self) -> Grid:
        """Return the grid of whole numbers on which the recipe ends."""
        if self.spacing is None:
            return GREY
        low, high = (int(limit) for limit in self.hu_range)
        return Grid(low, high, (low + high) / 2, (high - low) / 2, torch.int16)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Return uint8 for grey values, int16 for HU."""
        return self.grid.dtype

    def quantize(self, values: Tensor) -> Tensor:
        """Convert values of `transform` to whole numbers of `stored_dtype`: grey values 0..255, or HU. Raises ValueError for other values."""
        return self.grid.quantize(values)

    def dequantize(self, whole: Tensor) -> Tensor:
        """Convert whole numbers back to float32: k / 255, or for HU k / 1000 (0 in the middle of another `hu_range`, -1 and 1 at its ends)."""
        return self.grid.dequantize(whole)

    def transform(self, volume: Volume) -> torch.Tensor:
        """Apply the recipe to one volume: (1, D, H, W) float32 in 0..1 or -1..1, on the recipe's grid (see the module's text).

        Raises VolumeError when the volume, or its foreground, has fewer than 4 voxels along an axis, and when it lacks the
        Hounsfield units or the spacing that the recipe needs.
        """
        return self._on_grid(self._made(volume))

    def placement(self, volume: Volume) -> NDArray[np.float64]:
        """Return the 4x4 matrix that takes the index (d, h, w, 1) of a voxel of `transform(volume)` to the index (D, H, W, 1) in
        `volume.array`, whole numbers being the middles of voxels.

        No recipe rotates, so each row and column of its 3x3 part has one number other than 0. A voxel that is padding lies outside.
        Raises VolumeError as `transform` does, and for a volume that the processor straightens first.
        """
        return self.transform_and_placement(volume)[1]

    def transform_and_placement(self, volume: Volume) -> tuple[Tensor, NDArray[np.float64]]:
        """Return what `transform` and `placement` return, at the cost of one."""
        from nibabel.orientations import inv_ornt_aff

        if self.straighten and not volume.regular:
            raise VolumeError(f"{volume.source}: the processor straightens this scan first; give what volume.straighten() returns.")
        made = self._made(volume)
        wanted = display(volume) if self.spacing is None else CANONICAL
        # MONAI's transforms keep account of what they crop, pad and resize.
        placed: NDArray[np.float64] = inv_ornt_aff(reorientation(volume, wanted), volume.shape) @ made.affine.numpy()
        return self._on_grid(made), placed

    def transform_mask(self, mask: NDArray[np.bool_], placement: NDArray[np.float64]) -> Tensor:
        """Resample a mask to the grid of `transform`: each voxel takes the value of the scan's nearest voxel, padding is empty.

        Args:
            mask: (D, H, W) of the scan's own shape.
            placement: what `placement` returns for the scan.

        Returns:
            (D, H, W) of the processor's `size`, bool.
        """
        leading = np.abs(placement[:3, :3]).argmax(axis=0)  # the scan's axis along which each axis of the grid leads
        result = mask.transpose(leading)
        for axis, of_scan in enumerate(leading):
            # Halfway between two voxels, as every second one is where a scan is halved, the next counts.
            along = placement[of_scan, axis] * np.arange(self.size[axis]) + placement[of_scan, 3] + 1e-4
            nearest = np.floor(along + 0.5).astype(int)
            inside = (nearest >= 0) & (nearest < mask.shape[of_scan])
            result = result.take(nearest.clip(0, mask.shape[of_scan] - 1), axis)
            result &= np.expand_dims(inside, tuple({0, 1, 2} - {axis}))
        return torch.from_numpy(np.ascontiguousarray(result))

    def to_scan(self, values: Tensor | NDArray[Any], volume: Volume, placement: NDArray[np.float64] | None = None) -> Tensor:
        """Resample values from the grid of `transform(volume)` to the scan's own grid: the inverse of what `transform` does.

        Real numbers, such as scores, are linear between voxels; whole numbers and booleans, such as masks, are those of the nearest voxel.
        What `transform` crops away is 0. A scan that the processor straightens comes back as its slices lie in `volume.array`.

        Args:
            values: (..., D, H, W) of the processor's `size`.
            volume: the scan that `transform` was given.
            placement: what `placement` returns for it, straightened where the processor straightens; it is computed where not given.

        Returns:
            (..., D, H, W) of the scan's own shape, of the type of the values and on their device.

        Raises:
            ValueError: the values are of another size; VolumeError as `transform` raises it.
        """
        values = torch.as_tensor(values)
        if tuple(values.shape[-3:]) != self.size:
            raise ValueError(f"The values are {tuple(values.shape)} but must end on (D, H, W) = {self.size}, the processor's size.")
        straightens = self.straighten and not volume.regular
        matrices = volume.straightening().matrices() if straightens else np.eye(4)
        if placement is None:
            placement = self.placement(volume.straighten() if straightens else volume)
        back = np.linalg.inv(placement) @ matrices
        return sample(values, volume.shape, np.broadcast_to(back, (volume.shape[0], 4, 4)))

    def _on_grid(self, made: Any) -> Tensor:
        return self.dequantize(self.quantize(made.as_subclass(torch.Tensor)))

    def _made(self, volume: Volume) -> Any:
        """Return the volume after the recipe's steps, before it is on the grid: a MONAI MetaTensor (1, D, H, W)."""
        data: Any = volume.straighten() if self.straighten else volume
        for step in RECIPES[self.recipe].steps(self):
            depth, height, width = data.shape[-3:]
            if min(depth, height, width) < SMALLEST:
                what = "the volume has" if isinstance(data, Volume) else "its foreground has"
                few = f"only {depth}x{height}x{width} voxels but at least {SMALLEST} are needed along each axis"
                raise VolumeError(f"{volume.source}: {what} {few}; give a larger scan.")
            data = step(data)
        return data

    def preprocess(self, images: Scan | Sequence[Scan], return_tensors: str | None = "pt") -> BatchFeature:
        """Convert one scan or a list of them to {"pixel_values": (B, 1, D, H, W) float32}.

        A scan is a Volume, a path, or an array that `transform` and perhaps `quantize` made before: (1, D, H, W) or (D, H, W)
        of exactly `size`, of `stored_dtype` or floating point in the recipe's range. Raises ValueError for another array.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors is {return_tensors!r} but PyTorch tensors ('pt') are returned.")
        scans: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
        if not scans:
            raise ValueError("VolumeProcessor got an empty list; give at least one scan.")
        return BatchFeature({"pixel_values": torch.stack([self._one(scan) for scan in scans])})

    def __call__(self, images: Scan | Sequence[Scan], return_tensors: str | None = "pt") -> BatchFeature:  # type: ignore[override]
        """The same as `preprocess`."""
        return self.preprocess(images, return_tensors)

    def fetch_images(self, images: Any) -> Any:
        """Return the scans unchanged: ProcessorMixin calls this to load 2D pictures, but `preprocess` reads scans."""
        return images

    def _one(self, scan: Scan) -> torch.Tensor:
        if isinstance(scan, (str, os.PathLike)):
            scan = read_volume(scan)
        return self.transform(scan) if isinstance(scan, Volume) else self._prepared(torch.as_tensor(scan))

    def _prepared(self, values: torch.Tensor) -> torch.Tensor:
        """Check a tensor that `transform` made before, and return it as (1, D, H, W) float32."""
        if tuple(values.shape) not in (self.size, (1, *self.size)):
            raise ValueError(
                f"A prepared tensor must be {self.size} or {(1, *self.size)} but is {tuple(values.shape)}; give raw voxels as a Volume."
            )
        grid = self.grid
        stored = values.dtype == grid.dtype
        low, high = (grid.low, grid.high) if stored else grid.values
        if not (stored or values.is_floating_point()) or not (values.min() >= low and values.max() <= high):
            bounds = "{:g}..{:g}".format(*grid.values)
            raise ValueError(
                f"A prepared tensor must be {str(grid.dtype)[6:]} or floating point within {bounds}, not {values.dtype} from "
                f"{values.min():g} to {values.max():g}; give raw voxels as a Volume."
            )
        return (grid.dequantize(values) if stored else values.to(torch.float32)).reshape(1, *self.size)

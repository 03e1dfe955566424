"""Read masks of findings and structures from the files of data sets, resample them to their scan's grid, and pack them.

    a scan format      one mask, or one of several labels (`Mask.value`), on the scan's grid or on one of its own
    four axes          one of several masks (`Mask.channel`), the channels first or last as nibabel counts the axes, on the scan's grid
    a sparse .npz      as M3D-Seg has them: a SciPy matrix with a row for each mask, named by its shape: mask_(3, 512, 512, 96).npz, whose
                       axes after the first are x, y, z

A mask on another grid, of another orientation or spacing, is resampled to the scan's by the affines of both: each voxel of the scan gets
what the mask's nearest voxel has.

Shapes: D, H, W voxels of the scan; D', H', W' of the mask's own grid.
"""

import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from med3dvlm import formats
from med3dvlm.formats.base import MAX_VOXELS, damaged
from med3dvlm.geometry import is_geometry
from med3dvlm.geometry.measurements import bounding_box
from med3dvlm.geometry.sampling import sample
from med3dvlm.records import Mask
from med3dvlm.volume import Volume, VolumeError

SAME_GRID = 0.1  # voxels by which corners may differ, from rounding in headers
SHAPE = re.compile(r"\((\d+(?:, *\d+){3})\)\.npz$")
SPARSE = {"indices", "indptr", "data", "shape", "format"}  # what scipy.sparse.save_npz writes
SHOWN = 5


class Labels(NamedTuple):
    """The content of a mask's file: whole numbers (D', H', W'), or with channels (K, D', H', W'), and their affine.

    `affine` takes the index (d, h, w, 1) of a voxel to its place in RAS mm; None where the file does not say.
    """

    array: Any  # an array, or a sparse matrix with a row for each channel
    shape: tuple[int, int, int]
    channels: int | None = None
    affine: NDArray[np.float64] | None = None


def read_masks(
    root: Path, masks: Mapping[str, Mask], volume: Volume, transpose: bool = False
) -> Iterator[tuple[str, NDArray[np.bool_], list[str]]]:
    """Yield each mask's name, its voxels (D, H, W) on the scan's grid, and sentences about what was assumed. A file is opened once.

    Args:
        transpose: of an array, as of the scan (see `read_volume`).

    Raises:
        VolumeError: a file is missing, damaged or without labels, has no such channel, or cannot be placed on the scan.
    """
    for file in dict.fromkeys(mask.file for mask in masks.values()):
        labels = _read(root / file, volume, transpose)
        for name, mask in masks.items():
            if mask.file == file:
                where = f"{root / file}, the mask of {name!r}"
                voxels, doubts = _on_scan(_chosen(labels, mask, where), labels.affine, volume, where)
                yield name, voxels, doubts


def _read(path: Path, volume: Volume, transpose: bool) -> Labels:
    if not path.exists():
        raise VolumeError(f"{path}, a mask of {volume.source}, is missing; restore it, or take it out of the data set's table.")
    if found := _sparse(path):
        return found
    parts = formats.read(path, str(path))
    array = parts.array.T if transpose and parts.axes is None and parts.direction is None else parts.array
    if array.dtype.kind not in "biuf":
        raise VolumeError(f"{path}: values are of type {array.dtype} but a mask holds whole numbers; save it so.")
    if array.dtype.kind == "f":
        # NaN is not a whole number either
        if not (array == np.rint(array)).all():
            raise VolumeError(f"{path}: a mask holds whole numbers, one for each label, but these are not whole; save labels, not scores.")
    if array.ndim == 4:
        # nibabel's axes reversed: what it has first is last here
        if array.shape[:3] == volume.shape:
            array = np.moveaxis(array, -1, 0)
        if array.shape[1:] != volume.shape:
            stored, wanted = ("x".join(map(str, shape)) for shape in (parts.array.shape, volume.shape))
            raise VolumeError(f"{path}: several masks in one file must be on the grid of their scan, {wanted}, but the file is {stored}.")
        return Labels(array, volume.shape, len(array))
    if array.ndim != 3:
        raise VolumeError(f"{path}: a mask has three axes, or four for several masks, but this has {array.ndim}.")
    return Labels(array, array.shape, affine=_affine(parts))


def _affine(parts: formats.Parts) -> NDArray[np.float64] | None:
    if parts.axes is None or parts.origin is None or not np.isfinite(parts.origin).all():
        return None
    columns = np.asarray(parts.axes, dtype=np.float64)[:, ::-1]
    if not is_geometry(columns):
        return None
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = columns, parts.origin
    return matrix


def _sparse(path: Path) -> Labels | None:
    """Read a SciPy matrix with a row for each mask; None for any other file."""
    from scipy.sparse import load_npz

    if not path.name.endswith(".npz"):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if not {f"{name}.npy" for name in SPARSE} <= set(archive.namelist()):
                return None
        matrix = load_npz(path).tocsr()
        matrix.check_format(full_check=True)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(str(path), "a sparse matrix of masks (.npz)") from error
    named = SHAPE.search(path.name)
    sizes = [int(length) for length in named[1].split(",")] if named else []
    if len(sizes) != 4 or math.prod(sizes[1:]) > MAX_VOXELS or matrix.shape != (sizes[0], math.prod(sizes[1:])):
        raise VolumeError(
            f"{path}: the name must end on the shape of the masks in it, as in mask_(3, 512, 512, 96).npz, of {matrix.shape[0]} masks "
            f"of {matrix.shape[1]} voxels; rename it."
        )
    if not np.isin(matrix.data, (0, 1)).all():
        raise VolumeError(f"{path}: masks in a sparse matrix hold 0 and 1 alone, but this has other values.")
    return Labels(matrix, (sizes[3], sizes[2], sizes[1]), sizes[0])


def _chosen(labels: Labels, mask: Mask, where: str) -> NDArray[np.bool_]:
    """Return one mask (D', H', W')."""
    array = labels.array
    if labels.channels is None:
        if mask.channel:
            raise VolumeError(f"{where}: channel {mask.channel} is named but the file holds one mask; leave the channel out.")
    else:
        if mask.channel is None or mask.channel >= labels.channels:
            raise VolumeError(
                f"{where}: the file holds {labels.channels} masks, channels 0 to {labels.channels - 1}, but {mask.channel} is named; name one."
            )
        if not isinstance(array, np.ndarray):
            row = array[[mask.channel]].tocoo()
            flat = np.zeros(math.prod(labels.shape), bool)
            flat[row.col[row.data != 0]] = True
            return flat.reshape(labels.shape[::-1]).transpose(2, 1, 0)
        array = array[mask.channel]
    if mask.value is not None:
        return array == mask.value
    found = np.unique(array)
    if len(found[found != 0]) > 1:
        shown = ", ".join(f"{value:g}" for value in found[: SHOWN + 1])
        raise VolumeError(
            f"{where}: the file holds several labels ({shown}{', ...' if len(found) > SHOWN + 1 else ''}); name one, as file#label."
        )
    return array != 0


def _on_scan(
    mask: NDArray[np.bool_], affine: NDArray[np.float64] | None, volume: Volume, where: str
) -> tuple[NDArray[np.bool_], list[str]]:
    """Return the mask (D, H, W) on the scan's grid, and what was assumed."""
    scan = None if volume.origin is None else volume.affine
    equal = mask.shape == volume.shape
    if affine is None or scan is None:
        if not equal:
            unplaced = "the scan" if scan is None else "the mask"
            sizes = " and ".join("x".join(map(str, shape)) for shape in (mask.shape, volume.shape))
            raise VolumeError(
                f"{where}: mask and scan have {sizes} voxels and {unplaced} has no geometry; save the mask on the scan's grid."
            )
        return mask, []
    corners = np.array([(*corner, 1.0) for corner in np.ndindex(2, 2, 2)]) * (*(np.array(volume.shape) - 1), 1)
    to_mask = np.linalg.inv(affine) @ scan
    if equal and np.abs(corners @ (to_mask - np.eye(4)).T).max() < SAME_GRID:
        return mask, []
    if equal and np.array_equal(np.abs(affine[:3, :3]), np.eye(3)[:, ::-1]) and not affine[:3, 3].any():
        return mask, [
            "the geometry of a mask is the 1 mm identity, which programs write when they know none; its voxels count as the scan's."
        ]
    matrices = np.broadcast_to(to_mask, (volume.shape[0], 4, 4))

    def resampled(values: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return sample(torch.from_numpy(values.astype(np.uint8)), volume.shape, matrices).numpy().astype(bool)

    result = resampled(mask)
    if not result.any() and not resampled(np.ones_like(mask)).any():
        raise VolumeError(f"{where}: mask and scan do not overlap in the patient; give the mask of this scan.")
    return result, []


class Packed(NamedTuple):
    """A stored mask: the number of its voxels, its bounding box, and the box's bits, compressed."""

    voxels: int
    box: list[list[int]]  # first and one after the last, along D, H, W
    content: bytes


def pack(mask: Tensor) -> Packed:
    """Compress a mask (D, H, W)."""
    array = mask.numpy()
    found = bounding_box(array)
    box = [[0, 0]] * 3 if found is None else [list(ends) for ends in zip(*found, strict=True)]
    inside = array[tuple(slice(*ends) for ends in box)]
    return Packed(int(inside.sum()), box, zlib.compress(np.packbits(inside).tobytes()))


def unpack(content: bytes, box: Sequence[Sequence[int]], into: NDArray[np.bool_]) -> None:
    """Write the mask that `pack` compressed into an array (D, H, W) of False."""
    shape = [last - first for first, last in box]
    bits = np.unpackbits(np.frombuffer(zlib.decompress(content), np.uint8), count=math.prod(shape))
    into[tuple(slice(*ends) for ends in box)] = bits.reshape(shape)

"""The return type and the error of all format readers."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_VOXELS = 2**31  # 1024 slices of 1448 x 1448; a header that claims more is damaged or hostile
MAX_BYTES = 4 * MAX_VOXELS  # as the file stores them
DEFLATE = 1032  # no file that zlib packed grows more than so many times


class VolumeError(ValueError):
    """A scan that cannot be used; the message is one sentence: what, where, and what to do."""


class AmbiguousSeriesError(VolumeError):
    """None of a study's series is the scan beyond doubt. `series` lists them as `Parts.series` does."""

    def __init__(self, message: str, series: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.series = series


class Parts(NamedTuple):
    """The result of a reader: array (D, H, W) of any type; the rest is None or empty where the file does not say.

    - `array`: the values that the file's own slope and intercept define, applied once.
    - `axes` is 3x3: its columns lead, in RAS mm, from one voxel to the next along x, y, z (W, H, D), as in an affine.
    - `spacing`: (z, y, x) in mm, for a file that states it without axes.
    - `direction`: as `axes` but of length 1, for a file that states where the axes lead and not the spacing.
    - `slice_positions`: (D,), the slices' heights in mm along their normal, in order, where their distances differ; else None.
    - `modality`: DICOM's, such as "CT"; "unknown" where DICOM leaves it out, None in a format that names none.
    - `warnings`: sentences about what was assumed or left out, without the path, ending in a full stop.
    - `rescale`: the (slope, intercept) that the header stated and that is in `array`; None for none and for (1, 0),
      NaN where they differ from slice to slice.
    - `hu`: the header itself says that `array` is in Hounsfield units.
    - `quantity`: what the header itself says that `array` holds where that is no HU, such as "Z_EFF"; None where it says nothing.
    - `origin`: (3,) where the middle of the first voxel lies, in RAS mm.
    - `window`: the lowest and the highest value that the header wants shown.
    - `series`: for DICOM, a line of words for each series found, first the one read. A line begins with the number by
      which `series=` picks it (1 for the likeliest): "2: 40 slices of 512 x 512, CT". `read_volume` warns of several.
    """

    array: NDArray[Any]
    axes: NDArray[np.float64] | None = None
    spacing: tuple[float, ...] | None = None
    modality: str | None = None
    warnings: tuple[str, ...] = ()
    rescale: tuple[float, float] | None = None
    hu: bool = False
    quantity: str | None = None
    series: tuple[str, ...] = ()
    direction: NDArray[np.float64] | None = None
    slice_positions: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None
    origin: NDArray[np.float64] | None = None


def damaged(source: str, kind: str) -> VolumeError:
    """Return the error for a file whose content does not fit its name."""
    reason = "it is damaged, cut short or something else under this name"
    return VolumeError(f"{source}: this cannot be read as {kind}; {reason}, so copy or export it again.")


def colour(source: str) -> VolumeError:
    """Return the error for several values a voxel."""
    return VolumeError(f"{source}: this is a colour image (several values a voxel); export it in grey.")


def check_size(shape: Sequence[int], voxel_bytes: int, file_bytes: int, source: str, kind: str) -> None:
    """Check, before memory is allocated, that `file_bytes`, packed or not, can hold so many voxels and that the number is a scan's.

    Raises:
        VolumeError: it could not, or the scan is larger than 2^31 voxels or 2^33 bytes.
    """
    voxels = math.prod(int(length) for length in shape)
    if voxels * voxel_bytes > DEFLATE * file_bytes:
        raise damaged(source, kind)
    if voxels > MAX_VOXELS or voxels * voxel_bytes > MAX_BYTES:
        size, limits = "x".join(str(length) for length in shape), f"{MAX_VOXELS} voxels or {MAX_BYTES // 2**30} GiB"
        raise VolumeError(
            f"{source}: {size} voxels of {voxel_bytes} bytes are more than the {limits} that are read; crop or resample the scan."
        )


def smallest_exact_type(array: NDArray[Any], source: str) -> NDArray[np.int16] | NDArray[np.float32]:
    """Convert to int16 where that loses nothing, else float32; contiguous, and writable where the array is a view of a file's bytes."""
    if array.dtype.fields is not None:
        raise colour(source)
    if array.dtype.kind not in "iufb":
        raise VolumeError(f"{source}: values are of type {array.dtype} but real numbers are needed; convert them.")
    if array.size and array.min() >= -32768 and array.max() <= 32767:
        if array.dtype.kind != "f" or (array == np.rint(array)).all():
            return np.require(array, np.int16, ["C", "W"])
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which Volume refuses
        return np.require(array, np.float32, ["C", "W"])

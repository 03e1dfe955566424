"""Small scans on disk for the tests of the readers."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from med3dvlm.volume import VolumeError, read_volume

SHAPE = (10, 20, 30)  # D, H, W: all different, so that swapped axes fail
MARKER = (2, 5, 9)


def scan(dtype: type = np.int16) -> np.ndarray:
    """Return soft tissue in air with a marker voxel, in HU."""
    array = np.full(SHAPE, -1000, dtype=dtype)
    array[2:8, 4:16, 5:25] = 40
    array[MARKER] = 900
    return array


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write an array (D, H, W) as NIfTI, whose axes are x, y, z = W, H, D."""
    affine = np.diag([0.7, 0.8, 2.5, 1.0]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(array.transpose(), affine), path)
    return path


def refused(path: Path, match: str, **options: object) -> None:
    """Assert that read_volume raises VolumeError with one sentence that begins with the path."""
    with pytest.raises(VolumeError, match=match) as caught:
        read_volume(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message


def outcome(path: str) -> tuple[str, np.ndarray | None]:
    """Return ("volume", array), ("refused", None), or a description of the error; runs in a separate process."""
    try:
        return "volume", read_volume(path).array
    except VolumeError as error:
        message = str(error)
        good = message.startswith(path) and message.endswith(".") and "\n" not in message and len(message) < len(path) + 400
        return ("refused" if good else f"no sentence: {message}"), None
    except BaseException as error:  # the test fails on it, with the bytes that led to it
        return f"{type(error).__name__}: {error}", None

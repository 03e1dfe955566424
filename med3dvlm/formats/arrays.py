"""NumPy's .npy and .npz: bare arrays (D, H, W), or (1, D, H, W) as M3D stores them. Nothing is unpickled."""

import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.archive import MAX_ENTRIES, Bounded, too_many
from med3dvlm.formats.base import Parts, VolumeError, check_size, damaged

SPACING = "spacing"  # the name in an .npz file of three numbers (z, y, x) in mm
UNREADABLE = (ValueError, EOFError, OSError, SyntaxError, tokenize.TokenError)


def read_npy(path: Path, source: str) -> Parts:
    """Read one array without geometry.

    Raises:
        VolumeError: the file is damaged or holds Python objects.
    """
    try:
        with path.open("rb") as file:
            _described(file, source, "a NumPy array")
        # Mapped first, as that compares the size in the header with the file's.
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except VolumeError:
        raise
    except UNREADABLE as error:
        raise damaged(source, "a NumPy array") from error
    return Parts(_without_channel(np.array(mapped)))


def read_npz(path: Path, source: str) -> Parts:
    """Read one array under any name and, where the file has it, "spacing".

    Raises:
        VolumeError: the file is damaged, holds Python objects, none or several arrays, or a spacing of another form.
    """
    try:
        with Bounded(path, source) as file, zipfile.ZipFile(file) as archive:
            if len(archive.namelist()) > MAX_ENTRIES:
                raise too_many(source)
            members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
            scans = [name for name in members if name != SPACING]
            if len(scans) != 1:
                held = f"{len(scans)} arrays" if scans else "no array"  # their names may be a patient's
                raise VolumeError(
                    f"{source}: the file holds {held} but one scan is needed, and 'spacing' at most beside it; save it by itself."
                )
            array = _member(archive, members[scans[0]], source)
            spacing = _member(archive, members[SPACING], source) if SPACING in members else None
    except VolumeError:
        raise
    except RuntimeError as error:
        raise VolumeError(f"{source}: the archive is encrypted or packed in a rare way; save the arrays again by numpy.savez.") from error
    except (*UNREADABLE, zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise damaged(source, "NumPy arrays (.npz)") from error
    if spacing is None:
        return Parts(_without_channel(array))
    if spacing.shape != (3,) or spacing.dtype.kind not in "iuf" or not (np.isfinite(spacing) & (spacing > 0)).all():
        raise VolumeError(f"{source}: its 'spacing' must be three positive numbers (z, y, x) in mm; save it so or leave it out.")
    return Parts(_without_channel(array), spacing=tuple(float(mm) for mm in spacing))


def _member(archive: zipfile.ZipFile, name: str, source: str) -> NDArray[Any]:
    """Read one array of the archive after comparing its announced size with the member's."""
    member = archive.getinfo(name)
    with archive.open(member) as file:
        shape, dtype = _described(file, source, "NumPy arrays (.npz)")
    check_size(shape, dtype.itemsize, member.compress_size + 1, source, "NumPy arrays (.npz)")
    with archive.open(member) as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _described(file: IO[bytes], source: str, kind: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array by its header.

    Raises:
        VolumeError: it holds Python objects, which loading might run.
    """
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise VolumeError(f"{source}: this cannot be read as {kind}: it holds Python objects, which are not loaded; save numbers alone.")
    return shape, dtype


def _without_channel(array: NDArray[Any]) -> NDArray[Any]:
    return array[0] if array.ndim == 4 and array.shape[0] == 1 else array

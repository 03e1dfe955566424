"""Scan files, one module a family of formats. `read` finds the reader; `read_volume` makes a checked Volume of what it returns."""

from collections.abc import Callable
from pathlib import Path

from med3dvlm.formats import archive, arrays, dicom, folders, metaimage, nifti, nrrd
from med3dvlm.formats.base import Parts, VolumeError
from med3dvlm.formats.hu import HU_POLICIES
from med3dvlm.formats.sources import scan_files, state_of

__all__ = ["HU_POLICIES", "READERS", "VERSION", "Parts", "VolumeError", "read", "scan_files", "state_of"]

VERSION = 2  # raised when a file is read otherwise than before: prepared volumes are then made anew

WITH_SERIES: dict[str, Callable[[Path, str, int | None], Parts]] = {
    ".dcm": dicom.read,
    ".zip": archive.read,
}
READERS: dict[str, Callable[..., Parts]] = {
    ".nii": nifti.read,
    ".nii.gz": nifti.read,
    ".nrrd": nrrd.read,
    ".nhdr": nrrd.read,
    ".mha": metaimage.read,
    ".mhd": metaimage.read,
    ".npy": arrays.read_npy,
    ".npz": arrays.read_npz,
    **WITH_SERIES,
}


def read(path: Path, source: str, series: int | None = None) -> Parts:
    """What a scan file or folder holds: a file by its ending in `READERS` or as DICOM, a folder or an archive by its content.

    `source` names the path in messages. `series` picks one of several DICOM series, from 1; None is the likeliest.

    Raises:
        VolumeError: the format is unknown, or the reader finds no scan.
    """
    if path.is_dir():
        return folders.read(path, source, series)
    ending = next((ending for ending in READERS if path.name.lower().endswith(ending)), None)
    if path.stat().st_size == 0:
        raise VolumeError(f"{source}: the file is empty (0 bytes); copy or download it again.")
    if ending is None and dicom.is_dicom(path):
        ending = ".dcm"  # a scanner's files often have none
    if ending is None:
        known = f"{', '.join(READERS)}, a folder that holds one DICOM series or a folder of numbered PNG or JPEG slices"
        raise VolumeError(f"{source}: the ending {path.suffix!r} is not a known scan format; use {known}.")
    if ending in WITH_SERIES:
        return WITH_SERIES[ending](path, source, series)
    folders.no_series(series, source)
    return READERS[ending](path, source)

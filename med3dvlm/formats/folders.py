"""Read a folder by its content: DICOM files, else numbered pictures."""

from pathlib import Path

from med3dvlm.formats import dicom, pictures
from med3dvlm.formats.base import Parts, VolumeError
from med3dvlm.formats.dicom_header import dicom_files


def read(folder: Path, source: str, series: int | None = None) -> Parts:
    """Read the DICOM series (the likeliest, or number `series`) in a folder and its subfolders, or the pictures in it.

    Raises:
        VolumeError: there is neither, or what there is, is no single sound scan.
    """
    found = pictures.pictures(folder)
    if found and not dicom_files(folder, source):  # beside or above DICOM, a picture is a preview
        no_series(series, source)
        return pictures.read(folder, source)
    return dicom.read(folder, source, series)


def no_series(series: int | None, source: str) -> None:
    """Raise VolumeError where a DICOM series was picked but there are none."""
    if series is not None:
        raise VolumeError(f"{source}: this is not DICOM, so there are no series to pick from; leave series={series} out.")

"""Two stacks of DICOM slices in one folder, which differ by stated header values."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from med3dvlm.formats import dicom
from tests.formats.dicom_files import AFFINE, read, same_as_nifti, scan, write_series

SERIES = {"SeriesInstanceUID": "1.2.3", "StudyInstanceUID": "1.2.4", "FrameOfReferenceUID": "1.2.5"}


VENOUS = scan() + 100


def shifted(millimetres: float) -> np.ndarray:
    """Return AFFINE with the scan moved up."""
    affine = AFFINE.copy()
    affine[2, 3] += millimetres
    return affine


def stated(**values: object) -> Callable[[Dataset, int], None]:
    """Return an edit that writes these values into the slices of one series; a function is called with the number of each slice."""

    def edit(item: Dataset, index: int) -> None:
        item.InstanceNumber = index + 1
        item.update(SERIES | {name: value(index) if callable(value) else value for name, value in values.items()})

    return edit


def two(folder: Path, one: dict[str, object], other: dict[str, object], *, offset: float = 0) -> Path:
    """Write two stacks of one series, the second with other values (HU + 100) and moved up by `offset` mm."""
    write_series(folder, scan(), prefix="A", edit=stated(**one))
    return write_series(folder, VENOUS, shifted(offset), prefix="B", edit=stated(**other))


def read_both(folder: Path, tmp_path: Path, *, offset: float = 0) -> list[str]:
    """Assert that each stack of `two` reads as it was written, and return their lines in the list of series."""
    lines = []
    for number, values, affine in ((1, scan(), AFFINE), (2, VENOUS, shifted(offset))):
        parts = read(folder, series=number)
        same_as_nifti(parts, values, affine, tmp_path)
        lines.append(parts.series[0].split("CT, ")[1])
        files = [each.path for each in dicom.stack_of(folder, "scan", number)]
        assert {pydicom.dcmread(file).pixel_array.max() for file in files} == {each.max() + 1024 for each in values}
        assert len(files) == 10 and len({file.name[0] for file in files}) == 1
    return lines

"""DICOM: one file or a folder of them, in any of the compressions that scanners and archives use.

dicom_header.py finds the files and reads their headers, whose elements dicom_elements.py converts; dicom_slices.py says what they mean,
dicom_quantity.py what the numbers are, dicom_attributes.py by what else slices differ; dicom_stacks.py finds which slices make one
stack, dicom_choice.py which stack is the scan, dicom_geometry.py where it lies;
dicom_pixels.py and codestreams.py get at the stored numbers of a file, dicom_values.py at those of the scan.

What would give a wrong volume is refused (several images at one place, mixed orientations, damaged slices); what a reader of the scan
has to know is a warning (missing slices, gantry tilt, padding); and what is no scan (scouts, secondary captures, colour pictures,
segmentations, radiotherapy objects) is left out and counted.
"""

import math
import warnings as python_warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from med3dvlm.formats.base import Parts
from med3dvlm.formats.dicom_choice import Series, choose, listing
from med3dvlm.formats.dicom_geometry import geometry_of
from med3dvlm.formats.dicom_header import is_dicom, read_headers
from med3dvlm.formats.dicom_slices import Stack
from med3dvlm.formats.dicom_values import decoded, rescaled, rescales_of

__all__ = ["Series", "is_dicom", "read", "series_in", "stack_of", "study_of"]


def read(path: Path, source: str, series: int | None = None) -> Parts:
    """Read the scan in a DICOM file, or in a folder and its subfolders: the likeliest stack, or number `series` of `Parts.series`.

    Slices run along the normal (row x column direction), rows and columns as stored. Slope and intercept of each slice are applied
    once; values are int16 where slopes and intercepts are whole and none lies beyond it, else float32. MONOCHROME1 concerns the display and changes
    none. Padding that lies beyond the image's own values is set to the lowest of these.

    Raises:
        VolumeError: there is no single sound stack of slices; the message says what there is instead.
    """
    with python_warnings.catch_warnings():  # pydicom's quote values, which may tell who the patient is
        python_warnings.simplefilter("ignore")
        slices, warnings = read_headers(path, source)
        stack, lines, more = choose(slices, series, source)
        warnings += more
        stack, geometry = geometry_of(stack, warnings)
        stored = decoded(stack, source, warnings)
    rescales = rescales_of(stored, stack, source, warnings)
    array = rescaled(stored, stack, rescales, warnings)
    warnings += sorted({note for each in stack for note in (*each.notes, *each.quantity.notes)})
    first, quantities = stack[0], [each.quantity for each in stack]
    rescale = None if rescales[0] == (1, 0) else rescales[0]
    if len(set(rescales)) > 1:
        rescale = (math.nan, math.nan)
    hu = all(each.hu for each in quantities if each.rescale or each.table) and any(each.hu for each in quantities)
    other = next((each.other for each in quantities if each.other), None)
    window = stack[len(stack) // 2].window
    meaning: dict[str, Any] = {"rescale": rescale, "hu": hu, "quantity": other, "window": window}
    return Parts(array, modality=first.modality, warnings=tuple(warnings), series=lines, **meaning, **geometry)


def stack_of(path: Path, source: str, series: int | None = None) -> Stack:
    """Return the slices of the scan that `read` returns for the same arguments, in the same order.

    Raises:
        VolumeError: as `read`, where headers are damaged or hold no stack of slices.
    """
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        return geometry_of(choose(read_headers(path, source)[0], series, source).stack, [])[0]


def series_in(path: Path, source: str) -> list[Series]:
    """Describe each series that `read` may be told to read, from the headers alone, the likeliest first.

    Raises:
        VolumeError: as `read`, where headers are damaged or hold no stack of slices.
    """
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        return listing(read_headers(path, source)[0], source)


def study_of(files: Iterable[Path]) -> str:
    """Return the StudyInstanceUID (to be compared only) of the first of some files that states one; "" for none."""
    from pydicom import dcmread

    for file in files:
        if file.is_file() and is_dicom(file):
            with python_warnings.catch_warnings(), suppress(Exception):  # whatever is wrong with it is told when the scan is read
                python_warnings.simplefilter("ignore")
                if uid := dcmread(file, force=True, stop_before_pixels=True, specific_tags=["StudyInstanceUID"]).get("StudyInstanceUID"):
                    return str(uid)
    return ""

"""NRRD and MetaImage (.mha, .mhd), through SimpleITK."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.base import Parts, VolumeError, check_size, colour, damaged

# What may follow ElementDataFile in a header. Of names only those in the same folder; LIST and % would stand for several files.
HARMLESS_PLACES = {".mha": b"(?i:LOCAL)", ".mhd": rb"(?![ \t]|(?i:LIST))[^/\\:%\0\r\n]+"}

# The spaces of a NRRD header that lead through a patient; in others, such as a scanner's, nobody knows where left is.
ANATOMICAL = rb"(?im)^space:\s*(?:(?:right-anterior|left-anterior|left-posterior)-superior(?:-time)?|(?:RAS|LAS|LPS)T?)\s*$"
MILLIMETRES = {b"mm": 1.0, b"millimeter": 1.0, b"millimeters": 1.0, b"cm": 10.0, b"m": 1000.0, b"um": 0.001}


def read(path: Path, source: str) -> Parts:
    """A .nrrd, .mha or .mhd file, whose voxels are in it (.mhd: or in a file beside it).

    Raises:
        VolumeError: the file is damaged, in colour, or its header names another place for the voxels.
    """
    import SimpleITK as sitk

    ending = path.suffix.lower()
    header = _checked_header(path, ending, source)
    if ending != ".nrrd" and not _has_sizes(header):
        raise damaged(source, ending[1:].upper())
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if ending == ".nrrd" else "MetaImageIO")  # else ITK tries every format that it knows
    try:
        reader.ReadImageInformation()
        file_bytes = (_voxel_file(path, header) if ending == ".mhd" else path).stat().st_size
        check_size(reader.GetSize(), reader.GetNumberOfComponents(), file_bytes, source, ending[1:].upper())
        image = reader.Execute()
    except (RuntimeError, OSError) as error:
        raise damaged(source, ending[1:].upper()) from error
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise colour(source)
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    array = sitk.GetArrayFromImage(image)
    if image.GetDimension() != 3:
        return Parts(array)  # Volume says what is wrong

    scale = _millimetres(header, source) if ending == ".nrrd" else 1.0
    spacing = tuple(scale * length for length in reversed(image.GetSpacing()))
    if b"space directions:" in header and not re.search(ANATOMICAL, header):
        return Parts(array, None, spacing, warnings=("the header does not name the space that its directions lead in.",))
    # SimpleITK does not tell a stated orientation from an assumed one.
    if any(word in header for word in (b"space directions:", b"TransformMatrix", b"\nRotation", b"\nOrientation")):
        return Parts(array, scale * axes_from_itk(image))
    has_spacing = b"spacings:" in header or b"ElementS" in header  # ElementSpacing or ElementSize
    return Parts(array, None, spacing if has_spacing else None)


def _millimetres(header: bytes, source: str) -> float:
    """The length of a NRRD header's unit."""
    stated = re.search(rb"(?im)^(?:space )?units:(.*)$", header)
    units = set(re.findall(rb'"(.+?)"', stated[1])) if stated else set()
    if not units:
        return 1.0
    if len(units) > 1 or not units <= MILLIMETRES.keys():
        raise VolumeError(f"{source}: lengths are in other units than mm, cm, m or um, or in several; save the scan in mm.")
    return MILLIMETRES[units.pop()]


def axes_from_itk(image: Any) -> NDArray[np.float64]:
    """The matrix that `Parts.axes` describes, from ITK's LPS frame."""
    axes: NDArray[np.float64] = np.diag([-1, -1, 1]) @ np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    return axes


def _has_sizes(header: bytes) -> bool:
    """Whether a MetaImage states, once each, how many axes it has and how long they are; ITK hangs where NDims is -1."""
    axes, sizes = (
        re.findall(rb"(?m)^[ \t]*" + name + rb"[ \t]*[=:][ \t]*([\d \t]*?)[ \t]*\r?$", header) for name in (b"NDims", b"DimSize")
    )
    once = header.count(b"NDims") == len(axes) == 1 and header.count(b"DimSize") == len(sizes) == 1
    return once and axes[0] in (b"2", b"3", b"4") and len(sizes[0].split()) == int(axes[0])


def _voxel_file(path: Path, header: bytes) -> Path:
    """The file beside an .mhd file that its checked header names."""
    found = re.search(rb"ElementDataFile[ \t]*[=:][ \t]*([^\r\n]+)", header)
    return path.parent / os.fsdecode(found[1].strip()) if found else path


def voxel_files(path: Path) -> list[Path]:
    """The files beside a header that hold its voxels, as far as it is one that may be read; else none."""
    ending = path.suffix.lower()
    try:
        return [_voxel_file(path, _checked_header(path, ending, ""))] if ending == ".mhd" else []
    except (OSError, VolumeError):  # which reading says better
        return []


def _checked_header(path: Path, ending: str, source: str) -> bytes:
    """The first 64 KiB of a NRRD or MetaImage file, which must not name another place for its voxels.

    ITK would open whatever file of this machine such a header names and show it as a scan.

    Raises:
        VolumeError: it does (but .mhd may name a file beside it), or a NRRD header has no end.
    """
    with path.open("rb") as file:
        content = file.read(65536 if ending == ".nrrd" else -1)
    header = content[:65536]
    if ending == ".nrrd":
        if not any(blank in header for blank in (b"\n\n", b"\r\n\r\n")):
            raise damaged(source, "NRRD")  # ITK crashes on a header without an end
        elsewhere = re.search(rb"(?i)[\r\n]\s*data\s*file\s*:", header) is not None
    else:  # said once in all the file: it is not for us to guess which of two lines ITK obeys
        harmless = re.search(b"ElementDataFile[ \t]*[=:][ \t]*" + HARMLESS_PLACES[ending] + rb"[ \t]*(?:[\r\n]|\Z)", content)
        elsewhere = content.count(b"ElementDataFile") > (1 if harmless else 0)
    if elsewhere:
        remedy = "save it as one .mha file" if ending == ".mhd" else "save header and voxels as one file"
        raise VolumeError(f"{source}: the header names another place for the voxels, which is not opened; {remedy}.")
    return header

"""NIfTI-1 and -2, compressed or not."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.base import Parts, VolumeError, check_size, damaged
from med3dvlm.formats.packed import GZIP, behind, inflated
from med3dvlm.geometry import is_geometry

START = 65536  # bytes that are unpacked to see the header


def read(path: Path, source: str) -> Parts:
    """Read a .nii or .nii.gz file. A .gz file is unpacked to its end, so that its checksum is verified; what follows the voxels is not kept.

    The affine is the sform's, where that is one, else the qform's; a file with neither has a spacing alone. A slope of 0 or NaN means
    that values are not scaled.

    Raises:
        VolumeError: the file is damaged, announces an impossible size or holds values that are not real.
    """
    packed = path.read_bytes()
    try:
        header = _header(packed, source)
        offset, sizes, dtype = _layout(header, source)
        check_size((offset,), 1, len(packed), source, "NIfTI")
        check_size(sizes, dtype.itemsize, len(packed), source, "NIfTI")
        size = offset + math.prod(sizes) * dtype.itemsize
        content, more, beside = inflated(packed, size) if packed.startswith(GZIP) else (packed, len(packed) - size, 0)
        stored: NDArray[Any] = np.frombuffer(content, dtype, math.prod(sizes), offset).reshape(sizes[::-1])
    except OverflowError as error:
        raise VolumeError(
            f"{source}: this cannot be read as NIfTI: the file is far longer than its header states; save it again."
        ) from error
    except (EOFError, ValueError, zlib.error) as error:
        if isinstance(error, VolumeError):
            raise
        raise damaged(source, "NIfTI") from error
    while stored.ndim > 3 and stored.shape[0] == 1:
        stored = stored[0]
    warnings = list(behind(more, beside))
    rescale = _rescale(float(header["scl_slope"]), float(header["scl_inter"]), warnings)
    if dtype.fields is not None:  # colours, which are not rescaled
        rescale = None
    array = stored if rescale is None else _rescaled(stored, *rescale)
    geometry = _geometry(header, warnings) if stored.ndim == 3 else {}
    return Parts(array, warnings=tuple(warnings), rescale=rescale, **geometry)


def _header(packed: bytes, source: str) -> Any:
    """Return nibabel's header object, as stored. Raises ValueError, EOFError or zlib.error where there is none."""
    import nibabel

    start = packed[:START]
    if start.startswith(GZIP):
        start = zlib.decompressobj(47).decompress(start, 1024)
    if start[344:348] == b"ni1\0":
        raise VolumeError(f"{source}: this is one of the two files of a .hdr and .img pair; save the scan as one .nii file.")
    if start[4:8] == b"n+2\0":
        return nibabel.Nifti2Header(start[:540], check=False)
    if start[344:348] != b"n+1\0":
        raise ValueError("no NIfTI signature")
    return nibabel.Nifti1Header(start[:348], check=False)


def _layout(header: Any, source: str) -> tuple[int, list[int], np.dtype[Any]]:
    """Return the offset of the voxels, the lengths of the axes, the fastest first, and the type of the values. Raises ValueError for anything
    else.
    """
    from nibabel.spatialimages import HeaderDataError

    dimension, offset = int(header["dim"][0]), float(header["vox_offset"])
    sizes = [int(length) for length in header["dim"][1 : dimension + 1]]
    while len(sizes) > 3 and sizes[-1] in (0, 1):
        sizes.pop()
    if header["datatype"] in (0, 1):  # unknown, single bits
        raise VolumeError(f"{source}: the header names no type of values that is read; save them as whole or real numbers.")
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise ValueError("no such type of values") from error
    if not 1 <= dimension <= 7 or min(sizes) < 1 or not (offset == 0 or header.sizeof_hdr <= offset < math.inf):
        raise ValueError("no such number of voxels")
    if dtype.kind == "c":
        raise VolumeError(f"{source}: values are complex numbers but real ones are needed; save magnitude or phase by itself.")
    return int(offset) or header.single_vox_offset, sizes, dtype


def _rescale(slope: float, intercept: float, warnings: list[str]) -> tuple[float, float] | None:
    """Return slope and intercept to apply; oddities go into `warnings`."""
    if math.isnan(slope) or slope == 0:
        if math.isfinite(intercept) and intercept:
            warnings.append(f"the header's slope is {slope:g}, which means no scaling; its intercept {intercept:g} is not applied.")
        return None
    if math.isinf(slope):
        warnings.append("the header's slope is infinite; values are not scaled.")
        return None
    if not math.isfinite(intercept):
        warnings.append(f"the header's intercept is {intercept:g}; 0 is used instead.")
        intercept = 0.0
    return None if (slope, intercept) == (1, 0) else (slope, intercept)


def _rescaled(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[np.float32]:
    array = np.empty(stored.shape, np.float32)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and that is refused later
        for place, picture in enumerate(stored):
            array[place] = picture * np.float64(slope) + intercept
    return array


def _geometry(header: Any, warnings: list[str]) -> dict[str, Any]:
    """Return those of the fields axes, origin and spacing of `Parts` that are known; oddities go into `warnings`."""
    from nibabel import aff2axcodes

    to_mm = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # metres and microns
    pixdim = np.array(header["pixdim"][1:4], dtype=np.float64)
    qform, sform = _qform(header, pixdim, warnings), _sform(header, warnings)
    measured = bool(np.isfinite(pixdim).all() and pixdim.min() > 0)
    if sform is not None and qform is not None:
        unit = np.allclose(np.linalg.norm(sform, axis=0), 1, rtol=0, atol=1e-6)
        if unit and not np.allclose(pixdim, 1, rtol=0.01):
            warnings.append(f"the sform states 1 mm voxels beside a qform of {_mm(to_mm * pixdim)} mm; the qform is used.")
            sform = None
        elif aff2axcodes(_affine(qform)) != aff2axcodes(_affine(sform)):
            warnings.append("qform and sform contradict each other; the sform is used.")
    axes = qform if sform is None else sform
    if axes is None:
        if not (header["qform_code"] > 0 or header["sform_code"] > 0):
            warnings.append("the file has no qform and no sform.")
        return {"spacing": tuple(float(mm) for mm in to_mm * pixdim[::-1])} if pixdim.any() else {}
    lengths = np.linalg.norm(axes, axis=0)
    if measured and not np.allclose(pixdim, lengths, rtol=0.01, atol=0):  # pixdim, which is the qform's voxel size, too
        stated, used = _mm(to_mm * pixdim), _mm(to_mm * lengths)
        warnings.append(f"the header states spacing {stated} mm (pixdim) and {used} mm (sform); the sform is used.")
    offsets = ("qoffset_x", "qoffset_y", "qoffset_z") if sform is None else ("srow_x", "srow_y", "srow_z")
    origin = to_mm * np.array([np.ravel(header[name])[-1] for name in offsets], dtype=np.float64)
    return {"axes": to_mm * axes, "origin": origin}


def _sform(header: Any, warnings: list[str]) -> NDArray[np.float64] | None:
    """Return the sform's 3x3, in the header's unit; None where there is none."""
    if header["sform_code"] <= 0:
        return None
    axes = np.array([header[row][:3] for row in ("srow_x", "srow_y", "srow_z")], dtype=np.float64)
    if is_geometry(axes):
        return axes
    warnings.append("the sform is singular or not finite and is ignored.")
    return None


def _qform(header: Any, pixdim: NDArray[np.float64], warnings: list[str]) -> NDArray[np.float64] | None:
    """Return the qform's 3x3, of a quaternion whose first part makes its length 1. A qfac other than -1 counts as 1."""
    if header["qform_code"] <= 0:
        return None
    b, c, d = (float(header[name]) for name in ("quatern_b", "quatern_c", "quatern_d"))
    rest = 1 - (b * b + c * c + d * d)
    if not rest > -1e-5 or not (np.isfinite(pixdim).all() and pixdim.min() > 0):
        warnings.append("the qform's quaternion or voxel sizes are not valid, so it is ignored.")
        return None
    a = math.sqrt(max(rest, 0.0))
    b, c, d = np.array([b, c, d]) / math.sqrt(a * a + b * b + c * c + d * d)
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    return turn * pixdim * (1, 1, -1 if header["pixdim"][0] == -1 else 1)


def _affine(axes: NDArray[np.float64]) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = axes
    return affine


def _mm(lengths: Sequence[float] | NDArray[np.float64]) -> str:
    return " x ".join(f"{mm:.3g}" for mm in reversed(lengths))


def mask_file(mask: NDArray[np.bool_], spacing: Sequence[float] | None, affine: NDArray[np.float64] | None) -> bytes:
    """Return the bytes of an uncompressed NIfTI file with a mask of 0 and 1 that lies on its scan.

    Args:
        mask: (D, H, W).
        spacing: (z, y, x) in mm; None counts as 1 mm.
        affine: 4x4, from the index (d, h, w, 1) to RAS mm; None where nobody knows it, and the header says so.
    """
    import nibabel

    image = nibabel.Nifti1Image(mask.transpose().astype(np.uint8), None if affine is None else affine[:, [2, 1, 0, 3]])
    image.header.set_xyzt_units("mm")
    if affine is None:
        image.header.set_zooms([float(mm) for mm in (spacing or (1, 1, 1))[::-1]])
    else:
        image.set_sform(image.affine, 1)
        image.set_qform(image.affine, 1)  # the nearest one without shear, which a qform cannot say
    content: bytes = image.to_bytes()
    return content

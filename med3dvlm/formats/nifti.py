"""NIfTI-1 and -2, compressed or not."""

import gzip
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.formats.base import Parts, VolumeError, check_size, damaged

GZIP = b"\x1f\x8b"
AFTER_THE_VOXELS = 2**20  # bytes; more than that behind the last voxel is not NIfTI
BEFORE_THE_VOXELS = 2**20  # bytes of header and extensions


def read(path: Path, source: str) -> Parts:
    """A .nii or .nii.gz file. A .gz file is unpacked to its end, so that its checksum is verified, but not beyond what
    its header announces.

    The affine is the sform's, else the qform's; a file with neither has a spacing alone.

    Raises:
        VolumeError: the file is damaged or announces an impossible size.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        content = _content(path, source)
        image: Any = _image_type(content).from_bytes(content)
        header, proxy = image.header, image.dataobj
        rescale = None if (proxy.slope, proxy.inter) == (1, 0) else (float(proxy.slope), float(proxy.inter))
        # Unscaled whole numbers stay so, whatever their size.
        array = np.asanyarray(proxy) if rescale is None else np.asanyarray(proxy, dtype=np.float32)
        qform, sform = header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]
        to_mm = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # metres and microns
    except VolumeError:
        raise
    except (
        ImageFileError,
        HeaderDataError,
        WrapStructError,
        EOFError,
        OSError,
        ArithmeticError,
        LookupError,
        ValueError,
        zlib.error,
    ) as error:
        raise damaged(source, "NIfTI") from error
    if array.ndim > 3 and set(array.shape[3:]) == {1}:
        array = array.reshape(array.shape[:3])
    if sform is None and qform is None:
        zooms = tuple(to_mm * float(mm) for mm in reversed(header.get_zooms()[:3]))
        spacing = zooms if min(zooms) > 0 else None
        return Parts(array.T, None, spacing, warnings=("the file has no qform and no sform.",), rescale=rescale)
    affine = qform if sform is None else sform
    conflict = sform is not None and qform is not None and nibabel.aff2axcodes(qform) != nibabel.aff2axcodes(sform)
    warnings = ["qform and sform contradict each other; the sform is used."] if conflict else []
    pixdim, lengths = np.array(header.get_zooms()[:3]), np.linalg.norm(affine[:3, :3], axis=0)[: array.ndim]
    if pixdim.min() > 0 and not np.allclose(pixdim, lengths, rtol=0.01, atol=0):  # pixdim, which is the qform's voxel size, too
        stated, used = (" x ".join(f"{to_mm * mm:.3g}" for mm in reversed(size)) for size in (pixdim, lengths))
        warnings.append(f"the header says spacing {stated} mm (pixdim) and {used} mm (sform); the sform is used.")
    return Parts(array.T, to_mm * affine[:3, :3], warnings=tuple(warnings), rescale=rescale)


def _content(path: Path, source: str) -> bytes:
    """The whole file, unpacked, its announced size checked first."""
    packed = path.read_bytes()
    if not packed.startswith(GZIP):
        _announced(packed, len(packed), source)
        return packed
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
        announced = _announced(file.read(1024), len(packed), source)
        file.seek(0)
        content = file.read(announced + AFTER_THE_VOXELS)
        if file.read(1):
            raise ValueError("there is more in the file than its header announces")
    return content


def _announced(start: bytes, file_bytes: int, source: str) -> int:
    """The number of bytes, from the file's first to that of the last voxel, by the header in `start`."""
    header = _image_type(start).header_class.from_fileobj(io.BytesIO(start), check=False)
    shape, voxel_bytes = header.get_data_shape(), header.get_data_dtype().itemsize
    check_size(shape, voxel_bytes, file_bytes, source, "NIfTI")
    if header.get_data_dtype().kind == "c":
        raise VolumeError(f"{source}: values are complex numbers but real ones are needed; save magnitude or phase by itself.")
    if header["vox_offset"] > BEFORE_THE_VOXELS:
        raise ValueError("the voxels begin too far behind the header")
    return int(header["vox_offset"]) + int(np.prod(shape, dtype=np.int64)) * voxel_bytes


def _image_type(content: bytes) -> Any:
    import nibabel

    if content[4:8] == b"n+2\0":
        return nibabel.Nifti2Image
    if content[344:348] != b"n+1\0":
        raise ValueError("no NIfTI signature")
    return nibabel.Nifti1Image

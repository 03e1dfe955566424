"""One scan file in, one checked :class:`Volume` out.

Everything that can be wrong with the geometry, the unit or the numbers of a scan is found here, so that what follows
(preprocessing, training, the app) works on volumes that are known to be sound.

Conventions, written once and used everywhere:

- **Axes** are always (D, H, W): D counts the slices as the file stores them (NIfTI: its third axis), H the rows of a
  slice, W its columns.
- **Spacing** is always (z, y, x), that is along (D, H, W), in millimetres.
- **Orientation** is three letters, one an axis, saying where the patient's anatomy goes as the index grows: "SPL"
  means slices run towards Superior, rows towards Posterior, columns towards the patient's Left.
- **Direction** is a 3x3 matrix whose columns are the unit vectors of the D, H and W axes in the RAS+ frame (x towards
  Right, y Anterior, z Superior).
- **Unit** is "HU" (Hounsfield units), "unit" (all values within 0..1) or "arbitrary".

A format is one function from a path to :class:`_Parts`, named in `READERS` under its file ending.
Nothing that names a patient leaves this module: messages hold the path as the caller gave it, sizes and numbers only.
"""

import gzip
import math
import os
import re
import tokenize
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

UNITS = ("HU", "unit", "arbitrary")
PLANES = {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "L": "sagittal", "R": "sagittal"}
AIR, LOWEST_PADDING = -1100, -3100  # HU; below air, scanners write padding such as -2000 or -3024
# What may follow ElementDataFile in a header. Of names only those in the same folder; LIST and % would stand for several files.
HARMLESS_PLACES = {".mha": b"(?i:LOCAL)", ".mhd": rb"(?![ \t]|(?i:LIST))[^/\\:%\0\r\n]+"}
OBLIQUE_DEGREES = 15.0  # beyond this tilt, calling a scan by its nearest plane is worth a warning


class VolumeError(ValueError):
    """A scan that cannot be used; the message is one sentence: what, where, and what to do."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3D scan with its geometry, checked when it is made. See the module's text for the conventions.

    `array` is (D, H, W), int16 or float32, finite and not constant; `spacing` is (z, y, x) in mm; `spacing`,
    `orientation` and `direction` are None when nobody knows them. `source` is the path as given; `warnings` are
    sentences about everything that was assumed. Raises VolumeError for anything else.
    """

    array: NDArray[np.int16] | NDArray[np.float32]
    spacing: tuple[float, float, float] | None = None
    orientation: str | None = None
    direction: NDArray[np.float64] | None = None
    unit: str = "arbitrary"
    source: str = "volume"
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise VolumeError(f"{self.source}: {problem}.")

    def _problem(self) -> str | None:
        array, spacing, letters = self.array, self.spacing, self.orientation
        size = "x".join(map(str, array.shape))
        if array.ndim < 3 or (array.ndim == 3 and min(array.shape) <= 1):
            return f"this is a 2D image ({size}); give a 3D scan with at least two slices"
        if array.ndim > 3:
            return f"this is {array.ndim}D ({size}) but one 3D scan is needed; save one time point or channel by itself"
        if array.dtype not in (np.int16, np.float32):
            return f"values are {array.dtype} but a Volume holds int16 or float32; convert them"
        if bad := array.size - int(np.isfinite(array).sum()):
            return f"{bad} of {array.size} voxels are NaN or infinite; replace them by real values"
        low, high = float(array.min()), float(array.max())
        if low == high:
            return f"every voxel is {low:g}, so there is no image to see; export the scan again"
        if spacing is not None and not (len(spacing) == 3 and all(0 < mm < math.inf for mm in spacing)):
            return f"spacing is {spacing} but must be three positive numbers (z, y, x) in mm"
        if letters is not None and sorted(PLANES.get(x, "?") for x in letters) != ["axial", "coronal", "sagittal"]:
            return f"orientation is {letters!r} but must be one letter each of L/R, A/P and I/S, such as 'SPL'"
        if self.unit not in UNITS:
            return f"unit is {self.unit!r} but must be one of {', '.join(UNITS)}"
        if self.unit == "unit" and not 0 <= low <= high <= 1:
            return f"unit 'unit' is for values within 0..1 but these are {low:g} to {high:g}; use 'arbitrary'"
        return None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        depth, height, width = self.array.shape
        return depth, height, width

    @property
    def plane(self) -> str | None:
        """The plane nearest to the slices, axial, coronal or sagittal; None when the orientation is unknown."""
        return None if self.orientation is None else PLANES[self.orientation[0]]

    @property
    def oblique(self) -> float | None:
        """Angle in degrees between the D axis and the anatomical axis nearest to it; None when unknown."""
        return None if self.direction is None else _angle(np.abs(self.direction[:, 0]).max())


def read_volume(path: str | os.PathLike[str], *, spacing: Sequence[float] | None = None, unit: str | None = None) -> Volume:
    """Read a scan: a file with one of the endings in `READERS`, or a folder that holds one DICOM series.

    `spacing` (z, y, x) in mm and `unit` ("HU", "unit", "arbitrary") replace what the file says. An .npy file has
    axes (D, H, W) and no geometry. The values are those that the header's slope and intercept define, applied once;
    they are int16 when they are all whole numbers within its range, else float32.

    The unit, when not stated, is "HU" if DICOM says CT and there are negative values, or, in a format that names no
    modality, if the values look like a CT: the lowest lies between -3100 and -200, and at least 99 % of the voxels are
    within -1100..4000 or equal to the lowest (padding). It is "unit" when all values are within 0..1, else "arbitrary".

    Raises VolumeError, one sentence, for anything that is not one sound 3D scan.
    """
    source, location = os.fspath(path), Path(path)
    if not location.exists():
        raise VolumeError(f"{source}: there is no such file or folder; check the path.")
    if not os.access(location, os.R_OK):
        raise VolumeError(f"{source}: reading is not permitted; ask for access or copy the scan elsewhere.")
    parts = _reader_for(location, source)(location, source)
    array, warnings = _smallest_exact_type(parts.array, source), list(parts.warnings)
    found, direction = _split(parts.axes, warnings) if parts.axes is not None else (parts.spacing, None)

    millimetres: Any = found if spacing is None else tuple(float(mm) for mm in spacing)  # Volume checks the length
    if spacing is not None and found is not None and _mm(found) != _mm(millimetres):
        warnings.append(f"the file says spacing {_mm(found)}; the stated {_mm(millimetres)} is used.")
    if millimetres is None:
        warnings.append("the spacing is unknown; state it with spacing=(z, y, x) in mm.")
    if direction is None:
        warnings.append("the orientation is unknown; slices are taken to be as displayed on a screen.")
    elif (tilt := _angle(np.abs(direction[:, 0]).max())) > OBLIQUE_DEGREES:
        warnings.append(f"slices are tilted by {tilt:.0f} degrees; they count as the nearest anatomical plane.")
    if unit is None:
        unit = _guess_unit(array, parts.modality, warnings)
    return Volume(array, millimetres, _letters(direction), direction, unit, source, tuple(warnings))


class _Parts(NamedTuple):
    """What a reader finds: array (D, H, W) of any type; the rest is None where the file does not say.

    `axes` is 3x3: its columns lead, in RAS mm, from one voxel to the next along x, y, z (W, H, D), as in an affine.
    """

    array: NDArray[Any]
    axes: NDArray[np.float64] | None = None
    spacing: tuple[float, ...] | None = None  # (z, y, x), for a file that states it without axes
    modality: str | None = None
    warnings: tuple[str, ...] = ()


def _read_nifti(path: Path, source: str) -> _Parts:
    """NIfTI-1 and -2, compressed or not. The whole file is unpacked so that a .gz file's checksum is verified."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        version = 2 if content[4:8] == b"n+2\0" else 1
        if version == 1 and content[344:348] != b"n+1\0":
            raise ValueError("no NIfTI signature")
        image: Any = (nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image).from_bytes(content)
        header, proxy = image.header, image.dataobj
        unscaled = (proxy.slope, proxy.inter) == (1, 0)  # then whole numbers stay so, whatever their size
        array = np.asanyarray(proxy) if unscaled else np.asanyarray(proxy, dtype=np.float32)
        qform, sform = header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]
        to_mm = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # metres and microns
    except (ImageFileError, HeaderDataError, WrapStructError, EOFError, OSError, ValueError, zlib.error) as error:
        raise _damaged(source, "NIfTI") from error
    if array.ndim > 3 and set(array.shape[3:]) == {1}:
        array = array.reshape(array.shape[:3])
    if sform is None and qform is None:
        zooms = tuple(to_mm * float(mm) for mm in reversed(header.get_zooms()[:3]))
        return _Parts(array.T, None, zooms if min(zooms) > 0 else None, None, ("the file has no qform and no sform.",))
    affine = qform if sform is None else sform
    conflict = sform is not None and qform is not None and nibabel.aff2axcodes(qform) != nibabel.aff2axcodes(sform)
    warnings = ("qform and sform contradict each other; the sform is used.",) if conflict else ()
    return _Parts(array.T, to_mm * affine[:3, :3], warnings=warnings)


def _read_itk(path: Path, source: str) -> _Parts:
    """NRRD and MetaImage, through SimpleITK."""
    import SimpleITK as sitk

    ending = path.suffix.lower()
    header = _checked_header(path, ending, source)
    try:
        # Named, as ITK would otherwise try every format that it knows.
        image = sitk.ReadImage(str(path), imageIO="NrrdImageIO" if ending == ".nrrd" else "MetaImageIO")
    except RuntimeError as error:
        raise _damaged(source, ending[1:].upper()) from error
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise _colour(source)
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    array = sitk.GetArrayFromImage(image)
    if image.GetDimension() != 3:
        return _Parts(array)  # Volume says what is wrong

    # SimpleITK does not tell a stated orientation from an assumed one.
    if any(word in header for word in (b"space directions:", b"TransformMatrix", b"\nRotation", b"\nOrientation")):
        return _Parts(array, _axes_from_itk(image))
    has_spacing = b"spacings:" in header or b"ElementS" in header  # ElementSpacing or ElementSize
    return _Parts(array, None, tuple(reversed(image.GetSpacing())) if has_spacing else None)


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
            raise _damaged(source, "NRRD")  # ITK crashes on a header without an end
        elsewhere = re.search(rb"(?i)[\r\n]\s*data\s*file\s*:", header) is not None
    else:  # said once in all the file: it is not for us to guess which of two lines ITK obeys
        harmless = re.search(b"ElementDataFile[ \t]*[=:][ \t]*" + HARMLESS_PLACES[ending] + rb"[ \t]*(?:[\r\n]|\Z)", content)
        elsewhere = content.count(b"ElementDataFile") > (1 if harmless else 0)
    if elsewhere:
        remedy = "save it as one .mha file" if ending == ".mhd" else "save header and voxels as one file"
        raise VolumeError(f"{source}: the header names another place for the voxels, which is not opened; {remedy}.")
    return header


def _read_dicom_folder(folder: Path, source: str) -> _Parts:
    """One DICOM series, slices sorted along their normal; GDCM applies each file's slope and intercept, once."""
    import SimpleITK as sitk

    printing = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what ITK would print to the terminal is put in words below
    try:
        reader = sitk.ImageSeriesReader()
        series = [reader.GetGDCMSeriesFileNames(str(folder), uid) for uid in reader.GetGDCMSeriesIDs(str(folder))]
        if damaged := _damaged_slices(folder, {Path(name).name for names in series for name in names}):
            raise VolumeError(f"{source}: {damaged} of the DICOM slices are damaged or cut short; copy them again.")
        if not series:
            raise VolumeError(f"{source}: the folder holds no DICOM images; give the folder with the slices.")
        series.sort(key=len, reverse=True)
        first = sitk.ImageFileReader()
        first.SetFileName(series[0][0])
        first.ReadImageInformation()
        if first.GetNumberOfComponents() > 1:
            raise _colour(source)
        reader.SetFileNames(series[0])
        reader.MetaDataDictionaryArrayUpdateOn()
        reader.SetOutputPixelType(sitk.sitkFloat32)  # slopes may differ from slice to slice
        image = reader.Execute()
    except RuntimeError as error:
        raise _damaged(source, "a DICOM series") from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(printing)

    def tags(key: str) -> list[str]:
        return [reader.GetMetaData(i, key).strip() for i in range(len(series[0])) if reader.HasMetaDataKey(i, key)]

    warnings, array, axes = [], sitk.GetArrayFromImage(image), _axes_from_itk(image)
    modality = next(iter(tags("0008|0060")), "unknown")
    if len(series) > 1:
        counts = ", ".join(str(len(names)) for names in series)
        warnings.append(f"the folder holds {len(series)} series with {counts} slices; the largest is read.")
    positions = np.array([[float(mm) for mm in text.split("\\")] for text in tags("0020|0032")])
    if len(positions) != len(array) or not tags("0020|0037"):
        warnings.append("the DICOM files state no slice positions; the slices' order is a guess.")
        return _Parts(array, None, None, modality, tuple(warnings))
    if len(positions) > 1:
        normal = axes[:, 2] / np.linalg.norm(axes[:, 2])
        axes[:, 2] = normal * _slice_distance(positions * (-1, -1, 1), normal, source, warnings)
    return _Parts(array, axes, None, modality, tuple(warnings))


def _damaged_slices(folder: Path, readable: set[str]) -> int:
    """How many DICOM images GDCM left out without a word, as it does with those whose pixels it cannot read."""
    import pydicom

    count = 0
    for path in folder.iterdir():
        if path.name not in readable and path.is_file() and pydicom.misc.is_dicom(path):
            # Reports and directory files are DICOM too, but have no rows.
            count += "Rows" in pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Rows"])
    return count


def _read_npy(path: Path, source: str) -> _Parts:
    """A bare array (D, H, W), or (1, D, H, W) as M3D stores it."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError, tokenize.TokenError) as error:
        raise _damaged(source, "a NumPy array") from error
    return _Parts(array[0] if array.ndim == 4 and array.shape[0] == 1 else array)


Reader = Callable[[Path, str], _Parts]
READERS: dict[str, Reader] = {
    ".nii": _read_nifti,
    ".nii.gz": _read_nifti,
    ".nrrd": _read_itk,
    ".mha": _read_itk,
    ".mhd": _read_itk,
    ".npy": _read_npy,
}


def _reader_for(path: Path, source: str) -> Reader:
    if path.is_dir():
        return _read_dicom_folder
    reader = next((READERS[ending] for ending in READERS if path.name.lower().endswith(ending)), None)
    if reader is None:
        known = f"{', '.join(READERS)} or a folder that holds one DICOM series"
        raise VolumeError(f"{source}: the ending {path.suffix!r} is not a known scan format; use {known}.")
    if path.stat().st_size == 0:
        raise VolumeError(f"{source}: the file is empty (0 bytes); copy or download it again.")
    return reader


def _damaged(source: str, kind: str) -> VolumeError:
    reason = "it is damaged, cut short or something else under this name"
    return VolumeError(f"{source}: this cannot be read as {kind}; {reason}, so copy or export it again.")


def _colour(source: str) -> VolumeError:
    return VolumeError(f"{source}: this is a colour image (several values a voxel); export it in grey.")


def _smallest_exact_type(array: NDArray[Any], source: str) -> NDArray[np.int16] | NDArray[np.float32]:
    """int16 where that loses nothing, else float32."""
    if array.dtype.fields is not None:
        raise _colour(source)
    if array.dtype.kind not in "iufb":
        raise VolumeError(f"{source}: values are of type {array.dtype} but real numbers are needed; convert them.")
    if array.size and array.min() >= -32768 and array.max() <= 32767:
        if array.dtype.kind != "f" or (array == np.rint(array)).all():
            return np.ascontiguousarray(array, dtype=np.int16)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which Volume refuses
        return np.ascontiguousarray(array, dtype=np.float32)


def _guess_unit(array: NDArray[Any], modality: str | None, warnings: list[str]) -> str:
    """The unit by the rule in read_volume's text; what is doubtful about it goes into `warnings`."""
    if array.size == 0 or not np.isfinite(array).all():
        return "arbitrary"  # Volume refuses it
    low, high = float(array.min()), float(array.max())
    looks_like_ct = False
    if modality is None and LOWEST_PADDING <= low <= -200:
        looks_like_ct = (((array >= AIR) & (array <= 4000)) | (array == array.min())).mean() >= 0.99
    if looks_like_ct or (modality == "CT" and low < 0):
        if low < AIR:
            warnings.append(f"the lowest value is {low:g} HU, below that of air; it is probably padding.")
        return "HU"
    if modality == "CT":
        warnings.append(f"DICOM says CT but the values are {low:g} to {high:g}; they look un-rescaled.")
    elif modality is None and array.dtype == np.int16 and low >= 0 and 1500 <= high <= 4200:
        warnings.append(f"values are whole numbers from {low:g} to {high:g}; if this is a CT, it looks un-rescaled.")
    return "unit" if 0 <= low and high <= 1 else "arbitrary"


def _split(axes: NDArray[np.float64], warnings: list[str]) -> tuple[Any, NDArray[np.float64] | None]:
    """Spacing (z, y, x) and direction (columns D, H, W), or (None, None) for a matrix that is no geometry."""
    columns = np.asarray(axes, dtype=np.float64)[:, ::-1]
    lengths = np.linalg.norm(columns, axis=0)
    if not (np.isfinite(lengths).all() and lengths.min() > 0 and abs(np.linalg.det(columns / lengths)) > 0.01):
        warnings.append("the file's affine matrix is singular and is ignored.")
        return None, None
    if np.array_equal(np.abs(axes), np.eye(3)):
        warnings.append("the geometry is the 1 mm identity, which programs write when they know none; it may be wrong.")
    return tuple(float(mm) for mm in lengths), columns / lengths


def _axes_from_itk(image: Any) -> NDArray[np.float64]:
    """The matrix that `_Parts.axes` describes, from ITK's LPS frame."""
    axes: NDArray[np.float64] = np.diag([-1, -1, 1]) @ np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    return axes


def _letters(direction: NDArray[np.float64] | None) -> str | None:
    """The anatomical letter nearest to each column of a direction matrix, each axis used once."""
    from nibabel.orientations import aff2axcodes

    if direction is None:
        return None
    affine = np.eye(4)
    affine[:3, :3] = direction
    return "".join(aff2axcodes(affine))


def _slice_distance(positions: NDArray[np.float64], normal: NDArray[np.float64], source: str, warnings: list[str]) -> float:
    """The usual distance in mm between neighbouring slices at `positions` (slices, 3); oddities go into `warnings`."""
    heights = positions @ normal
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if gaps.min() < 0.001:
        count = f"{len(heights)} slices at {len(np.unique(np.round(heights, 3)))} places are no single stack"
        raise VolumeError(f"{source}: {count} (phases or directions are mixed); put one stack in a folder of its own.")
    if gaps.max() - gaps.min() > 0.1 * usual:
        spread = f"slice distances vary from {gaps.min():.2f} to {gaps.max():.2f} mm, so slices may be missing"
        warnings.append(f"{spread}; {usual:.2f} mm is used for all.")
    path = positions[-1] - positions[0]
    if (tilt := _angle(abs(path @ normal) / np.linalg.norm(path))) > 1.0:
        warnings.append(f"the gantry was tilted by {tilt:.0f} degrees; slices are stacked without correcting that.")
    return usual


def _angle(cosine: Any) -> float:
    """Degrees."""
    return math.degrees(math.acos(min(1.0, float(cosine))))


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{mm:.3g}" for mm in spacing) + " mm"

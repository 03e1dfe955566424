"""Scans written as DICOM files with pydicom, for tests: an array (D, H, W) and a nibabel affine go in, files come out.

The geometry is taken from the affine alone (its columns step along W, H, D in RAS mm), so that what a reader makes of the files can be
compared with what the same affine means in a NIfTI file.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    RLELossless,
    generate_uid,
)

from med3dvlm.formats import dicom
from med3dvlm.formats.base import Parts, VolumeError

LPS = np.diag([-1.0, -1.0, 1.0])
AFFINE = np.array([[-0.7, 0, 0, 11], [0, -0.8, 0, 23], [0, 0, 2.5, -40], [0, 0, 0, 1]])  # axial: rows and columns as on a screen
SAGITTAL = np.array([[0, 0, 3.0, 5], [-0.7, 0, 0, 9], [0, -0.8, 0, 30], [0, 0, 0, 1]])
PYDICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
LOSSLESS = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
    HTJ2KLossless,
]
SHAPE = (10, 20, 30)  # D, H, W: all different, so that swapped axes fail


def scan() -> np.ndarray:
    """Return a body in air, in whole HU, whose voxels all differ from their neighbours."""
    array = np.full(SHAPE, -1000, dtype=np.int16)
    array[1:9, 4:16, 5:25] = np.random.default_rng(0).integers(-100, 300, (8, 12, 20))
    array[2, 5, 9] = 1900
    return array


def write_series(
    folder: Path,
    values: np.ndarray,
    affine: np.ndarray = AFFINE,
    *,
    rescale: Sequence[tuple[float, float]] | tuple[float, float] = (1, -1024),
    signed: bool = False,
    syntax: UID = ExplicitVRLittleEndian,
    names: str = "shuffled",
    edit: Callable[[Dataset, int], None] | None = None,
    only: Sequence[int] | None = None,
    prefix: str = "IM",
) -> Path:
    """`values` (D, H, W), one file a slice, stored so that `rescale` (one for all, or one a slice) leads to them.

    `names`: "shuffled", or "nested" for shuffled ones in subfolders without an ending. `edit(dataset, slice)` changes a slice before it
    is compressed by `syntax`. `only` writes some of the slices. Files of several calls with different prefixes may share a folder.
    """
    series, study = generate_uid(), generate_uid()
    order = np.random.default_rng(len(prefix)).permutation(len(values))
    for index, picture in enumerate(values):
        if only is not None and index not in only:
            continue
        slope, intercept = rescale[index] if isinstance(rescale, list) else rescale
        name = f"{order[index] % 3}/{order[index] % 2}/{prefix}{order[index]}" if names == "nested" else f"{prefix}{order[index]:04d}.dcm"
        item = _image(folder / name, CTImageStorage, (picture - intercept) / slope, signed)
        item.SeriesInstanceUID, item.StudyInstanceUID = series, study
        item.Modality, item.InstanceNumber, item.ImageType = "CT", int(order[index]) + 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
        item.ImageOrientationPatient, item.PixelSpacing = _orientation(affine), _spacing(affine)
        item.ImagePositionPatient = _position(affine, index)
        item.SliceThickness = 2.5
        item.RescaleSlope, item.RescaleIntercept = slope, intercept
        if edit is not None:
            edit(item, index)
        save(item, syntax)
    return folder


def write_enhanced(
    path: Path,
    values: np.ndarray,
    affine: np.ndarray = AFFINE,
    *,
    order: Sequence[int] | None = None,
    rescale: Sequence[tuple[float, float]] = ((1, -1024),),
    syntax: UID = ExplicitVRLittleEndian,
    edit: Callable[[Dataset], None] | None = None,
) -> Path:
    """`values` as one Enhanced CT file whose frames stand in `order`; with several `rescale`s each frame has its own, else all share one."""
    order = range(len(values)) if order is None else order
    rescales = [rescale[index % len(rescale)] for index in order]
    stored = np.stack([(values[index] - intercept) / slope for index, (slope, intercept) in zip(order, rescales, strict=True)])
    item = _image(path, EnhancedCTImageStorage, stored, False)
    item.Modality, item.InstanceNumber, item.ImageType = "CT", 1, ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]

    shared, frames = Dataset(), []
    shared.PlaneOrientationSequence = one(ImageOrientationPatient=_orientation(affine))
    shared.PixelMeasuresSequence = one(PixelSpacing=_spacing(affine), SliceThickness=2.5)
    for index, (slope, intercept) in zip(order, rescales, strict=True):
        frame = Dataset()
        frame.PlanePositionSequence = one(ImagePositionPatient=_position(affine, index))
        frame.CTImageFrameTypeSequence = one(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])
        place = frame if len(rescale) > 1 else shared
        place.PixelValueTransformationSequence = one(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")
        frames.append(frame)
    item.SharedFunctionalGroupsSequence, item.PerFrameFunctionalGroupsSequence = Items([shared]), Items(frames)
    if edit is not None:
        edit(item)
    return save(item, syntax)


def write_plain_multiframe(path: Path, stored: np.ndarray) -> Path:
    """Write `stored` (D, H, W) as the frames of one secondary capture, which has no geometry."""
    item = _image(path, MultiFrameGrayscaleWordSecondaryCaptureImageStorage, stored, False)
    item.Modality, item.InstanceNumber = "OT", 1
    return save(item, ExplicitVRLittleEndian)


def one(**values: object) -> Items:
    """Return a sequence of one item with these values."""
    item = Dataset()
    item.update(values)
    return Items([item])


def _image(path: Path, storage: UID, stored: np.ndarray, signed: bool) -> FileDataset:
    """An uncompressed image with a patient's name, frames (frames, H, W) or one picture (H, W)."""
    assert np.array_equal(stored, np.rint(stored)), "choose values that slope and intercept lead to"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = storage, generate_uid(), ExplicitVRLittleEndian
    item = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    item.SOPClassUID, item.SOPInstanceUID = storage, meta.MediaStorageSOPInstanceUID
    item.SeriesInstanceUID, item.StudyInstanceUID, item.FrameOfReferenceUID = generate_uid(), generate_uid(), generate_uid()
    item.PatientName, item.PatientID, item.StudyDate, item.SeriesDescription = "Secret^Name", "ID-SECRET", "20010203", "Secret series"
    item.Rows, item.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        item.NumberOfFrames = len(stored)
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, int(signed)
    item.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()
    return item


def save(item: FileDataset, syntax: UID = ExplicitVRLittleEndian) -> Path:
    """Compress and write an image."""
    path = Path(item.filename)
    path.parent.mkdir(parents=True, exist_ok=True)
    if syntax == RLELossless:
        item.compress(syntax, generate_instance_uid=False)
    elif syntax in COMPRESSORS:
        item.PixelData = encapsulate([COMPRESSORS[syntax](picture) for picture in item.pixel_array.reshape(-1, item.Rows, item.Columns)])
        item["PixelData"].VR, item["PixelData"].is_undefined_length = "OB", True
    elif not syntax.is_little_endian:
        item.PixelData = np.frombuffer(item.PixelData, "<u2").astype(">u2").tobytes()
    item.file_meta.TransferSyntaxUID = syntax
    dcmwrite(path, item, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian, force_encoding=True)
    return path


def rewrite(path: Path, change: Callable[[Dataset], None]) -> Path:
    """Write the file again with other elements and the same pixels."""
    item = dcmread(path)
    change(item)
    item.save_as(path)
    return path


def _by_itk(compressor: str) -> Callable[[np.ndarray], bytes]:
    """Compress a picture as JPEG (process 14, first-order prediction) or JPEG2000 by GDCM."""

    def compress(picture: np.ndarray) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            writer = sitk.ImageFileWriter()
            writer.UseCompressionOn()
            writer.SetCompressor(compressor)
            writer.SetFileName(f"{folder}/picture.dcm")
            writer.Execute(sitk.GetImageFromArray(picture[None]))
            return next(generate_frames(dcmread(f"{folder}/picture.dcm").PixelData, number_of_frames=1))

    return compress


def _unsigned(encode: Callable[[np.ndarray], bytes]) -> Callable[[np.ndarray], bytes]:
    """Return the bits as unsigned numbers, as DICOM stores them in codes without a sign."""
    return lambda picture: encode(picture.view(f"u{picture.itemsize}"))


COMPRESSORS: dict[UID, Callable[[np.ndarray], bytes]] = {
    JPEGBaseline8Bit: lambda picture: imagecodecs.jpeg8_encode(picture, level=100),
    JPEGExtended12Bit: lambda picture: imagecodecs.jpeg8_encode(picture, level=100, bitspersample=12),
    JPEGLosslessSV1: _by_itk("JPEG"),
    JPEGLSLossless: _unsigned(imagecodecs.jpegls_encode),
    JPEG2000Lossless: _by_itk("JPEG2000"),
    HTJ2KLossless: _unsigned(imagecodecs.htj2k_encode),
}


def _orientation(affine: np.ndarray) -> list[float]:
    return [_text(number) for axis in (0, 1) for number in LPS @ affine[:3, axis] / np.linalg.norm(affine[:3, axis])]


def _spacing(affine: np.ndarray) -> list[float]:
    return [_text(np.linalg.norm(affine[:3, axis])) for axis in (1, 0)]  # between rows, between columns


def _position(affine: np.ndarray, index: int) -> list[float]:
    return [_text(number) for number in LPS @ (affine @ [0, 0, index, 1])[:3]]


def _text(number: float) -> float:
    """Return a decimal string, as precise as its 16 characters allow."""
    return float(f"{number:.9g}")


def move(*places: float | tuple[float, float, float]) -> Callable[[Dataset, int], None]:
    """Return an edit that moves slices to these heights, or positions, in mm."""

    def edit(item: Dataset, index: int) -> None:
        place = places[index]
        item.ImagePositionPatient = list(place) if isinstance(place, tuple) else [0.0, 0.0, place]

    return edit


# What tests ask of a reader


def turned(degrees: float) -> np.ndarray:
    """Return AFFINE turned about the patient's long axis and about the left-right axis."""
    a, b = np.deg2rad([degrees, 0.6 * degrees])
    roll = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    nod = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = AFFINE.copy()
    affine[:3, :3] = nod @ roll @ AFFINE[:3, :3]
    return affine


def read(path: Path, **options: int) -> Parts:
    parts = dicom.read(path, "scan", **options)
    assert "secret" not in repr(parts[1:]).lower() and "2001" not in repr(parts[1:]), "nothing about the patient gets out"
    return parts


def same_as_nifti(parts: Parts, values: np.ndarray, affine: np.ndarray, tmp_path: Path) -> None:
    """Assert that voxels and positions equal those of a NIfTI file with `values` (D, H, W) and `affine`, up to the order of slices."""
    nibabel.save(nibabel.Nifti1Image(values.transpose(), affine), tmp_path / "same.nii")
    nifti = nibabel.load(tmp_path / "same.nii")
    wanted, meant, start = np.asarray(nifti.dataobj).transpose(), nifti.affine[:3, :3], nifti.affine[:3, 3]
    if np.dot(parts.axes[:, 2], meant[:, 2]) < 0:
        wanted, meant, start = wanted[::-1], meant * (1, 1, -1), (nifti.affine @ (0, 0, len(values) - 1, 1))[:3]
    np.testing.assert_array_equal(parts.array, wanted)
    np.testing.assert_allclose(parts.axes, meant, atol=1e-4)
    np.testing.assert_allclose(parts.origin, start, atol=1e-3)


def refused(path: Path, match: str, **options: int) -> None:
    with pytest.raises(VolumeError, match=match) as caught:
        dicom.read(path, "scan", **options)
    message = str(caught.value)
    assert message.startswith("scan: ") and message.endswith(".") and "\n" not in message and "secret" not in message.lower()

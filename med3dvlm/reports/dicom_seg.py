"""Write masks as a DICOM Segmentation of the DICOM files that a scan was read from: a binary segment for each, on the scan's own slices.

Patient and study are copied into it from the scan's own files (see `dicom_study.py`). Names are coded by `segment_codes.yaml`. Label and
description say that it is research output.
"""

import io
import re
import warnings as python_warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.base import VolumeError
from med3dvlm.formats.dicom_slices import Slice
from med3dvlm.reports.dicom_study import MUST_BE_THERE, REFERENCE, headers_of, identify, stack_of
from med3dvlm.reports.findings import finding_name

SERIES_NUMBER = 9001  # far from those that scanners give
LABEL, DESCRIPTION = "RESEARCH", "Research output, not verified"
CODES_FILE = Path(__file__).with_name("segment_codes.yaml")
PRIVATE_SCHEME, MAX_CODE_LENGTH, MAX_MEANING_LENGTH = "99MED3D", 16, 64
# Attributes of the slices' geometry, and others that highdicom needs of its source images.
GEOMETRY = """Rows Columns FrameOfReferenceUID PositionReferenceIndicator ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness
    SpacingBetweenSlices Modality SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence""".split()


def dicom_segmentation(
    path: Path, source: str, series: int | None, segments: Sequence[tuple[str, NDArray[np.bool_]]], software: tuple[str, str]
) -> bytes:
    """Return the bytes of a DICOM file: segments of the scan that `formats.read` gives for the first three arguments.

    Args:
        segments: names and masks (D, H, W) on the scan's own grid; none of the masks empty.
        software: name and version of what drew them.

    Raises:
        VolumeError: the path holds no DICOM scan, its files lack what a segmentation refers to, or the masks are of another grid.
        ValueError: there is no mask, or an empty one.
    """
    if empty := [name for name, mask in segments if not mask.any()] or ([] if segments else ["any finding"]):
        raise ValueError(f"There is no voxel in a mask of {', '.join(empty)}; a DICOM segmentation takes masks of what was found alone.")
    with python_warnings.catch_warnings():  # pydicom's quote values, which may tell who the patient is
        python_warnings.simplefilter("ignore")
        with stack_of(path, source, series, "segmentation") as stack:
            headers = headers_of(stack, source, "segmentation", GEOMETRY)
        first = next(iter(headers.values()))
        grid = (len(stack), first.get("Rows"), first.get("Columns"))
        if strange := [mask.shape for _, mask in segments if mask.shape != grid]:
            shapes = " and ".join("x".join(map(str, shape)) for shape in (strange[0], grid))
            raise VolumeError(f"{source}: a mask and the DICOM files differ in size ({shapes}); give masks on the scan as it is stored.")
        try:
            made = _document(stack, headers, segments, software, source)
            identify(made, first)
            stream = io.BytesIO()
            made.save_as(stream, enforce_file_format=True)
        except VolumeError:
            raise
        except Exception:  # highdicom and pydicom raise nearly anything on values that break the standard, and quote them
            raise VolumeError(
                f"{source}: the DICOM files do not state what a segmentation refers to (frame of reference, places, spacing), or against the "
                "standard; save the mask as NIfTI."
            ) from None
    return stream.getvalue()


def _document(
    stack: Sequence[Slice],
    headers: dict[Path, Any],
    segments: Sequence[tuple[str, NDArray[np.bool_]]],
    software: tuple[str, str],
    source: str,
) -> Any:
    """Return the segmentation without patient and study."""
    from highdicom import UID, AlgorithmIdentificationSequence
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.dataset import Dataset
    from pydicom.sr.codedict import codes

    images = []
    for header in headers.values():
        image = Dataset()
        for keyword in (*REFERENCE, *GEOMETRY, "NumberOfFrames"):
            if keyword in header:
                image[keyword] = header[keyword]
        for keyword in MUST_BE_THERE:
            setattr(image, keyword, None)
        images.append(image)
    pixels = np.stack([mask for _, mask in segments], axis=-1)  # (frames, H, W, K)
    if frames := int(images[0].get("NumberOfFrames", 0)):
        if len(images) > 1:
            raise VolumeError(f"{source}: the scan lies in several multi-frame files, which one segmentation cannot refer to; save NIfTI.")
        of_file = np.zeros((frames, *pixels.shape[1:]), bool)
        of_file[[each.frame for each in stack]] = pixels
        pixels = of_file
    algorithm = AlgorithmIdentificationSequence(*software[:1], family=codes.DCM.ArtificialIntelligence, version=software[1])
    descriptions = []
    for number, (name, _) in enumerate(segments, start=1):
        category, kind, region = segment_codes(name)
        descriptions.append(
            SegmentDescription(
                segment_number=number,
                segment_label=name[:MAX_MEANING_LENGTH],
                segmented_property_category=category,
                segmented_property_type=kind,
                algorithm_type="AUTOMATIC",
                algorithm_identification=algorithm,
                tracking_uid=UID(),
                tracking_id=f"{number} {name}"[:MAX_MEANING_LENGTH],
                anatomic_regions=None if region is None else [region],
            )
        )
    return Segmentation(
        images,
        pixels,
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        series_instance_uid=UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=UID(),
        instance_number=1,
        manufacturer=software[0],
        manufacturer_model_name=software[0],
        software_versions=software[1],
        device_serial_number="0",
        content_label=LABEL,
        content_description=DESCRIPTION,
        series_description=DESCRIPTION,
    )


def segment_codes(name: str) -> tuple[Any, Any, Any]:
    """Return category, type and region (or None) of a name as coded concepts: "lung_nodule" or "Lung nodule" -> abnormality, nodule, lung."""
    from highdicom.sr import CodedConcept

    def coded(code: Sequence[str]) -> CodedConcept:
        return CodedConcept(code[1], code[0], code[2])

    data = _codes()
    words = _plain(finding_name(name))
    entry = data["names"].get(words) or data["names"].get(_plain(name)) or {}
    private = (
        PRIVATE_SCHEME,
        re.sub(r"[^A-Z0-9]+", "_", words.upper())[:MAX_CODE_LENGTH].strip("_") or "SEGMENT",
        name.strip()[:MAX_MEANING_LENGTH],
    )
    region = entry.get("region")
    return (
        coded(data["categories"][entry.get("category", "abnormal")]),
        coded(entry.get("type", private)),
        None if region is None else coded(data["regions"][region]),
    )


@lru_cache(maxsize=1)
def _codes() -> dict[str, Any]:
    import yaml

    data: dict[str, Any] = yaml.safe_load(CODES_FILE.read_text(encoding="utf-8-sig"))
    return data | {"names": {_plain(name): entry for name, entry in data["names"].items()}}


def _plain(text: str) -> str:
    return re.sub(r"[\s_.-]+", " ", text).strip().casefold()

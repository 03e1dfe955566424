"""A DICOM Segmentation read by pydicom and highdicom: voxels in the patient's coordinates, references, codes and texts."""

import io
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest

from med3dvlm import read_volume
from med3dvlm.formats.base import VolumeError
from med3dvlm.reports.dicom_seg import dicom_segmentation, segment_codes
from med3dvlm.reports.findings import FINDINGS
from tests.formats.dicom_files import AFFINE, SHAPE, scan, turned, write_enhanced, write_series


def masks() -> list[tuple[str, np.ndarray]]:
    first, second = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    first[2:5, 4:9, 6:14] = True
    first[3, 5, 7] = False
    second[4:7, 8:12, 10:11] = True  # overlaps none of it
    second[4, 4, 6] = True  # but here
    return [("lung nodule", first), ("a cloud of words", second)]


def places(segmentation: pydicom.Dataset, number: int) -> set[tuple[float, ...]]:
    """Return the voxels of a segment in mm, LPS, from the positions of the frames by pydicom."""
    pixels = segmentation.pixel_array
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    found = set()
    for frame, groups in zip(pixels, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        if groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber != number:
            continue
        plane = (shared if "PlaneOrientationSequence" in shared else groups).PlaneOrientationSequence[0].ImageOrientationPatient
        start = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        down, across = (shared if "PixelMeasuresSequence" in shared else groups).PixelMeasuresSequence[0].PixelSpacing
        for row, column in np.argwhere(frame):
            place = start + np.array(plane[:3], float) * column * across + np.array(plane[3:], float) * row * down
            found.add(tuple(np.round(place, 2).tolist()))
    return found


def expected(path: Path, mask: np.ndarray) -> set[tuple[float, ...]]:
    """Return the same from the affine of the scan."""
    voxels = np.argwhere(mask)
    ras = (np.c_[voxels, np.ones(len(voxels))] @ read_volume(path).affine.T)[:, :3]
    return {tuple((np.round(place * (-1, -1, 1), 2) + 0.0).tolist()) for place in ras}


def same(found: set[tuple[float, ...]], wanted: set[tuple[float, ...]]) -> None:
    assert len(found) == len(wanted)
    np.testing.assert_allclose(sorted(found), sorted(wanted), atol=0.02)


@pytest.mark.parametrize("kind", ["series", "oblique series", "enhanced"])
def test_segments_lie_at_the_positions_of_the_masks(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "scan"
    path.mkdir()
    if kind == "enhanced":
        path = write_enhanced(path / "scan.dcm", scan())
    else:
        frame = pydicom.uid.generate_uid()
        affine = turned(20) if kind == "oblique series" else AFFINE
        write_series(path, scan(), affine, edit=lambda item, _: setattr(item, "FrameOfReferenceUID", frame))
    content = dicom_segmentation(path, str(path), None, masks(), ("med3dvlm", "0.1"))
    segmentation = pydicom.dcmread(io.BytesIO(content))
    for number, (_, mask) in enumerate(masks(), start=1):
        same(places(segmentation, number), expected(path, mask))
    files = [path] if path.is_file() else sorted(path.glob("*.dcm"))
    sources = {str(pydicom.dcmread(file).SOPInstanceUID) for file in files}
    referenced = segmentation.ReferencedSeriesSequence[0]
    assert {str(item.ReferencedSOPInstanceUID) for item in referenced.ReferencedInstanceSequence} == sources
    first = pydicom.dcmread(files[0])
    assert referenced.SeriesInstanceUID == first.SeriesInstanceUID
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert segmentation.get(keyword) == first.get(keyword)
    assert segmentation.SegmentationType == "BINARY" and segmentation.ContentLabel == "RESEARCH"
    assert "Research" in segmentation.ContentDescription and segmentation.SeriesInstanceUID != first.SeriesInstanceUID
    nodule, words = segmentation.SegmentSequence
    assert nodule.SegmentedPropertyTypeCodeSequence[0].CodeValue == "27925004"
    assert nodule.AnatomicRegionSequence[0].CodeValue == "39607008"
    assert words.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99MED3D"
    assert words.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "a cloud of words"
    assert nodule.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "med3dvlm"

    read = highdicom.seg.segread(io.BytesIO(content))
    volume = read.get_volume(combine_segments=False, rescale_fractional=False)
    for number, (_, mask) in enumerate(masks()):
        voxels = np.argwhere(volume.array[..., number])
        lps = (np.c_[voxels, np.ones(len(voxels))] @ volume.affine.T)[:, :3]
        same({tuple(np.round(place, 2).tolist()) for place in lps}, expected(path, mask))


def test_wrong_input(tmp_path: Path) -> None:
    write_series(tmp_path / "series", scan())
    np.save(tmp_path / "scan.npy", scan())
    cases = [
        (tmp_path / "scan.npy", masks(), "was not DICOM.*save the mask as NIfTI"),
        (tmp_path / "gone", masks(), "no longer there"),
        (tmp_path / "series", [("liver", masks()[0][1][:-1])], "differ in size"),
        (tmp_path / "series", [("liver", np.zeros(SHAPE, bool))], "no voxel in a mask of liver"),
        (tmp_path / "series", [], "no voxel in a mask of any finding"),
    ]
    for path, segments, words in cases:
        with pytest.raises(ValueError, match=words):
            dicom_segmentation(path, str(path), None, segments, ("med3dvlm", "0.1"))
    write_series(
        tmp_path / "lost", scan(), edit=lambda item, _: delattr(item, "FrameOfReferenceUID") if "FrameOfReferenceUID" in item else None
    )
    with pytest.raises(VolumeError, match="do not state what a segmentation refers to") as caught:
        dicom_segmentation(tmp_path / "lost", "lost", None, masks(), ("med3dvlm", "0.1"))
    assert "secret" not in str(caught.value).lower()


def test_names_and_codes() -> None:
    """Every finding has a type, no code exceeds DICOM's limit, and spelling does not matter."""
    known = [name for name in FINDINGS if segment_codes(name)[1].CodingSchemeDesignator != "99MED3D"]
    assert len(known) >= 22
    for name in (*FINDINGS, "x" * 200, "(?)"):
        for code in segment_codes(name):
            assert code is None or (0 < len(code.CodeValue) <= 16 and len(code.CodeMeaning) <= 64)
    assert segment_codes("Liver_mass")[1:] == segment_codes("liver mass")[1:]
    assert segment_codes("Spleen")[0].meaning == "Anatomical Structure" and segment_codes("lung nodule")[2].meaning == "Lung"

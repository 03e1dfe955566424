"""Reports as DICOM SR, read by pydicom and highdicom: content, patient, references, and identifiers that stay in the user's files."""

import io
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest
from highdicom.sr import EnhancedSR
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedSRStorage

from med3dvlm import read_volume
from med3dvlm.reports.draft import UNVERIFIED, KeyImage, read_report, report_dicom
from med3dvlm.volume import VolumeError
from tests.formats.dicom_files import scan, write_enhanced, write_series

REPORT = read_report("Findings: A nodule of 8 mm – 5 µm at its edge. No pleural effusion.\nImpression: Possible emphysema.")
WORDS = {
    "Comment": [UNVERIFIED],
    "Findings": ["A nodule of 8 mm – 5 µm at its edge. No pleural effusion."],
    "Impressions": ["Possible emphysema."],
    "Summary": ["lung nodule: present", "pleural effusion: absent", "emphysema: uncertain"],
}


def patient(item: Dataset, _: int) -> None:
    item.SpecificCharacterSet = "ISO_IR 100"
    item.PatientName, item.PatientSex, item.PatientBirthDate = "Müller^Jürgen", "M", "19500102"
    item.StudyTime, item.StudyID, item.AccessionNumber, item.ReferringPhysicianName = "101112", "7", "ACC1", "Doctor^Dora"


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("series"), scan(), edit=patient)


def read_back(content: bytes) -> EnhancedSR:
    stored = pydicom.dcmread(io.BytesIO(content))  # without force: a whole DICOM file
    assert stored.SOPClassUID == stored.file_meta.MediaStorageSOPClassUID == EnhancedSRStorage
    return EnhancedSR.from_dataset(stored)


def texts(report: Dataset) -> dict[str, list[str]]:
    """Return the text of each section by its concept, and texts outside of sections by their own concept."""
    found: dict[str, list[str]] = {}
    for item in report.ContentSequence:
        meaning = item.ConceptNameCodeSequence[0].CodeMeaning
        if item.ValueType == "CONTAINER":
            found[meaning] = ["".join(each.TextValue) for each in item.ContentSequence]
        elif item.RelationshipType == "CONTAINS":
            found[meaning] = ["".join(item.TextValue)]
    return found


def test_content_and_unverified_status(series: Path) -> None:
    report = read_back(report_dicom(REPORT, series))
    assert texts(report) == WORDS
    assert (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag) == ("PARTIAL", "UNVERIFIED", "PRELIMINARY")
    assert "VerifyingObserverSequence" not in report
    assert report.ConceptNameCodeSequence[0].CodeValue == "18748-4"  # LOINC: diagnostic imaging report
    observers = {item.ConceptNameCodeSequence[0].CodeValue: item for item in report.ContentSequence}
    assert observers["121005"].ConceptCodeSequence[0].CodeValue == "121007"  # DCM: observer type is device


def test_references_to_slices_and_study(series: Path) -> None:
    slices = [pydicom.dcmread(file) for file in series.glob("*.dcm")]
    report = read_back(report_dicom(REPORT, series))
    expected = {(item.StudyInstanceUID, item.SeriesInstanceUID, item.SOPInstanceUID, item.SOPClassUID) for item in slices}
    assert len(expected) == 10 and set(report.get_evidence(current_procedure_only=True)) == expected
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID"):
        assert report[keyword].value == slices[0][keyword].value, keyword
    assert (report.AccessionNumber, report.ReferringPhysicianName) == ("ACC1", "Doctor^Dora")
    assert str(report.PatientName) == "Müller^Jürgen" and report.SpecificCharacterSet == "ISO_IR 192"
    assert report.SeriesInstanceUID != slices[0].SeriesInstanceUID and report.Modality == "SR"


def test_every_report_has_its_own_instance_uid(series: Path) -> None:
    one, other = (read_back(report_dicom(REPORT, series)) for _ in range(2))
    assert one.SOPInstanceUID != other.SOPInstanceUID and one.SeriesInstanceUID != other.SeriesInstanceUID


def test_references_are_to_the_series_that_was_read(series: Path, tmp_path: Path) -> None:
    shutil.copytree(series, tmp_path / "both")
    write_series(tmp_path / "both", scan(), only=range(6), prefix="OTHER", edit=lambda item, _: item.update({"PatientID": "ID-SECRET"}))
    for number, slices in ((None, 10), (1, 10), (2, 6)):
        assert read_volume(tmp_path / "both", series=number).shape[0] == slices
        assert len(read_back(report_dicom(REPORT, tmp_path / "both", number)).get_evidence()) == slices
    with pytest.raises(VolumeError, match="no series 3"):
        report_dicom(REPORT, tmp_path / "both", 3)


@pytest.mark.parametrize("packed", [False, True])
def test_key_images_refer_to_their_slices_in_the_scans_order(series: Path, tmp_path: Path, packed: bool) -> None:
    pictures = (KeyImage("axial, slice 3 of 10", b"", 7), KeyImage("coronal, slice 1 of 20", b"", None), KeyImage("axial", b"", 0))
    report = replace(REPORT, key_images=pictures)
    where = shutil.make_archive(str(tmp_path / "scan"), "zip", series) if packed else series
    (section,) = (
        item
        for item in read_back(report_dicom(report, where)).ContentSequence
        if item.ConceptNameCodeSequence[0].CodeMeaning == "Key Images"
    )
    kinds = [item.ValueType for item in section.ContentSequence]
    assert kinds == ["TEXT", "IMAGE", "TEXT", "TEXT", "IMAGE"]
    assert [item.TextValue for item in section.ContentSequence if item.ValueType == "TEXT"] == [image.label for image in pictures]
    upwards = sorted((pydicom.dcmread(file) for file in series.glob("*.dcm")), key=lambda item: item.ImagePositionPatient[2])
    referenced = [item.ReferencedSOPSequence[0] for item in section.ContentSequence if item.ValueType == "IMAGE"]
    assert [item.ReferencedSOPInstanceUID for item in referenced] == [upwards[7].SOPInstanceUID, upwards[0].SOPInstanceUID]
    assert not any("ReferencedFrameNumber" in item for item in referenced)

    whole = write_enhanced(tmp_path / "enhanced.dcm", scan(), order=range(9, -1, -1))
    content = read_back(report_dicom(report, whole)).ContentSequence[-1].ContentSequence
    assert [item.ReferencedSOPSequence[0].ReferencedFrameNumber for item in content if item.ValueType == "IMAGE"] == [3, 10]


def test_archives_and_multi_frame_files(series: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "scan"), "zip", series)
    assert len(read_back(report_dicom(REPORT, archive)).get_evidence()) == 10
    whole = write_enhanced(tmp_path / "enhanced.dcm", scan())
    assert [uids[2] for uids in read_back(report_dicom(REPORT, whole)).get_evidence()] == [pydicom.dcmread(whole).SOPInstanceUID]


def test_missing_elements_stay_empty(tmp_path: Path) -> None:
    def anonymous(item: Dataset, _: int) -> None:
        del item.PatientName, item.PatientID, item.StudyDate
        item.PatientIdentityRemoved = "YES"

    report = read_back(report_dicom(REPORT, write_series(tmp_path / "scan", scan(), edit=anonymous)))
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName"):
        assert keyword in report and not report[keyword].value, keyword  # type 2: present, empty
    assert report.PatientIdentityRemoved == "YES"


def test_odd_values_are_copied_and_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    def odd(item: Dataset, _: int) -> None:
        item.PatientName, item.PatientID = "Secret Name without carets", "ID-SECRET"  # highdicom would log this name
        with pydicom.config.disable_value_validation():
            item.PatientSex, item.PatientBirthDate = "UNKNOWN", "1950-01-02"  # both break the standard

    folder = write_series(tmp_path / "scan", scan(), edit=odd)
    caplog.set_level(logging.DEBUG)
    report = read_back(report_dicom(REPORT, folder))
    assert (report.PatientName, report.PatientSex, report.PatientBirthDate) == ("Secret Name without carets", "UNKNOWN", "1950-01-02")
    said = caplog.text + "".join(str(warning.message) for warning in recwarn)
    assert "Secret" not in said and "SECRET" not in said


def wrong(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    yield tmp_path / "gone", "no longer there"
    (tmp_path / "scan.nii.gz").write_bytes(b"\x1f\x8bno DICOM")
    yield tmp_path / "scan.nii.gz", "was not DICOM"
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(b"\x89PNG")
    yield tmp_path / "pictures", "was not DICOM"
    yield Path(shutil.make_archive(str(tmp_path / "pictures"), "zip", tmp_path / "pictures")), "was not DICOM"
    lacking = write_series(tmp_path / "lacking", scan(), edit=lambda item, _: item.pop("StudyInstanceUID"))
    yield lacking, "no StudyInstanceUID"


def test_wrong_input(tmp_path: Path) -> None:
    for path, sentence in wrong(tmp_path):
        with pytest.raises(VolumeError, match=sentence) as caught:
            report_dicom(REPORT, path)
        assert "SECRET" not in str(caught.value) and "Secret" not in str(caught.value)
        assert str(caught.value).startswith(str(path))

"""Uploaded scans: every format, DICOM series of several files, file names with a patient's name, examples, and the files left on the disk."""

import gc
import io
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from med3dvlm.app.scans import EXAMPLES, example, read_uploads, sweep
from med3dvlm.app.session import Session
from med3dvlm.app.workstation import Workstation
from med3dvlm.volume import VolumeError

from .conftest import files_with_content

LIMIT = 2**30


def dicom_series(folder: Path, slices: int = 6) -> list[Path]:
    """Writes CT slices 2 mm apart, with a person's name in their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    series, study, paths = generate_uid(), generate_uid(), []
    for number in range(slices):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        file.SOPClassUID, file.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        file.SeriesInstanceUID, file.StudyInstanceUID, file.Modality = series, study, "CT"
        file.PatientName, file.PatientID, file.PatientSex, file.PatientBirthDate = "Doe^Jane", "4711", "F", "19700101"
        file.StudyDate, file.StudyTime, file.StudyID, file.AccessionNumber, file.ReferringPhysicianName = (
            "20200101",
            "120000",
            "1",
            "2",
            "Roe",
        )
        file.ImagePositionPatient, file.ImageOrientationPatient = [0, 0, 2 * number], [1, 0, 0, 0, 1, 0]
        file.PixelSpacing, file.Rows, file.Columns = [0.5, 0.5], 20, 30
        file.BitsAllocated = file.BitsStored = 16
        file.HighBit, file.PixelRepresentation, file.SamplesPerPixel, file.PhotometricInterpretation = 15, 1, 1, "MONOCHROME2"
        file.RescaleSlope, file.RescaleIntercept = 1, -1024
        file.PixelData = np.random.default_rng(number).integers(0, 2000, (20, 30)).astype("<i2").tobytes()
        path = folder / f"Doe Jane.{number:03d}"
        pydicom.dcmwrite(path, file, enforce_file_format=True)
        paths.append(path)
    return paths


def two_series(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the files of a study with series of 8 and of 5 slices, and those of the second series."""
    long, short = dicom_series(folder / "long", 8), dicom_series(folder / "short", 5)
    study = pydicom.dcmread(long[0]).StudyInstanceUID
    for path in short:
        file = pydicom.dcmread(path)
        file.StudyInstanceUID, file.SeriesNumber = study, 7
        file.save_as(path)
    (folder / "both").mkdir()
    return [Path(shutil.copy(path, folder / "both" / f"{path.parent.name} {path.name}")) for path in (*long, *short)], short


def mixed_series(folder: Path) -> list[Path]:
    """Return a series of 4 axial and 4 coronal slices, of which neither is clearly the scan."""
    files = dicom_series(folder, 8)
    for number, path in enumerate(files[4:]):
        file = pydicom.dcmread(path)
        file.ImagePositionPatient, file.ImageOrientationPatient = [0, 3 * number, 0], [1, 0, 0, 0, 0, -1]
        file.save_as(path)
    return files


def uploaded(tmp_path: Path, *sources: Path) -> list[Path]:
    """Copies of the files, as Gradio leaves them: each in a folder of its own."""
    copies = []
    for number, source in enumerate(sources):
        copies.append(tmp_path / "uploads" / str(number) / source.name)
        copies[-1].parent.mkdir(parents=True)
        shutil.copy(source, copies[-1])
    return copies


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".npy"])
def test_every_format_is_read_and_deleted(tmp_path, scan, ending) -> None:
    source = tmp_path / f"Doe_Jane{ending}"
    image = SimpleITK.ReadImage(str(scan()))
    if ending == ".npy":
        np.save(source, SimpleITK.GetArrayFromImage(image))
    else:
        SimpleITK.WriteImage(image, str(source))
    for name in (source.name, "file") if ending != ".npy" else (source.name,):  # one without an ending is known by its first bytes
        (upload,) = uploaded(tmp_path / f"as {name}", source)
        upload = upload.rename(upload.with_name(name))
        read = read_uploads([upload], LIMIT)
        np.testing.assert_array_equal(read.volume.array, SimpleITK.GetArrayFromImage(image))
        assert "Doe" not in f"{read.facts} {read.warnings} {read.volume.source}" and read.files is None
        assert files_with_content(upload.parent) == []


@pytest.mark.parametrize("packed", [False, True])
def test_a_dicom_series_keeps_its_files_as_long_as_it_is_open(tmp_path, packed) -> None:
    sources = dicom_series(tmp_path / "series")
    if packed:
        with zipfile.ZipFile(tmp_path / "Doe.zip", "w") as archive:
            for source in sources:
                archive.write(source, source.name)
        sources = [tmp_path / "Doe.zip"]
    read = read_uploads(uploaded(tmp_path, *sources[::-1]), LIMIT)
    assert read.volume.shape == (6, 20, 30) and read.volume.spacing == pytest.approx((2, 0.5, 0.5)) and read.volume.unit == "HU"
    np.testing.assert_array_equal(read.volume.array[3], np.random.default_rng(3).integers(0, 2000, (20, 30)) - 1024)
    assert "Doe" not in f"{read.facts} {read.warnings} {read.files}" and read.files.exists()
    kept = files_with_content(tmp_path / "uploads")
    assert len(kept) == len(sources) and not any("Doe" in str(path) for path in kept)
    del read
    gc.collect()
    assert files_with_content(tmp_path / "uploads") == []


def test_files_that_are_no_series_are_refused_without_naming_them(tmp_path, scan) -> None:
    for sources, words in (
        ([scan(), scan(12)], "not all are of one DICOM series"),
        ([*dicom_series(tmp_path / "series"), scan()], "not all are of one DICOM series"),
    ):
        with pytest.raises(VolumeError, match=words) as told:
            read_uploads(uploaded(tmp_path / words[:3] / str(len(sources)), *sources), LIMIT)
        assert "Doe" not in str(told.value)
    notes = tmp_path / "Doe Jane.txt"
    notes.write_text("no scan")
    with pytest.raises(VolumeError) as told:
        read_uploads(uploaded(tmp_path, notes, notes), LIMIT)
    assert "Doe" not in str(told.value) and str(tmp_path) not in str(told.value)
    assert files_with_content(tmp_path / "uploads") == []


def test_unread_uploads_are_deleted_and_open_scans_kept(tmp_path) -> None:
    for place in ("hash/Doe_Jane.nii.gz", "tmpcut", "hash/scan-1/00001.dcm", "new/Doe.nii"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(b"scan")
        os.utime(tmp_path / place, (0, 0) if "new" not in place else None)
    sweep(tmp_path, 60)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["00001.dcm", "Doe.nii"]


def test_examples_are_phantoms_that_stay_the_same() -> None:
    for name in EXAMPLES:
        scan = example(name)
        assert scan is example(name)
        assert scan.volume.unit == "HU" and scan.volume.plane == "axial" and "no patient" in scan.facts["Read from"]
        assert scan.volume.array.min() < -900 and scan.volume.array.max() > 300


def test_a_scan_is_straightened_where_the_models_processor_does(tmp_path: Path) -> None:
    """An overlay then lies on the volume that is shown."""
    values = SimpleITK.GetImageFromArray(np.random.default_rng(0).integers(-1000, 1000, (6, 20, 30)).astype(np.int16))
    values.SetDirection([1, 0, 0, 0, 1, 0.5, 0, 0, 0.75**0.5])
    for straighten in (False, True):
        path = tmp_path / str(straighten) / "scan.mha"
        path.parent.mkdir()
        SimpleITK.WriteImage(values, path)
        processor = SimpleNamespace(image_processor=SimpleNamespace(straighten=straighten))
        scan = Workstation(SimpleNamespace(processor=processor)).open_uploads(Session(), [str(path)])
        assert scan.volume.regular == straighten and scan.picture.stored.shape == scan.volume.shape


def test_a_study_with_an_ambiguous_scan_is_opened_by_choosing_a_series(tmp_path) -> None:
    workstation, session = Workstation(SimpleNamespace(), "none"), Session()
    files = [str(path) for path in uploaded(tmp_path, *mixed_series(tmp_path / "mixed"))]
    with pytest.raises(VolumeError, match="mixes 2 orientations .* choose one by series number, or give its files alone: 1: 4 slices"):
        workstation.open_uploads(session, files)
    assert session.scan is None and session.undecided is not None
    listed, folder = workstation.viewer_data(session)["series"], session.undecided.upload.path
    assert [(number, words[:8], open) for number, words, open in listed] == [(1, "4 slices", False), (2, "4 slices", False)]
    with pytest.raises(VolumeError, match="no series 3"):
        workstation.open_series(session, 3)
    scan = workstation.open_series(session, 2)
    assert session.scan is scan and len(scan.volume.array) == 4 and session.undecided is None
    assert [open for *_, open in workstation.viewer_data(session)["series"]] == [False, True]
    session.close()
    del scan
    gc.collect()
    assert not folder.exists()


def test_another_series_of_a_study_is_opened_from_the_same_upload(tmp_path) -> None:
    uploads, short = two_series(tmp_path)
    workstation, session = Workstation(SimpleNamespace(), "none"), Session()
    first = workstation.open_uploads(session, [str(path) for path in uploads])
    assert len(first.volume.array) == 8 and "choose another by series number" in " ".join(first.warnings)
    listed = workstation.viewer_data(session)["series"]
    assert sorted(open for _, _, open in listed) == [False, True] and "Doe" not in str(listed)
    (other,) = [number for number, _, open in listed if not open]
    second = workstation.open_series(session, other)
    assert len(second.volume.array) == 5 and session.scan is second
    assert [number for number, _, open in workstation.viewer_data(session)["series"] if open] == [other]
    wanted = {pydicom.dcmread(path).SOPInstanceUID for path in short}
    saved = pydicom.dcmread(io.BytesIO(workstation.save_report(session, "dcm", "Clear lungs.")))  # refers to the series that is open
    named = {
        item.ReferencedSOPInstanceUID
        for item in saved.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    }
    assert named == wanted
    with pytest.raises(VolumeError, match="no series 99"):
        workstation.open_series(session, 99)
    assert session.scan is second and second.files.exists()
    folder = second.files
    session.close()
    del first, second
    gc.collect()
    assert not folder.exists()

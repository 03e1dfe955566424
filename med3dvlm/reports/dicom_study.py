"""Read the DICOM files of a scan again, for a report or a segmentation that is filed with their study.

Such an object has to name the patient. Nothing of that is kept when a scan is read: the headers are read again here, and go from the user's own
files into the user's own object and nowhere else. highdicom writes the object and is given no patient, since its messages quote what it is
given; patient and study are copied beside it, as they stand in the files.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from med3dvlm.formats import archive, dicom
from med3dvlm.formats.base import VolumeError
from med3dvlm.formats.dicom_elements import DAMAGED, unusable
from med3dvlm.formats.dicom_header import dicom_files
from med3dvlm.formats.dicom_slices import Slice

UTF_8 = "ISO_IR 192"
REFERENCE = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
# Attributes that file the report with its patient and study; PatientIdentityRemoved and its method keep a de-identified study marked as such.
IDENTITY = """PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex PatientIdentityRemoved DeidentificationMethod
    StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName""".split()
MUST_BE_THERE = """PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber
    ReferringPhysicianName""".split()  # empty where the files state none
INSTEAD = {"report": "save it as text, Markdown or JSON", "segmentation": "save the mask as NIfTI"}


@contextmanager
def stack_of(path: Path, source: str, series: int | None, kind: str) -> Iterator[list[Slice]]:
    """Yield the slices of the scan that `formats.read` gives for the first three arguments; the files of an archive are gone afterwards.

    Args:
        kind: what is made of it, a key of `INSTEAD`.

    Raises:
        VolumeError: the path holds no DICOM scan.
    """
    if path.is_file() and not dicom.is_dicom(path) and path.suffix.lower() == ".zip":
        with archive.unpacked(path, source) as folder, stack_of(folder, source, series, kind) as stack:
            yield stack
        return
    require_dicom(path, source, kind)
    yield dicom.stack_of(path, source, series)


def require_dicom(path: Path, source: str, kind: str) -> None:
    """Raise VolumeError where a path holds no DICOM file; the content of an archive is checked when it is unpacked."""
    if not path.exists():
        raise VolumeError(f"{source}: the scan is no longer there, and a DICOM {kind} is made from its files; give the scan again.")
    if path.is_file() and path.suffix.lower() == ".zip":
        return
    if not (dicom.is_dicom(path) if path.is_file() else dicom_files(path, source)):
        raise VolumeError(f"{source}: the scan was not DICOM, so there is no study to file a DICOM {kind} with; {INSTEAD[kind]}.")


def headers_of(stack: Sequence[Slice], source: str, kind: str, more: Sequence[str] = ()) -> dict[Path, Any]:
    """Return for each file of a stack, in order, the attributes that refer to it, those of patient and study, and `more`.

    Raises:
        VolumeError: a file is damaged or has no UIDs.
    """
    return {file: _header(file, source, kind, more) for file in dict.fromkeys(each.path for each in stack)}


def _header(file: Path, source: str, kind: str, more: Sequence[str]) -> Any:
    import pydicom

    try:
        header = pydicom.dcmread(
            file,
            stop_before_pixels=True,
            specific_tags=[*REFERENCE, *IDENTITY, *more, "NumberOfFrames", "SpecificCharacterSet"],
            force=True,
        )
        header.decode()  # texts, by the character set that the file names
        missing = [keyword for keyword in REFERENCE if not header.get(keyword)]
    except Exception:
        raise unusable({DAMAGED: 1}, source) from None
    if missing:
        raise VolumeError(f"{source}: the DICOM files state no {missing[0]}, by which a {kind} would refer to them; export them again.")
    return header


def identify(made: Any, header: Any) -> None:
    """Copy patient and study from a header, but for the character set."""
    for keyword in IDENTITY:
        if keyword in header:
            made[keyword] = header[keyword]

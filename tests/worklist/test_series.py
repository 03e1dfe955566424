"""Scans of a folder as cases: the chosen series of a DICOM study, without names and UIDs."""

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from med3dvlm import VolumeProcessor
from med3dvlm.formats.dicom import Series
from med3dvlm.worklist.reading import Case, Failure, read_cases
from med3dvlm.worklist.scans import scans_of
from med3dvlm.worklist.series import chosen
from tests.formats.dicom_files import SAGITTAL, scan, write_series

STUDY = "1.2.826.0.1.3680043.8.498.11"


def series(
    number: int, study: str = "s", plane: str = "axial", thickness: float | None = 5.0, derived: bool = False, **more: object
) -> Series:
    known = {"slices": 100, "extent": 1e6, "doubt": "", **more}
    return Series(number, study, f"uid{number}", plane=plane, thickness=thickness, derived=derived, **known)  # type: ignore[arg-type]


def test_the_thinnest_axial_series_that_covers_enough() -> None:
    study = [
        series(1, slices=200),
        series(2, thickness=1.0),
        series(3, thickness=0.6, extent=4e5),  # a small part of the body
        series(4, thickness=0.5, derived=True),
        series(5, thickness=0.5, plane="coronal"),
        series(6, thickness=0.5, doubt="one series mixes 2 orientations"),
        series(7, thickness=1.0),
        series(8, thickness=None),
        series(9, study="other", plane="sagittal"),
    ]
    assert [one.number for one in chosen(study, "thin-axial")] == [2, 9]
    assert chosen(study, "all") == study


def of(thickness: float, study: str = STUDY, patient: str = "Doe^Jane") -> object:
    def edit(item: Dataset, _: int) -> None:
        item.StudyInstanceUID, item.SliceThickness, item.PatientName, item.SeriesDescription = study, thickness, patient, "Dr. Roe"

    return edit


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, values = tmp_path_factory.mktemp("archive"), scan()
    for name, thickness in (("thick", 5.0), ("thin", 1.0)):
        write_series(root / "p1" / name, values, edit=of(thickness), prefix=name)
    write_series(root / "p1" / "side", values, SAGITTAL, edit=of(0.5))
    for prefix, study in (("A", f"{STUDY}.1"), ("B", f"{STUDY}.2")):  # two studies in one folder
        write_series(root / "p2" / "dump", values, edit=of(2.0, study), prefix=prefix)
    (root / "p2" / "dump" / "A0000.dcm").write_bytes(b"")
    write_series(root / "p3" / "x", values, edit=of(2.0, f"{STUDY}.3"))
    (root / "p3" / "x" / "preview.png").write_bytes(b"no picture")
    np.save(root / "p3" / "array.npy", values)
    return root


def read(root: Path, rule: str) -> list[Case | Failure]:
    scans, _ = scans_of(root, root / "out")
    processor = VolumeProcessor("m3d", size=(8, 16, 16))
    return [case for each in scans for case in read_cases(each, [processor], rule)]


def test_studies_and_series_become_cases(root: Path) -> None:
    cases = {case.id: case for case in read(root, "thin-axial")}
    # Half a copy in p2/dump is told of; a study whose series lie in several folders is one case.
    assert list(cases) == ["p1", "p2/dump", "p3/array", "p3/x"]
    assert isinstance(cases["p2/dump"], Failure) and "p2" not in cases["p2/dump"].reason and "damaged" in cases["p2/dump"].reason
    thin = cases["p1"]
    assert isinstance(thin, Case) and thin.facts["series"]["of"] == 3 and thin.facts["series"]["rule"] == "thin-axial"
    assert any("1 mm thick" in warning and f"number {thin.facts['series']['number']} is read" in warning for warning in thin.warnings)
    assert [np.asarray(voxels).shape for voxels in thin.voxels] == [(1, 8, 16, 16)]

    (root / "p2" / "dump" / "A0000.dcm").unlink()
    every = read(root, "all")
    ids = [case.id for case in every]
    assert ids[:3] == ["p1/series-1", "p1/series-2", "p1/series-3"] and ids[-2:] == ["p3/array", "p3/x"]
    assert len(ids) == 7 and all(id.startswith("p2/dump/study-") for id in ids[3:5])
    told = repr([(case.id, case.facts, case.warnings) for case in every if isinstance(case, Case)])
    assert not any(name in told for name in ("Doe", "Jane", "Roe", STUDY, str(root)))

"""DICOM slices of one series: which attributes separate them into stacks, and which must not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from med3dvlm.formats import dicom
from tests.formats.dicom_files import AFFINE, one, read, refused, same_as_nifti, save, scan, write_enhanced, write_series
from tests.formats.stacks import SERIES, VENOUS, read_both, shifted, stated, two

TELLING = [
    ({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}, "acquisition 1", "acquisition 2"),
    ({}, {"ContrastBolusAgent": "secret"}, "no contrast agent", "contrast agent"),
    ({"ConvolutionKernel": "B30f"}, {"ConvolutionKernel": "B70f"}, "kernel B30f", "kernel B70f"),
    ({"TemporalPositionIdentifier": 1}, {"TemporalPositionIdentifier": 2}, "temporal position 1", "temporal position 2"),
    ({"TriggerTime": 40}, {"TriggerTime": 250.5}, "trigger delay 40 ms", "trigger delay 250.5 ms"),
    ({"EchoTime": 4.6}, {"EchoTime": 9.2}, "echo time 4.6 ms", "echo time 9.2 ms"),
    ({"DiffusionBValue": 0.0}, {"DiffusionBValue": 800.0}, "b-value 0", "b-value 800"),
    ({"KVP": 80}, {"KVP": 140}, "80 kV", "140 kV"),
    ({"SliceThickness": 2.5}, {"SliceThickness": 5}, "2.5 mm thick", "5 mm thick"),
    ({"ReconstructionDiameter": 200}, {"ReconstructionDiameter": 400}, "field of 200 mm", "field of 400 mm"),
    ({"FrameOfReferenceUID": "1.2.5"}, {"FrameOfReferenceUID": "1.2.6"}, "frame of reference 1 of 2", "frame of reference 2 of 2"),
    ({"SeriesNumber": 3}, {"SeriesNumber": 4}, "series 3", "series 4"),
    ({"AcquisitionTime": "101500.0"}, {"AcquisitionTime": "101600.0"}, "time 1 of 2", "time 2 of 2"),
]


@pytest.mark.parametrize("offset", [0, 0.01, 1.25, 0.7])
@pytest.mark.parametrize(
    ("first", "second", "one_word", "other_word"), TELLING, ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_attributes_that_separate_the_stacks_of_a_series(
    tmp_path: Path, first: dict[str, object], second: dict[str, object], one_word: str, other_word: str, offset: float
) -> None:
    """The second stack lies at the same positions, nearly so, half-way between them, or elsewhere between them."""
    folder = two(tmp_path / "scan", first, second, offset=offset)
    refused(
        folder, f"choose one by series number, .* alone: 1: 10 slices of 20 x 30, CT, {one_word}; 2: 10 slices of 20 x 30, CT, {other_word}"
    )
    assert read_both(folder, tmp_path, offset=offset) == [one_word, other_word]


def test_two_kernels_of_two_acquisitions(tmp_path: Path) -> None:
    for number in range(4):
        edit = stated(AcquisitionNumber=1 + number // 2, ConvolutionKernel=["SOFT", "BONE"][number % 2])
        write_series(tmp_path, scan() + number, prefix="ABCD"[number], edit=edit)
    refused(tmp_path, "40 slices at 10 places are no single stack but a 4D series, 4 times each")
    found = {}
    for number in (1, 2, 3, 4):
        parts = read(tmp_path, series=number)
        found[parts.series[0].split("CT, ")[1]] = int(parts.array.min()) + 1000
    assert found == {f"acquisition {a}, kernel {k}": 2 * (a - 1) + (k == "BONE") for a in (1, 2) for k in ("SOFT", "BONE")}


@pytest.mark.parametrize("offset", [0, 0.7, 1.25])
@pytest.mark.parametrize("by", [{}, {"AcquisitionNumber": lambda index: index // 3 + 1}], ids=["number", "step and shoot"])
def test_repeated_passes_are_separated_by_their_order(tmp_path: Path, by: dict[str, object], offset: float) -> None:
    later = {"InstanceNumber": lambda index: 11 + index, "AcquisitionNumber": lambda index: 101 + index // 3}
    later = {name: value for name, value in later.items() if name == "InstanceNumber" or name in by}
    folder = two(tmp_path / "scan", by, later, offset=offset)
    assert read_both(folder, tmp_path, offset=offset) == [f"pass in the order of acquisition {number} of 2" for number in (1, 2)]


def test_passes_in_opposite_directions(tmp_path: Path) -> None:
    """A shuttling table takes such passes."""
    folder = two(tmp_path / "scan", {}, {"InstanceNumber": lambda index: 20 - index})
    assert read_both(folder, tmp_path) == ["pass in the order of acquisition 1 of 2", "pass in the order of acquisition 2 of 2"]


def test_two_fields_of_view_at_the_same_heights(tmp_path: Path) -> None:
    """Such as the left and the right ear."""
    right = AFFINE.copy()
    right[0, 3] -= 90
    write_series(tmp_path, scan(), prefix="A", edit=stated(InstanceNumber=5))
    write_series(tmp_path, VENOUS, right, prefix="B", edit=stated(InstanceNumber=5))
    refused(tmp_path, "CT, field 1 of 2; 2: 10 slices of 20 x 30, CT, field 2 of 2")
    same_as_nifti(read(tmp_path, series=2), VENOUS, right, tmp_path)


def test_interleaved_slices_of_an_mr(tmp_path: Path) -> None:
    """Every second slice was taken first; they are one stack."""
    numbers = [1 + index // 2 + 5 * (index % 2) for index in range(10)]
    for name, values in {
        "time": {"AcquisitionTime": lambda index: f"10150{index % 2}"},
        "number": {"InstanceNumber": numbers.__getitem__},
    }.items():
        parts = read(write_series(tmp_path / name, scan(), edit=stated(Modality="MR", **values)))
        same_as_nifti(parts, scan(), AFFINE, tmp_path)


def test_all_images_of_one_position_before_those_of_the_next(tmp_path: Path) -> None:
    folder = two(tmp_path / "scan", {"InstanceNumber": lambda i: 2 * i + 1}, {"InstanceNumber": lambda i: 2 * i + 2})
    assert read_both(folder, tmp_path) == ["pass in the order of acquisition 1 of 2", "pass in the order of acquisition 2 of 2"]


def test_many_time_points(tmp_path: Path) -> None:
    for point in range(30):
        edit = stated(TemporalPositionIdentifier=point + 1, InstanceNumber=lambda index, point=point: 10 * point + index)
        write_series(tmp_path, scan()[:4] + point, prefix=f"P{point:02d}_", edit=edit)
    refused(tmp_path, "120 slices at 4 places are no single stack but a 4D series, 30 times each .*; 20: 4 slices .*; and so on up to 30")
    for number in (1, 17, 30):
        np.testing.assert_array_equal(read(tmp_path, series=number).array, scan()[:4] + number - 1)


def test_phases_in_one_multi_frame_file(tmp_path: Path) -> None:
    values = np.concatenate([scan()[:5], scan()[:5] + 100])

    def phases(item: Dataset) -> None:
        for index, frame in enumerate(item.PerFrameFunctionalGroupsSequence):
            frame.FrameContentSequence = one(TemporalPositionIndex=index // 5 + 1, DimensionIndexValues=[index // 5 + 1, index % 5 + 1])
            frame.PlanePositionSequence[0].ImagePositionPatient[2] -= 12.5 * (index // 5)

    path = write_enhanced(tmp_path / "scan.dcm", values, edit=phases)
    refused(path, "choose one by series number, .* alone: 1: 5 slices of 20 x 30, CT, temporal position 1; 2: 5 slices")
    np.testing.assert_array_equal(read(path, series=1).array, scan()[:5])
    np.testing.assert_array_equal(read(path, series=2).array, scan()[:5] + 100)
    assert {each.path for each in dicom.stack_of(path, "scan", 2)} == {path}


def test_a_file_for_each_phase(tmp_path: Path) -> None:
    for number, name in enumerate("AB"):
        write_enhanced(tmp_path / f"{name}.dcm", scan() + 100 * number, edit=lambda item: item.update(SERIES))
    refused(tmp_path, "CT, file 1 of 2; 2: 10 slices of 20 x 30, CT, file 2 of 2")
    np.testing.assert_array_equal(read(tmp_path, series=2).array, VENOUS)


def test_phases_without_positions(tmp_path: Path) -> None:
    def blind(number: int) -> Callable[[Dataset, int], None]:
        def edit(item: Dataset, index: int) -> None:
            stated(AcquisitionNumber=number)(item, index)
            del item.ImagePositionPatient

        return edit

    write_series(tmp_path, scan(), prefix="A", edit=blind(1))
    write_series(tmp_path, VENOUS, prefix="B", edit=blind(2))
    refused(tmp_path, "4D series, 2 times each .* CT, acquisition 1; 2: 10 slices of 20 x 30, CT, acquisition 2")
    np.testing.assert_array_equal(read(tmp_path, series=2).array, VENOUS)


@pytest.mark.parametrize(
    "values",
    [
        {"AcquisitionNumber": lambda index: index + 1},
        {"AcquisitionNumber": lambda index: index // 3},
        {"AcquisitionTime": lambda index: f"1015{index // 2:02d}"},
        {"ImageType": lambda index: ["ORIGINAL", "PRIMARY", "AXIAL", *(["FIRST"] if index == 4 else [])]},
        {"ImageType": lambda index: ["ORIGINAL", "PRIMARY", "AXIAL", *(["FIRST"] if index in (0, 9) else [])]},
        {"ImageType": lambda index: ["ORIGINAL", "PRIMARY", "AXIAL", *(["FIRST"] if index in (2, 3, 8) else [])]},
        {"SliceThickness": lambda index: 2.5 + 0.001 * index, "KVP": lambda index: 100 if index < 5 else 120},
        {"FrameOfReferenceUID": lambda index: f"1.2.{index + 1}", "SeriesNumber": lambda index: index + 1},
        {"ContrastBolusAgent": lambda index: "secret" if index else ""},
        {"KVP": lambda index: 80 + 60 * (index % 2), "AcquisitionNumber": lambda index: index % 2},
    ],
    ids=["number", "table position", "time", "one type", "both ends", "some", "parts", "UIDs", "first without", "by turns"],
)
def test_attributes_that_vary_between_slices_do_not_split_a_stack(tmp_path: Path, values: dict[str, object]) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), edit=stated(**values)))
    same_as_nifti(parts, scan(), AFFINE, tmp_path)
    assert (parts.warnings, len(parts.series)) == ((), 1)


def test_missing_slices_and_an_odd_attribute_do_not_split_a_stack(tmp_path: Path) -> None:
    kinds = stated(ImageType=lambda index: ["ORIGINAL", "PRIMARY", *(["FIRST"] if index in (1, 5, 6) else [])])
    parts = read(write_series(tmp_path / "scan", scan(), only=[0, 1, 2, 3, 5, 6, 9], edit=kinds))
    assert len(parts.array) == 7 and len(parts.series) == 1


def test_some_slices_taken_again(tmp_path: Path) -> None:
    write_series(tmp_path, scan(), prefix="A", edit=stated(AcquisitionNumber=1))
    write_series(tmp_path, VENOUS, prefix="B", only=[4, 5, 6], edit=stated(AcquisitionNumber=2))
    parts = read(tmp_path)
    same_as_nifti(parts, scan(), AFFINE, tmp_path)
    assert parts.series == ("1: 10 slices of 20 x 30, CT, acquisition 1", "2: 3 slices of 20 x 30, CT, acquisition 2")
    np.testing.assert_array_equal(read(tmp_path, series=2).array, VENOUS[4:7])


def test_two_acquisitions_that_overlap_at_their_ends(tmp_path: Path) -> None:
    """Such as chest and abdomen; here the slices interleave, with distances below the slice distance."""
    write_series(tmp_path, scan(), prefix="A", edit=stated(AcquisitionNumber=1))
    write_series(tmp_path, VENOUS, shifted(18.3), prefix="B", edit=stated(AcquisitionNumber=2))
    same_as_nifti(read(tmp_path, series=2), VENOUS, shifted(18.3), tmp_path)
    below = tmp_path / "apart"
    write_series(below, scan(), prefix="A", edit=stated(AcquisitionNumber=1))
    write_series(below, VENOUS, shifted(25), prefix="B", edit=stated(AcquisitionNumber=2))
    np.testing.assert_array_equal(read(below).array, np.concatenate([scan(), VENOUS]))  # one part after the other: one stack


def test_inseparable_stacks_are_refused(tmp_path: Path) -> None:
    folder = two(
        tmp_path, {"InstanceNumber": lambda index: [0, 3, 4, 7, 8, 11, 12, 15, 16, 19][index]}, {"InstanceNumber": lambda index: 5}
    )
    write_series(folder, scan()[:3], prefix="other")
    refused(folder, "20 slices at 10 places .* tells them apart; .* choose another by series number: 1: 20 slices .*; 2: 3 slices")
    np.testing.assert_array_equal(read(folder, series=2).array, scan()[:3])


@pytest.mark.parametrize("change", [{"InstitutionName": "elsewhere"}, {"SeriesDescription": "secret"}, {"AcquisitionNumber": 7}])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.JPEGLSLossless], ids=["plain", "packed"])
def test_one_instance_twice_with_another_tag(tmp_path: Path, change: dict[str, object], syntax: uid.UID) -> None:
    folder = write_series(tmp_path / "scan", scan())
    for path in [*folder.iterdir()]:
        item = pydicom.dcmread(path)
        item.update(change)
        item.filename = str(path.with_suffix(".copy"))
        save(item, syntax)
    parts = read(folder)
    same_as_nifti(parts, scan(), AFFINE, tmp_path)
    assert parts.warnings == ("10 images are there twice (the same SOP instance) and count once.",) and len(parts.series) == 1
    assert len({each.path for each in dicom.stack_of(folder, "scan")}) == 10


def test_one_instance_uid_for_all_is_no_copy(tmp_path: Path) -> None:
    """Some anonymisers write such UIDs."""
    same_as_nifti(read(write_series(tmp_path / "scan", scan(), edit=stated(SOPInstanceUID="1.2.9"))), scan(), AFFINE, tmp_path)
    folder = two(tmp_path / "two", {"SOPInstanceUID": "1.2.9", "AcquisitionNumber": 1}, {"SOPInstanceUID": "1.2.9", "AcquisitionNumber": 2})
    read_both(folder, tmp_path)

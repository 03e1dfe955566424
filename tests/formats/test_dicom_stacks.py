"""Which DICOM slices make one scan: what tells stacks apart, what must not, which comes first and in what words they are listed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from med3dvlm.formats import dicom
from tests.formats.dicom_files import AFFINE, one, read, refused, same_as_nifti, save, scan, turned, write_enhanced, write_series

SERIES = {"SeriesInstanceUID": "1.2.3", "StudyInstanceUID": "1.2.4", "FrameOfReferenceUID": "1.2.5"}
VENOUS = scan() + 100


def shifted(millimetres: float) -> np.ndarray:
    """AFFINE with the scan so much higher."""
    affine = AFFINE.copy()
    affine[2, 3] += millimetres
    return affine


def stated(**values: object) -> Callable[[Dataset, int], None]:
    """Slices of one series that state these values; a function is asked for that of each slice."""

    def edit(item: Dataset, index: int) -> None:
        item.InstanceNumber = index + 1
        item.update(SERIES | {name: value(index) if callable(value) else value for name, value in values.items()})

    return edit


def two(folder: Path, one: dict[str, object], other: dict[str, object], *, offset: float = 0) -> Path:
    """Two stacks of one series, the second with other values (HU + 100) so much higher."""
    write_series(folder, scan(), prefix="A", edit=stated(**one))
    return write_series(folder, VENOUS, shifted(offset), prefix="B", edit=stated(**other))


def read_both(folder: Path, tmp_path: Path, *, offset: float = 0) -> list[str]:
    """The lines for the stacks of `two`, each of which reads as it was written."""
    lines = []
    for number, values, affine in ((1, scan(), AFFINE), (2, VENOUS, shifted(offset))):
        parts = read(folder, series=number)
        same_as_nifti(parts, values, affine, tmp_path)
        lines.append(parts.series[0].split("CT, ")[1])
        files = [each.path for each in dicom.stack_of(folder, "scan", number)]
        assert {pydicom.dcmread(file).pixel_array.max() for file in files} == {each.max() + 1024 for each in values}
        assert len(files) == 10 and len({file.name[0] for file in files}) == 1
    return lines


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
def test_what_tells_the_stacks_of_a_series_apart(
    tmp_path: Path, first: dict[str, object], second: dict[str, object], one_word: str, other_word: str, offset: float
) -> None:
    """At the same places, nearly so, half-way between each other, or elsewhere between."""
    folder = two(tmp_path / "scan", first, second, offset=offset)
    refused(folder, f"choose one with series=, of 1: 10 slices of 20 x 30, CT, {one_word}; 2: 10 slices of 20 x 30, CT, {other_word}")
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
def test_repeated_passes_are_told_apart_by_their_order(tmp_path: Path, by: dict[str, object], offset: float) -> None:
    later = {"InstanceNumber": lambda index: 11 + index, "AcquisitionNumber": lambda index: 101 + index // 3}
    later = {name: value for name, value in later.items() if name == "InstanceNumber" or name in by}
    folder = two(tmp_path / "scan", by, later, offset=offset)
    assert read_both(folder, tmp_path, offset=offset) == [f"pass in the order of acquisition {number} of 2" for number in (1, 2)]


def test_there_and_back(tmp_path: Path) -> None:
    """As a table that swings takes them."""
    folder = two(tmp_path / "scan", {}, {"InstanceNumber": lambda index: 20 - index})
    assert read_both(folder, tmp_path) == ["pass in the order of acquisition 1 of 2", "pass in the order of acquisition 2 of 2"]


def test_two_fields_at_the_same_heights(tmp_path: Path) -> None:
    """As the left and the right ear."""
    right = AFFINE.copy()
    right[0, 3] -= 90
    write_series(tmp_path, scan(), prefix="A", edit=stated(InstanceNumber=5))
    write_series(tmp_path, VENOUS, right, prefix="B", edit=stated(InstanceNumber=5))
    refused(tmp_path, "CT, field 1 of 2; 2: 10 slices of 20 x 30, CT, field 2 of 2")
    same_as_nifti(read(tmp_path, series=2), VENOUS, right, tmp_path)


def test_slices_of_an_mr_that_were_taken_in_two_runs(tmp_path: Path) -> None:
    """Every second one first: one stack."""
    numbers = [1 + index // 2 + 5 * (index % 2) for index in range(10)]
    for name, values in {
        "time": {"AcquisitionTime": lambda index: f"10150{index % 2}"},
        "number": {"InstanceNumber": numbers.__getitem__},
    }.items():
        parts = read(write_series(tmp_path / name, scan(), edit=stated(Modality="MR", **values)))
        same_as_nifti(parts, scan(), AFFINE, tmp_path)


def test_all_images_of_a_place_after_those_of_the_last(tmp_path: Path) -> None:
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
    refused(path, "choose one with series=, of 1: 5 slices of 20 x 30, CT, temporal position 1; 2: 5 slices")
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
def test_what_differs_from_slice_to_slice_splits_no_sound_stack(tmp_path: Path, values: dict[str, object]) -> None:
    parts = read(write_series(tmp_path / "scan", scan(), edit=stated(**values)))
    same_as_nifti(parts, scan(), AFFINE, tmp_path)
    assert (parts.warnings, len(parts.series)) == ((), 1)


def test_missing_slices_and_an_odd_attribute_split_nothing(tmp_path: Path) -> None:
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
    """Chest and abdomen; here they lie between each other, by less than a slice's distance."""
    write_series(tmp_path, scan(), prefix="A", edit=stated(AcquisitionNumber=1))
    write_series(tmp_path, VENOUS, shifted(18.3), prefix="B", edit=stated(AcquisitionNumber=2))
    same_as_nifti(read(tmp_path, series=2), VENOUS, shifted(18.3), tmp_path)
    below = tmp_path / "apart"
    write_series(below, scan(), prefix="A", edit=stated(AcquisitionNumber=1))
    write_series(below, VENOUS, shifted(25), prefix="B", edit=stated(AcquisitionNumber=2))
    np.testing.assert_array_equal(read(below).array, np.concatenate([scan(), VENOUS]))  # one part after the other: one stack


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    folder = two(
        tmp_path, {"InstanceNumber": lambda index: [0, 3, 4, 7, 8, 11, 12, 15, 16, 19][index]}, {"InstanceNumber": lambda index: 5}
    )
    write_series(folder, scan()[:3], prefix="other")
    refused(folder, "20 slices at 10 places .* tells them apart; .* choose another with series=, of 1: 20 slices .*; 2: 3 slices")
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
    """As anonymisers leave it."""
    same_as_nifti(read(write_series(tmp_path / "scan", scan(), edit=stated(SOPInstanceUID="1.2.9"))), scan(), AFFINE, tmp_path)
    folder = two(tmp_path / "two", {"SOPInstanceUID": "1.2.9", "AcquisitionNumber": 1}, {"SOPInstanceUID": "1.2.9", "AcquisitionNumber": 2})
    read_both(folder, tmp_path)


# Series and studies


def without_series(number: int | None, study: str) -> Callable[[Dataset, int], None]:
    def edit(item: Dataset, index: int) -> None:
        stated(StudyInstanceUID=study, SeriesNumber=number)(item, index)
        del item.SeriesInstanceUID

    return edit


@pytest.mark.parametrize("offset", [0, 0.7, 1.25])
@pytest.mark.parametrize(
    ("numbers", "studies"), [((2, 3), ("1.2.4", "1.2.4")), ((2, 2), ("1.2.4", "1.2.6")), ((None, None), ("1.2.4", "1.2.6"))]
)
def test_series_without_their_uid(tmp_path: Path, numbers: tuple[int | None, ...], studies: tuple[str, str], offset: float) -> None:
    write_series(tmp_path, scan(), prefix="A", edit=without_series(numbers[0], studies[0]))
    write_series(tmp_path, VENOUS, shifted(offset), prefix="B", edit=without_series(numbers[1], studies[1]))
    read_both(tmp_path, tmp_path, offset=offset)
    assert len(read(tmp_path).array) == 10


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("better", "worse", "why"),
    [
        ({}, {"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MIP"]}, "made of other images"),
        ({"SliceThickness": 1}, {"SliceThickness": 3}, "thinnest"),
        ({"SeriesNumber": 3}, {"SeriesNumber": 21}, "lowest series number"),
        ({"SeriesNumber": 3, "AcquisitionNumber": 9}, {"SeriesNumber": 3, "AcquisitionNumber": 10}, "acquisition"),
    ],
)
def test_of_equally_long_series_the_choice_is_stable(
    tmp_path: Path, better: dict[str, object], worse: dict[str, object], why: str, reverse: bool
) -> None:
    series = ["1.2.7", "1.2.8"][:: -1 if reverse else 1]
    write_series(tmp_path, scan(), prefix="AB"[reverse], edit=stated(**better, SeriesInstanceUID=series[0]))
    write_series(tmp_path, VENOUS, prefix="BA"[reverse], edit=stated(**worse, SeriesInstanceUID=series[1]))
    parts = read(tmp_path)
    np.testing.assert_array_equal(parts.array, scan())
    assert len(parts.series) == 2 and any("of the 2 series number 1 is taken as" in text and why in text for text in parts.warnings)


def test_thin_originals_come_before_more_slabs_made_of_them(tmp_path: Path) -> None:
    slab = stated(SeriesInstanceUID="1.2.8", ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"], SliceThickness=10)
    dense = AFFINE @ np.diag([1, 1, 0.25, 1])
    write_series(tmp_path, np.repeat(VENOUS, 4, axis=0), dense, prefix="slab", edit=slab)
    write_series(tmp_path, scan(), edit=stated())
    parts = read(tmp_path)
    np.testing.assert_array_equal(parts.array, scan())
    assert parts.series == (
        "1: 10 slices of 20 x 30, CT, 2.5 mm thick, original primary",
        "2: 40 slices of 20 x 30, CT, 10 mm thick, derived secondary mip",
    )


def test_a_few_original_slices_do_not_come_before_a_whole_derived_scan(tmp_path: Path) -> None:
    write_series(tmp_path, scan(), edit=stated(ImageType=["DERIVED", "SECONDARY", "MPR"]))
    write_series(tmp_path, VENOUS[:3], prefix="few", edit=stated(SeriesInstanceUID="1.2.8"))
    np.testing.assert_array_equal(read(tmp_path).array, scan())


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_the_list_says_what_differs_and_names_nobody(tmp_path: Path) -> None:
    edits = [
        {"SeriesNumber": 2, "ConvolutionKernel": "STANDARD", "SeriesDescription": "Thorax Lung Secret^Name", "OperatorsName": "Secret"},
        {"SeriesNumber": 3, "ConvolutionKernel": ["LUNG", "2"], "SeriesDescription": "Secret arterial 20010203"},
        {
            "SeriesNumber": 4,
            "ConvolutionKernel": "Secret^Name_2001",
            "SeriesDescription": "Secret",
            "ImageType": ["DERIVED", "secret^name"],
        },
    ]
    for number, values in enumerate(edits):
        edit = stated(**values, SeriesInstanceUID=f"1.2.{number + 10}")
        write_series(tmp_path, scan()[: 9 - number], prefix=f"S{number}_", edit=edit)
    parts = read(tmp_path)
    assert parts.series[:2] == (
        "1: 9 slices of 20 x 30, CT, series 2, kernel STANDARD, original primary axial, thorax lung",
        "2: 8 slices of 20 x 30, CT, series 3, kernel LUNG 2, original primary axial, arterial",
    )
    assert parts.series[2] == "3: 7 slices of 20 x 30, CT, series 4, derived"


# Planes, and what is no scan


@pytest.mark.parametrize("apart", [3, 100])
def test_two_parallel_planes_of_many_are_no_scan(tmp_path: Path, apart: float) -> None:
    def fan(count: int) -> Callable[[Dataset, int], None]:
        def edit(item: Dataset, index: int) -> None:
            angle = 0 if index < 2 else np.pi * index / count
            values = [round(float(x), 6) for x in (np.cos(angle), np.sin(angle), 0, 0, 0, -1)]
            stated(ImageOrientationPatient=values, ImagePositionPatient=[0, apart * index, 0])(item, index)

        return edit

    for count in (5, 10):
        folder = write_series(tmp_path / str(count), scan()[:count], edit=fan(count))
        lone = count - 2
        refused(
            folder, f"one series mixes {lone + 1} orientations or sizes, {lone} of them in single images; choose one with series=, of 1: 2"
        )
        np.testing.assert_array_equal(read(folder, series=1).array, scan()[:2])


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"SOPClassUID": uid.ComputedRadiographyImageStorage, "Modality": "CR"}, "radiograph"),
        ({"SOPClassUID": uid.DigitalXRayImageStorageForPresentation, "Modality": "DX"}, "radiograph"),
        ({"SOPClassUID": uid.DigitalMammographyXRayImageStorageForPresentation, "Modality": "MG"}, "radiograph"),
        ({"SOPClassUID": uid.XRayAngiographicImageStorage, "Modality": "XA"}, "radiograph"),
        ({"SOPClassUID": uid.XRayRadiofluoroscopicImageStorage, "Modality": "RF"}, "radiograph"),
        ({"SOPClassUID": uid.SecondaryCaptureImageStorage, "Modality": "PX"}, "radiograph"),
        ({"SOPClassUID": uid.UltrasoundImageStorage, "Modality": "US"}, "picture"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], "Modality": "MR"}, "mosaic"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "SCOUT"]}, "scout"),
        ({"SOPClassUID": uid.NuclearMedicineImageStorage, "Modality": "NM", "ImageType": ["ORIGINAL", "PRIMARY", "TOMO"]}, "projection"),
        ({"ImagePositionPatient": [0, 0, 0]}, "image at one and the same place"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_volume(tmp_path: Path, change: dict[str, object], kind: str) -> None:
    """Alone it is refused by its name; beside a scan it is left out."""
    position = "ImagePositionPatient" in change or "ImageType" in change

    def edit(item: Dataset, index: int) -> None:
        stated(**{"SeriesInstanceUID": "1.2.8", **change})(item, index)
        if not position or item.Modality == "NM":
            del item.ImagePositionPatient, item.ImageOrientationPatient
        if "no image" in kind:
            del item.PixelData, item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation

    folder = write_series(tmp_path, scan(), prefix="odd", edit=edit)
    refused(folder, f"there is no scan here but 10 x {kind}")
    write_series(folder, VENOUS[:4], edit=stated())
    parts = read(folder)
    np.testing.assert_array_equal(parts.array, VENOUS[:4])
    assert len(parts.series) == 1 and "left out as no part of the scan: 10 x " in parts.warnings[0]


def test_volumes_of_modalities_that_also_take_radiographs(tmp_path: Path) -> None:
    """Tomosynthesis and rotational angiography, by their class or by the places of their slices."""
    parts = read(write_series(tmp_path / "rotation", scan(), turned(10), edit=stated(Modality="XA")))
    same_as_nifti(parts, scan(), turned(10), tmp_path)

    def class_of(item: Dataset) -> None:
        item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = uid.BreastTomosynthesisImageStorage
        item.Modality = "MG"

    same_as_nifti(read(write_enhanced(tmp_path / "tomo.dcm", scan(), edit=class_of)), scan(), AFFINE, tmp_path)

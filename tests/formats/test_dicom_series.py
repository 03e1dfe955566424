"""Several DICOM series in one folder: which is read first, how they are listed, and which images are no volume."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from tests.formats.dicom_files import AFFINE, read, refused, same_as_nifti, scan, turned, write_enhanced, write_series
from tests.formats.stacks import VENOUS, read_both, shifted, stated


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
def test_the_choice_between_equally_long_series_is_stable(
    tmp_path: Path, better: dict[str, object], worse: dict[str, object], why: str, reverse: bool
) -> None:
    series = ["1.2.7", "1.2.8"][:: -1 if reverse else 1]
    write_series(tmp_path, scan(), prefix="AB"[reverse], edit=stated(**better, SeriesInstanceUID=series[0]))
    write_series(tmp_path, VENOUS, prefix="BA"[reverse], edit=stated(**worse, SeriesInstanceUID=series[1]))
    parts = read(tmp_path)
    np.testing.assert_array_equal(parts.array, scan())
    assert len(parts.series) == 2 and any("of the 2 series number 1 is taken as" in text and why in text for text in parts.warnings)


def test_thin_originals_are_preferred_to_derived_slabs(tmp_path: Path) -> None:
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


def test_a_whole_derived_scan_is_preferred_to_a_few_original_slices(tmp_path: Path) -> None:
    write_series(tmp_path, scan(), edit=stated(ImageType=["DERIVED", "SECONDARY", "MPR"]))
    write_series(tmp_path, VENOUS[:3], prefix="few", edit=stated(SeriesInstanceUID="1.2.8"))
    np.testing.assert_array_equal(read(tmp_path).array, scan())


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_the_list_states_differences_without_names(tmp_path: Path) -> None:
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
            folder,
            f"one series mixes {lone + 1} orientations or sizes, {lone} of them in single images; choose one by series number, .* alone: 1: 2",
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
def test_images_that_are_no_volume(tmp_path: Path, change: dict[str, object], kind: str) -> None:
    """Alone they are refused by name; beside a scan they are left out."""
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
    assert len(parts.series) == 1 and "left out as not part of the scan: 10 x " in parts.warnings[0]


def test_volumes_of_modalities_that_also_take_radiographs(tmp_path: Path) -> None:
    """Tomosynthesis and rotational angiography are recognised by their class or by the positions of their slices."""
    parts = read(write_series(tmp_path / "rotation", scan(), turned(10), edit=stated(Modality="XA")))
    same_as_nifti(parts, scan(), turned(10), tmp_path)

    def class_of(item: Dataset) -> None:
        item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = uid.BreastTomosynthesisImageStorage
        item.Modality = "MG"

    same_as_nifti(read(write_enhanced(tmp_path / "tomo.dcm", scan(), edit=class_of)), scan(), AFFINE, tmp_path)

"""The quantity of a DICOM scan: HU or another one, by slope and intercept or a table, stated by all slices or some."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut

from med3dvlm.volume import read_volume
from tests.formats.dicom_files import one, read, refused, scan, write_enhanced, write_series
from tests.formats.test_hu import truth

Edit = Callable[[Dataset, int], None]


def setting(**elements: object) -> Edit:
    return lambda item, _: item.update(elements)


# Other quantities


@pytest.mark.parametrize(
    ("elements", "quantity"),
    [
        ({"RescaleType": "MGML"}, "MGML (mg/ml)"),
        ({"RescaleType": "Z_EFF"}, "Z_EFF (effective atomic number)"),
        ({"RescaleType": "z_eff "}, "Z_EFF (effective atomic number)"),
        ({"RescaleType": "EDW"}, "EDW (electron density relative to water)"),
        ({"RescaleType": "PCT"}, "PCT (percent)"),
        ({"RescaleType": "ml/100ml/s"}, "ml/100ml/s"),
        ({"RescaleType": "Secret^Name"}, "another quantity than HU"),
        ({"Units": "MGML"}, "MGML (mg/ml)"),
        ({"RescaleType": "US", "RealWorldValueMappingSequence": "ml/100ml/s"}, "ml/100ml/s"),
        ({"RescaleType": "HU", "RealWorldValueMappingSequence": "s"}, "s"),
        ({"RescaleType": "HU", "ImageType": ["DERIVED", "PRIMARY", "PERFUSION", "RCBF"]}, "RCBF (perfusion)"),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MTT"]}, "MTT (perfusion)"),
    ],
)
def test_a_quantity_named_by_the_header_is_used(tmp_path: Path, elements: dict[str, object], quantity: str) -> None:
    """The values look like HU."""
    if unit := elements.get("RealWorldValueMappingSequence"):
        elements["RealWorldValueMappingSequence"] = one(MeasurementUnitsCodeSequence=one(CodeValue=unit, CodeMeaning="Secret"))
    folder = write_series(tmp_path / "scan", truth(), edit=setting(**elements))
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array, truth())
    assert volume.unit == "arbitrary" and f"the header says that the values are {quantity}." in volume.notes[-1]
    assert "secret" not in repr((volume.notes, volume.warnings)).lower()
    overruled = read_volume(folder, unit="HU")
    assert overruled.unit == "HU" and any(f"the values are {quantity} and no HU" in text for text in overruled.warnings)


@pytest.mark.parametrize(
    "elements",
    [
        {"RescaleType": "HU"},
        {"RescaleType": "hu "},
        {"RescaleType": ""},
        {"RescaleType": "US"},
        {"RescaleType": "HU", "RealWorldValueMappingSequence": "[hnsf'U]"},
        {"RescaleType": "HU", "ImageType": ["ORIGINAL", "PRIMARY", "PERFUSION", "NONE"]},
        {"RescaleType": "HU", "Units": ""},
    ],
)
def test_headers_that_name_hu_or_nothing(tmp_path: Path, elements: dict[str, object]) -> None:
    if unit := elements.get("RealWorldValueMappingSequence"):
        elements["RealWorldValueMappingSequence"] = one(MeasurementUnitsCodeSequence=one(CodeValue=unit))
    volume = read_volume(write_series(tmp_path / "scan", truth(), edit=setting(**elements)))
    assert volume.unit == "HU" and volume.warnings == ()


def test_modified_hu_give_a_warning(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path / "scan", truth(), edit=setting(RescaleType="HU_MOD")))
    assert volume.unit == "HU" and len(volume.warnings) == 1 and "HU_MOD" in volume.warnings[0]


@pytest.mark.parametrize("place", ["shared", "frames"])
def test_the_quantity_of_a_multiframe_map(tmp_path: Path, place: str) -> None:
    def edit(item: Dataset) -> None:
        groups = item.SharedFunctionalGroupsSequence if place == "shared" else item.PerFrameFunctionalGroupsSequence
        for group in groups:
            group.RealWorldValueMappingSequence = one(MeasurementUnitsCodeSequence=one(CodeValue="ml/100ml"))

    assert read_volume(write_enhanced(tmp_path / "map.dcm", truth(), edit=edit)).unit == "arbitrary"
    assert read(tmp_path / "map.dcm").quantity == "ml/100ml"


# Tables


@pytest.mark.parametrize("first", [0, 24, 1000])
@pytest.mark.parametrize("kind", ["HU", "US", "OD"])
def test_a_modality_lut_is_applied_as_pydicom_does(tmp_path: Path, first: int, kind: str) -> None:
    table = (np.arange(2000) * 3 % 4001).astype("<u2")  # of no use to anybody, but no two parts are alike

    def edit(item: Dataset, _: int) -> None:
        del item.RescaleSlope, item.RescaleIntercept
        item.ModalityLUTSequence = one(LUTDescriptor=[2000, first, 16], ModalityLUTType=kind)
        item.ModalityLUTSequence[0].add_new("LUTData", "OW", table.tobytes())

    folder = write_series(tmp_path / "scan", scan(), edit=edit)
    items = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda item: item.ImagePositionPatient[2])
    parts = read(folder)
    np.testing.assert_array_equal(parts.array, [apply_modality_lut(item.pixel_array, item) for item in items])
    assert parts.hu == (kind == "HU") and parts.quantity == {"HU": None, "US": None, "OD": "OD (optical density)"}[kind]
    assert parts.rescale is None and parts.warnings == ("the header's table of values (Modality LUT) is applied.",)


def test_a_table_of_another_size_than_stated(tmp_path: Path) -> None:
    def edit(item: Dataset, _: int) -> None:
        item.ModalityLUTSequence = one(LUTDescriptor=[2000, 0, 16], ModalityLUTType="HU")
        item.ModalityLUTSequence[0].add_new("LUTData", "OW", b"\0" * 100)

    refused(
        write_series(tmp_path, scan(), edit=edit), "have a table of values .Modality LUT. of another size than the header states; export"
    )


# Slope and intercept of some slices


def forget(*indices: int) -> Edit:
    def edit(item: Dataset, index: int) -> None:
        if index in indices:
            del item.RescaleSlope, item.RescaleIntercept

    return edit


def test_some_slices_without_slope_and_intercept_need_them(tmp_path: Path) -> None:
    parts = read(write_series(tmp_path / "scan", truth(), edit=forget(0, 4, 5)))
    np.testing.assert_array_equal(parts.array, truth())
    assert (parts.hu, parts.rescale) == (True, (1, -1024))
    assert parts.warnings == (
        "3 of 10 slices state no RescaleSlope and RescaleIntercept; those of the others are applied, as the neighbouring slices show.",
    )


def test_some_slices_without_slope_and_intercept_are_hu_already(tmp_path: Path) -> None:
    def edit(item: Dataset, index: int) -> None:
        if index in (0, 4, 5):
            del item.RescaleSlope, item.RescaleIntercept
            item.PixelData, item.PixelRepresentation = truth()[index].tobytes(), 1

    volume = read_volume(write_series(tmp_path / "scan", truth(), edit=edit))
    np.testing.assert_array_equal(volume.array, truth())
    assert volume.unit == "HU" and "their values are left as they are stored" in volume.warnings[0]


def test_some_slices_without_slope_and_intercept_are_refused_where_ambiguous(tmp_path: Path) -> None:
    flat = np.random.default_rng(0).integers(-2000, 3000, (10, 20, 30))  # no slice is like its neighbour
    refused(write_series(tmp_path, flat, edit=forget(0, 4, 5), rescale=(1, -2000)), "3 of 10 slices state no RescaleSlope and .*; export")


def test_some_slices_without_a_slope_and_intercept_that_change_nothing(tmp_path: Path) -> None:
    parts = read(write_series(tmp_path / "scan", truth(), signed=True, rescale=(1, 0), edit=forget(0, 4, 5)))
    np.testing.assert_array_equal(parts.array, truth())
    assert parts.warnings == () and parts.hu


# Padding and size


def test_padding_in_eight_and_sixteen_bits(tmp_path: Path) -> None:
    """Slope 1 is applied in 16 bits, which is exact for every type of stored number."""
    values = np.random.default_rng(0).integers(0, 256, (6, 20, 30))

    def narrow(item: Dataset, index: int) -> None:
        item.BitsAllocated, item.BitsStored, item.HighBit = 8, 8, 7
        item.PixelData, item.RescaleIntercept = values[index].astype(np.uint8).tobytes(), -1000

    parts = read(write_series(tmp_path / "scan", values, rescale=(1, 0), edit=narrow))
    np.testing.assert_array_equal(parts.array, values - 1000)
    wide = read(write_series(tmp_path / "wide", values * 7 - 20000, rescale=(7, -20000)))
    np.testing.assert_array_equal(wide.array, values * 7 - 20000)
    assert wide.array.dtype == np.int16

"""The layout of CT-RATE: both versions give equal volumes, and missing files are named."""

import csv
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from med3dvlm import VolumeProcessor, read_volume
from med3dvlm.datasets import DATASETS, ct_rate
from med3dvlm.reports.findings import FINDINGS_CT_RATE, read_findings

# As in the published file, with the words of the paper's Table 5.
FINDINGS = (
    "Medical material,Arterial wall calcification,Cardiomegaly,Pericardial effusion,Coronary artery wall calcification,Hiatal hernia,"
    "Lymphadenopathy,Emphysema,Atelectasis,Lung nodule,Lung opacity,Pulmonary fibrotic sequela,Pleural effusion,Mosaic attenuation pattern,"
    "Peribronchial thickening,Consolidation,Bronchiectasis,Interlobular septal thickening"
).split(",")
NAMES = ("train_1_a_1", "train_1_a_2", "train_53_b_1")
SPACING = (1.5, 0.8, 0.8)  # z, y, x
SUPINE, PRONE = "[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]", "[-1.0, 0.0, 0.0, 0.0, -1.0, 0.0]"


def hounsfield(seed: int) -> np.ndarray:
    """A body in air within a scanner's circular padding, (x, y, z) of odd lengths."""
    array = np.full((30, 20, 10), -1000, np.int16)
    array[4:26, 3:17, 1:9] = np.random.default_rng(seed).integers(-200, 300, (22, 14, 8))
    array[0] = -8192
    return array


def table(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def volume_file(root: Path, split: str, name: str) -> Path:
    patient, scan = name.rsplit("_", 2)[0], name.rsplit("_", 1)[0]
    return root / "dataset" / split / patient / scan / f"{name}.nii.gz"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three volumes in both versions; the last patient lies prone."""
    for seed, name in enumerate(NAMES):
        values = hounsfield(seed)
        for split in ("train", "train_fixed"):
            volume_file(tmp_path, split, name).parent.mkdir(parents=True, exist_ok=True)
        # version 1: raw values as floats under the identity; version 2: HU under the geometry that DICOM states (there LPS, here RAS)
        nib.save(nib.Nifti1Image((values + 8192).astype(np.float64), np.eye(4)), volume_file(tmp_path, "train", name))
        sign = 1 if name == "train_53_b_1" else -1
        affine = np.diag([sign * SPACING[2], sign * SPACING[1], SPACING[0], 1.0])
        nib.save(nib.Nifti1Image(values, affine), volume_file(tmp_path, "train_fixed", name))
    base = tmp_path / "dataset"
    table(
        base / "radiology_text_reports" / "train_reports.csv",
        ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"),
        [
            ("train_1_a_1.nii.gz", "Cough, fever", "Not given.", "Pleural effusion on the right,\n 3 cm.", "Effusion."),
            ("train_1_a_2.nii.gz", "", "", "nan", "Normal chest."),  # as pandas may write an empty cell
            ("train_53_b_1.nii.gz", "", "", "Emphysema.", "Not given."),
        ],
    )
    table(
        base / "metadata" / "train_metadata.csv",
        ("VolumeName", "Manufacturer", "RescaleIntercept", "RescaleSlope", "XYSpacing", "ZSpacing", "ImageOrientationPatient"),
        [(f"{name}.nii.gz", "X", -8192, 1, "[0.8, 0.8]", 1.5, PRONE if "53" in name else SUPINE) for name in NAMES],
    )
    table(
        base / "multi_abnormality_labels" / "train_predicted_labels.csv",
        ("VolumeName", *FINDINGS),
        [(f"{name}.nii.gz", *(int(number == place) for place in range(18))) for number, name in enumerate(NAMES)],
    )
    return tmp_path


def test_studies_of_the_published_layout(root: Path) -> None:
    studies, questions = ct_rate.read(root, "train_fixed")
    assert questions == [] and DATASETS["ct_rate"] is ct_rate
    assert [study.id for study in studies] == [
        "train_fixed/train_1/train_1_a/train_1_a_1",
        "train_fixed/train_1/train_1_a/train_1_a_2",
        "train_fixed/train_53/train_53_b/train_53_b_1",
    ]
    assert [study.patient for study in studies] == ["train_1", "train_1", "train_53"]
    assert [study.report for study in studies] == ["Pleural effusion on the right, 3 cm. Effusion.", "Normal chest.", "Emphysema."]
    assert all((root / study.image).is_file() and study.split == "train_fixed" and study.source == "ct_rate" for study in studies)
    assert [[name for name, value in study.labels.items() if value] for study in studies] == [
        ["medical_material"], ["arterial_wall_calcification"], ["cardiomegaly"],
    ]  # fmt: skip
    assert all(tuple(study.labels) == FINDINGS_CT_RATE for study in studies)
    assert read_findings(studies[0].report)["pleural_effusion"]


def test_the_eighteen_columns_are_the_published_ones() -> None:
    assert list(ct_rate.LABEL_COLUMNS) == FINDINGS


def test_both_versions_give_equal_volumes(root: Path) -> None:
    """Values are HU, the geometry is that of DICOM, and the tensors of recipe ct_rate are equal."""
    processor = VolumeProcessor("ct_rate", (8, 30, 24))
    for first, second, seed in zip(ct_rate.read(root, "train")[0], ct_rate.read(root, "train_fixed")[0], range(3), strict=True):
        raw, fixed = (read_volume(root / study.image, **study.reading) for study in (first, second))
        for volume in (raw, fixed):
            np.testing.assert_array_equal(volume.array, hounsfield(seed).transpose())
            assert volume.unit == "HU" and volume.spacing == pytest.approx(SPACING)
            assert volume.orientation == ("SAR" if "53" in first.id else "SPL")
        assert np.array_equal(processor.transform(raw).numpy(), processor.transform(fixed).numpy())


def test_version_2_needs_no_metadata(root: Path) -> None:
    (root / "dataset" / "metadata" / "train_metadata.csv").unlink()
    for seed, study in enumerate(ct_rate.read(root, "train_fixed")[0]):
        volume = read_volume(root / study.image, **study.reading)
        np.testing.assert_array_equal(volume.array, hounsfield(seed).transpose())
        assert volume.unit == "HU" and volume.spacing == pytest.approx(SPACING)


def test_version_2_under_the_name_of_version_1(root: Path) -> None:
    """Some copies hold version 2 in a folder "train"; its HU values are not rescaled again."""
    for name in NAMES:
        volume_file(root, "train_fixed", name).replace(volume_file(root, "train", name))
    for seed, study in enumerate(ct_rate.read(root, "train")[0]):
        volume = read_volume(root / study.image, **study.reading)
        np.testing.assert_array_equal(volume.array, hounsfield(seed).transpose())
        assert (volume.unit, volume.orientation) == ("HU", "SAR" if "53" in study.id else "SPL")
        assert volume.spacing == pytest.approx(SPACING) and volume.direction is not None  # the file's own geometry


def test_files_beside_the_volumes_and_no_labels(root: Path) -> None:
    base = root / "dataset"
    (base / "radiology_text_reports" / "train_reports.csv").replace(base / "train_reports.csv")
    (base / "multi_abnormality_labels" / "train_predicted_labels.csv").unlink()
    assert [study.labels for study in ct_rate.read(base, "train")[0]] == [{}, {}, {}]
    assert ct_rate.read(base, "train")[0][0].image == "train/train_1/train_1_a/train_1_a_1.nii.gz"


def test_missing_volumes_and_reports_are_failures(root: Path) -> None:
    volume_file(root, "train", "train_1_a_1").unlink()
    reports = root / "dataset" / "radiology_text_reports" / "train_reports.csv"
    reports.write_text(reports.read_text().replace("Normal chest.", " not given. "))
    extra = volume_file(root, "train", "train_7_a_1")
    extra.parent.mkdir(parents=True)
    extra.write_bytes(volume_file(root, "train", "train_1_a_2").read_bytes())
    failures: list[dict[str, str]] = []
    studies, _ = ct_rate.read(root, "train", failures)
    assert [study.id for study in studies] == ["train/train_53/train_53_b/train_53_b_1"]
    assert [failure["study"].rpartition("/")[2] for failure in failures] == ["train_1_a_1", "train_1_a_2", "train_7_a_1"]
    assert [set(failure) for failure in failures] == [{"study", "file", "reason"}] * 3
    reasons = ("the volume of .*train_reports.csv line 2, is missing", "line 4: neither findings nor impressions", "has no report in")
    for failure, reason in zip(failures, reasons, strict=True):
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(failure["reason"])
    with pytest.raises(ValueError, match="3 volumes of split 'train' cannot be used; the first: .*train_1_a_1.nii.gz, the volume of"):
        ct_rate.read(root, "train")


def test_scans_that_do_not_show_the_chest_are_left_out_and_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "dataset" / "metadata" / "no_chest_train.txt").write_text("train_1_a_2.nii.gz\ntrain_53_b\n")
    studies, _ = ct_rate.read(root, "train")
    assert [study.id for study in studies] == ["train/train_1/train_1_a/train_1_a_1"]
    assert "left out 2 volumes that do not show the chest" in caplog.text


def test_splits_are_the_folders(root: Path, tmp_path: Path) -> None:
    assert ct_rate.splits(root) == ct_rate.splits(root / "dataset") == ["train", "train_fixed"]
    with pytest.raises(ValueError, match="has no split 'test'; it has: train, train_fixed"):
        ct_rate.read(root, "test")
    for empty in (tmp_path / "metadata", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="has no folder train, valid, train_fixed or valid_fixed"):
            ct_rate.splits(empty)
    (root / "dataset" / "valid").mkdir()
    with pytest.raises(FileNotFoundError, match="validation_reports.csv, the reports of split 'valid', is missing"):
        ct_rate.read(root, "valid")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("train_reports.csv", "Impressions_EN", "Impression", r"train_reports.csv lacks the columns \['Impressions_EN'\]; it has"),
        (
            "train_reports.csv",
            "train_53_b_1.nii.gz",
            "train_53.nii.gz",
            "line 5: VolumeName is 'train_53.nii.gz' but must be as train_53_a_1",
        ),
        ("train_reports.csv", "train_53_b_1.nii.gz", "../../b_1_a_1", "line 5: VolumeName is '../../b_1_a_1' but must be as"),
        ("train_metadata.csv", "-8192", "None", "line 2: RescaleIntercept is 'None' but must be a number"),
        ("train_metadata.csv", "[0.8, 0.8]", "0.8", "line 2: XYSpacing is '0.8' but must be 2 numbers, as"),
        ("train_metadata.csv", "ZSpacing", "Z", r"train_metadata.csv lacks the columns \['ZSpacing'\]"),
        ("train_predicted_labels.csv", "Emphysema", "Emphysem", r"labels.csv lacks the columns \['Emphysema'\]"),
        (
            "train_predicted_labels.csv",
            "train_1_a_2.nii.gz,0,1",
            "train_1_a_2.nii.gz,0,2",
            "line 3: Arterial wall calcification is '2' but must be 0",
        ),
    ],
)
def test_a_wrong_table_is_named_by_file_and_line(root: Path, file: str, old: str, new: str, message: str) -> None:
    path = next(root.rglob(file))
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        ct_rate.read(root, "train")

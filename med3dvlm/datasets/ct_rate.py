"""CT-RATE on disk -> records.

    train/train_1/train_1_a/train_1_a_1.nii.gz      patient train_1, scan a, reconstruction 1; valid/ likewise
    train_fixed/... valid_fixed/...                 the same volumes in version 2
    radiology_text_reports/{train,validation}_reports.csv
                                                    VolumeName, Findings_EN, Impressions_EN, ...
    metadata/{train,validation}_metadata.csv        VolumeName, RescaleSlope, RescaleIntercept, XYSpacing "[0.7, 0.7]", ZSpacing, and
                                                    perhaps ImageOrientationPatient, without which patients lie on their backs
    metadata/no_chest_{train,valid}.txt             volumes or scans that do not show the chest: left out, and counted in the log
    multi_abnormality_labels/{train,valid}_predicted_labels.csv
                                                    VolumeName and 18 findings, 0 or 1
    dataset.json, segmentations/                    optional: masks of sentences, see `sentence_masks`

All of it below the root or its folder `dataset`; a CSV file may lie there itself. A split is named as its folder. Reports are needed;
labels may be missing, and the metadata too for version 2.

Version 1 holds raw values under a header without geometry: slope, intercept, spacing and orientation come from the metadata.
Version 2 has been made from it with the same numbers and is in HU. Both come out as equal volumes: `Study.reading` hands on the
metadata, and `read_volume(hu="auto")` decides whether slope and intercept are still to be applied. Without metadata, a volume in a
folder ..._fixed is taken to be in HU.

Source: CT-RATE (arXiv 2403.17834) and the published files.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.datasets import sentence_masks
from med3dvlm.datasets.csv_files import csv_rows, is_missing, label_value
from med3dvlm.records import Question, Study
from med3dvlm.reports.findings import FINDINGS_CT_RATE

logger = logging.getLogger(__name__)

SPLIT = re.compile(r"(train|valid)(_fixed)?")
NAME = re.compile(r"((\w+_\d+)_[a-z]+)_\d+")  # train_1_a_1: scan train_1_a of patient train_1
LONG_NAMES = {"train": "train", "valid": "validation"}
REPORT_COLUMNS = ("VolumeName", "Findings_EN", "Impressions_EN")
METADATA_COLUMNS = ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
LABEL_COLUMNS = tuple(name.replace("_", " ").capitalize() for name in FINDINGS_CT_RATE)  # "Medical material", ...
NOT_GIVEN = "not given."
SUPINE = "[1, 0, 0, 0, 1, 0]"


def splits(root: str | Path) -> list[str]:
    """Return the folders of volumes, such as train, valid, train_fixed. Raises FileNotFoundError where there is none."""
    base = _base(Path(root))
    found = sorted(path.name for path in base.iterdir() if path.is_dir() and SPLIT.fullmatch(path.name)) if base.is_dir() else []
    if not found:
        raise FileNotFoundError(f"{base} has no folder train, valid, train_fixed or valid_fixed; a CT-RATE root holds one of them")
    return found


def read(root: str | Path, split: str, failures: list[dict[str, str]] | None = None) -> tuple[list[Study], list[Question]]:
    """Return one split's studies, one for each volume; CT-RATE has no questions.

    Args:
        failures: takes {"study", "file", "reason"} of every volume that is missing or has no report; without it that is an error.

    Raises:
        FileNotFoundError, ValueError: a file or a row is missing or wrong; the message says where.
    """
    root, base = Path(root), _base(Path(root))
    if split not in (known := splits(root)):
        raise ValueError(f"{base} has no split {split!r}; it has: {', '.join(known)}")
    short = split.removesuffix("_fixed")
    long = LONG_NAMES[short]
    reports_file = _table(base, "radiology_text_reports", f"{long}_reports.csv")
    if not reports_file.is_file():
        raise FileNotFoundError(f"{reports_file}, the reports of split {split!r}, is missing; download it with the volumes")
    labels = _labels(_table(base, "multi_abnormality_labels", f"{short}_predicted_labels.csv"))
    readings = _readings(_table(base, "metadata", f"{long}_metadata.csv"), geometry=split == short)
    unknown = {} if split == short else {"hu": "already_hu"}
    elsewhere = _not_of_the_chest(base / "metadata" / f"no_chest_{short}.txt")

    masks = {entry.volume: entry.masks for entry in sentence_masks.entries(root) if (root / entry.label).is_file()}
    volumes = {path.name.removesuffix(".nii.gz"): path for path in sorted((base / split).glob("*/*/*.nii.gz"))}
    studies: list[Study] = []
    problems: list[dict[str, str]] = []
    left_out, reported = 0, set()
    for where, row in csv_rows(reports_file, REPORT_COLUMNS):
        name, scan, patient = _parts(row["VolumeName"], where)
        reported.add(name)
        if name in elsewhere or scan in elsewhere:
            left_out += 1
            continue
        path = volumes.get(name, base / split / patient / scan / f"{name}.nii.gz")
        image, report = path.relative_to(root).as_posix(), _report(row)
        identity, found = f"{split}/{patient}/{scan}/{name}", labels.get(name, {})
        study = Study(identity, patient, image, report, found, split, "ct_rate", readings.get(name, unknown), masks.get(name, {}))
        if name not in volumes:
            problems.append({"study": study.id, "file": image, "reason": f"{path}, the volume of {where}, is missing"})
        elif not report:
            problems.append({"study": study.id, "file": image, "reason": f"{where}: neither findings nor impressions are given"})
        else:
            studies.append(study)
    for name, path in volumes.items():
        if name not in reported:
            identity = path.relative_to(base).as_posix().removesuffix(".nii.gz")
            problems.append(
                {"study": identity, "file": path.relative_to(root).as_posix(), "reason": f"{path} has no report in {reports_file}"}
            )
    if left_out:
        logger.warning("%s: left out %d volumes that do not show the chest", base / split, left_out)
    if problems and failures is None:
        raise ValueError(f"{len(problems)} volumes of split {split!r} cannot be used; the first: {problems[0]['reason']}")
    if failures is not None:
        failures += problems
    return studies, []


def _base(root: Path) -> Path:
    return root / "dataset" if (root / "dataset").is_dir() else root


def _table(base: Path, folder: str, name: str) -> Path:
    """Return the path of a CSV file: in its folder, or beside the volumes."""
    return base / name if (base / name).is_file() else base / folder / name


def _parts(volume: str, where: str) -> tuple[str, str, str]:
    """Split `train_53_a_1.nii.gz` into the name `train_53_a_1`, the scan `train_53_a` and the patient `train_53`."""
    name = volume.strip().removesuffix(".nii.gz")
    found = NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{where}: VolumeName is {volume!r} but must be as train_53_a_1.nii.gz: patient, scan, reconstruction")
    return name, found[1], found[2]


def _report(row: Mapping[str, str]) -> str:
    """Join findings and impressions, with white space folded; "Not given." and missing values are empty."""
    parts = (" ".join(row[column].split()) for column in REPORT_COLUMNS[1:])
    return " ".join(part for part in parts if not is_missing(part) and part.lower() != NOT_GIVEN)


def _labels(path: Path) -> dict[str, dict[str, int]]:
    """Return volume -> finding -> 0 or 1; empty where there is no such file."""
    labels = {}
    for where, row in csv_rows(path, ("VolumeName", *LABEL_COLUMNS)):
        name = _parts(row["VolumeName"], where)[0]
        try:
            values = {finding: label_value(column, row[column]) for finding, column in zip(FINDINGS_CT_RATE, LABEL_COLUMNS, strict=True)}
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        labels[name] = {finding: value for finding, value in values.items() if value is not None}
    return labels


def _readings(path: Path, geometry: bool) -> dict[str, dict[str, Any]]:
    """Return volume -> arguments of `read_volume`: slope and intercept, and with `geometry` the spacing and the axes."""
    readings = {}
    for where, row in csv_rows(path, METADATA_COLUMNS):
        name = _parts(row["VolumeName"], where)[0]
        slope, intercept, across, down, between = (
            value
            for column, count in (("RescaleSlope", 1), ("RescaleIntercept", 1), ("XYSpacing", 2), ("ZSpacing", 1))
            for value in _numbers(row[column], count, f"{where}: {column}")
        )
        readings[name] = {"hu": "auto", "rescale": [slope, intercept]}
        if geometry:
            cosines = row.get("ImageOrientationPatient") or SUPINE
            orientation = _orientation(_numbers(cosines, 6, f"{where}: ImageOrientationPatient"))
            readings[name] |= {"spacing": [between, down, across], "orientation": orientation}
    return readings


def _orientation(cosines: list[float]) -> str:
    """Convert DICOM's direction cosines (LPS) of the axes x and y to letters of the axes D, H, W: "SPL" for a patient on the back."""
    x, y = np.array(cosines[:3]), np.array(cosines[3:])
    letters = ""
    for axis in (np.cross(x, y), y, x):
        nearest = int(np.abs(axis).argmax())
        letters += ("LPS" if axis[nearest] > 0 else "RAI")[nearest]
    return letters


def _numbers(text: str, count: int, name: str) -> list[float]:
    """`[0.7, 0.7]` -> [0.7, 0.7]."""
    parts = text.strip().strip("[]()").split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise ValueError(f"{name} is {text!r} but must be {'a number' if count == 1 else f'{count} numbers, as [0.7, 0.7]'}")
    return numbers


def _not_of_the_chest(path: Path) -> set[str]:
    """Read the names of volumes or scans from such a list, one a line; empty where there is no list."""
    if not path.is_file():
        return set()
    return {line.strip().removesuffix(".nii.gz") for line in path.read_text(encoding="utf-8-sig").splitlines()}

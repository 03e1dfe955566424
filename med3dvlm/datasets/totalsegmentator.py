"""A folder for each case with its scan and a mask file for each structure, as TotalSegmentator's data set has them, -> records.

    meta.csv                               image_id, and optional: split; divided by semicolons as released. Without it, or without a
                                           split, cases are divided as `table.default_split` says
    s0001/ct.nii.gz                        the scan; mri.nii.gz in the data set of MR
    s0001/segmentations/liver.nii.gz       a mask for each structure, named by its file: `lung_upper_lobe_left` is "lung upper lobe left"

There are no reports. A structure that a scan does not show has an empty mask.

Source: TotalSegmentator (arXiv 2208.05868, Zenodo 6802613, version 2.0.1).
"""

import logging
import re
from pathlib import Path

from med3dvlm.datasets.cells import usual_split
from med3dvlm.datasets.csv_files import csv_rows, is_missing
from med3dvlm.datasets.m3d_seg import LESION, side_in
from med3dvlm.datasets.table import default_split
from med3dvlm.records import Mask, Question, Study

logger = logging.getLogger(__name__)

SCANS = ("ct.nii.gz", "mri.nii.gz", "ct.nii", "mri.nii")
FOLDERS = ("segmentations", "segmentation")
ENDING = re.compile(r"\.nii(\.gz)?$")


def splits(root: str | Path) -> list[str]:
    """Return the splits that meta.csv names, or into which cases are divided. Raises FileNotFoundError or ValueError where there is none."""
    return list(dict.fromkeys(_cases(Path(root)).values()))


def read(root: str | Path, split: str, failures: list[dict[str, str]] | None = None) -> tuple[list[Study], list[Question]]:
    """Return one split's studies, without reports and questions.

    Args:
        failures: takes {"study", "file", "reason"} of every case without scan or masks; without it that is an error.

    Raises:
        FileNotFoundError, ValueError: there are no cases, or a row of meta.csv is wrong; the message says where.
    """
    root = Path(root)
    cases = _cases(root)
    if split not in cases.values():
        raise ValueError(f"{root} has no split {split!r}; it has: {', '.join(dict.fromkeys(cases.values()))}")
    studies = []
    for case in (case for case, its in cases.items() if its == split):
        scan = next((root / case / name for name in SCANS if (root / case / name).is_file()), None)
        files = sorted(file for name in FOLDERS for file in (root / case / name).glob("*.nii*") if ENDING.search(file.name))
        if scan is None or not files:
            missing = f"{case}/{FOLDERS[0] if scan else SCANS[0]}"
            reason = f"{root / missing} is missing" if scan is None else f"{root / missing} holds no mask"
            if failures is None:
                raise FileNotFoundError(reason)
            failures.append({"study": case, "file": missing, "reason": reason})
            continue
        masks = {}
        for file in files:
            name = ENDING.sub("", file.name).replace("_", " ")
            kind = "finding" if LESION.search(name) else "structure"
            masks[name] = Mask(file.relative_to(root).as_posix(), kind=kind, side=side_in(name))
        image = scan.relative_to(root).as_posix()
        studies.append(Study(case, case, image, "", {}, split, "totalsegmentator", masks=masks))
    return studies, []


def _cases(root: Path) -> dict[str, str]:
    """Return the cases, each with its split."""
    found = sorted(folder.name for folder in root.glob("*") if any((folder / name).is_dir() for name in FOLDERS))
    listed: dict[str, str] = {}
    for where, row in csv_rows(root / "meta.csv", ("image_id",), ("split",)):
        split = row.get("split", "")
        listed[row["image_id"]] = default_split(row["image_id"]) if is_missing(split) else usual_split(split)
        if row["image_id"] in ("", ".", ".."):
            raise ValueError(f"{where}: image_id is {row['image_id']!r} but must be the name of a case's folder")
    if listed and (others := [case for case in found if case not in listed]):
        logger.warning("%s: left out %d folders, the first %s, which meta.csv does not list", root, len(others), others[0])
    cases = listed or {case: default_split(case) for case in found}
    if not found or not cases:
        raise FileNotFoundError(f"{root} has no case with a folder {FOLDERS[0]}; name the folder that holds s0001, s0002, ...")
    return cases

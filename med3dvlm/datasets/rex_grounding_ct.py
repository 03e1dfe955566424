"""ReXGroundingCT on disk -> records: those scans of CT-RATE of which sentences have masks, in its own splits.

The folder is CT-RATE's (see `ct_rate`), with dataset.json and segmentations/ as `sentence_masks` says. Reports, labels and metadata are
CT-RATE's; of a volume that is there in both versions, version 2 is taken. A split without masks, as the withheld test set, is none.
"""

from dataclasses import replace
from pathlib import Path

from med3dvlm.datasets import ct_rate, sentence_masks
from med3dvlm.datasets.cells import usual_split
from med3dvlm.records import Question, Study


def splits(root: str | Path) -> list[str]:
    """Return the splits that have masks. Raises FileNotFoundError or ValueError where there is none."""
    root = Path(root)
    found = dict.fromkeys(usual_split(entry.split) for entry in sentence_masks.entries(root) if (root / entry.label).is_file())
    if not found:
        listing, folder = root / sentence_masks.LISTING, sentence_masks.FOLDER
        raise FileNotFoundError(f"{listing} with masks in a folder {folder} beside it is missing; put both into the folder of CT-RATE")
    return list(found)


def read(root: str | Path, split: str, failures: list[dict[str, str]] | None = None) -> tuple[list[Study], list[Question]]:
    """Return one split's studies, without questions.

    Args:
        failures: takes {"study", "file", "reason"} of every listed scan whose volume, report or masks are missing; without it that is an error.

    Raises:
        FileNotFoundError, ValueError: a file, a row or an entry is missing or wrong; the message says where.
    """
    root = Path(root)
    if split not in (known := splits(root)):
        raise ValueError(f"{root} has no split {split!r} with masks; it has: {', '.join(known)}")
    volumes = {Path(study.id).name: study for folder in sorted(ct_rate.splits(root)) for study in ct_rate.read(root, folder, [])[0]}
    studies = []
    for entry in sentence_masks.entries(root):
        if usual_split(entry.split) != split:
            continue
        study = volumes.get(entry.volume)
        if study is not None and (root / entry.label).is_file():
            studies.append(replace(study, split=split, source="rex_grounding_ct", masks=entry.masks))
            continue
        reason = f"{root / entry.label} is missing" if study else f"{entry.volume} is not among the volumes of {root} that have a report"
        if failures is None:
            raise ValueError(reason)
        failures.append({"study": entry.volume, "file": entry.label, "reason": reason})
    return studies, []

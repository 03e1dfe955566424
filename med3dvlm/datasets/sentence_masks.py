"""Masks of sentences, as ReXGroundingCT has them for scans of CT-RATE.

    dataset.json                     {"train": [{"name": "train_1_a_1.nii.gz", "findings": {"0": "Nodule in ...", ...}, ...}, ...],
                                     "val": [...], "test": [...]}; ours beside the findings: "about", what else is known, by channel
    segmentations/train_1_a_1.nii.gz four axes: a mask (x, y, z) of the scan for each finding, by its number, (F, x, y, z)

Both lie in the folder of CT-RATE, in its folder `dataset`, or in a folder ReXGroundingCT of either.

Source: ReXGroundingCT (arXiv 2507.22030), its card and public code that reads it; the files themselves need an agreement and were not seen.
That the masks lie on the voxels of CT-RATE's version 2 as stored, whatever their header says, is what the code of several of its users
rests on; one of them says that rows and columns run the other way there. Look at some in a viewer before training on them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from med3dvlm.datasets.m3d_seg import json_object, side_in
from med3dvlm.files import write_json
from med3dvlm.records import Mask

LISTING, FOLDER = "dataset.json", "segmentations"
PLACES = ("", "dataset", "ReXGroundingCT", "dataset/ReXGroundingCT")
ENDING = re.compile(r"\.nii(\.gz)?$")


class Entry(NamedTuple):
    """A scan and the masks of its sentences; `volume` is as train_1_a_1, `label` the masks' file relative to the root."""

    split: str
    volume: str
    label: str
    masks: dict[str, Mask]


def entries(root: Path) -> Iterator[Entry]:
    """Yield each listed scan, none where there is no list beside a folder of masks."""
    base = next((root / place for place in PLACES if (root / place / LISTING).is_file() and (root / place / FOLDER).is_dir()), None)
    if base is None:
        return
    path = base / LISTING
    for split, listed in json_object(path).items():
        for number, entry in enumerate(listed if isinstance(listed, list) else (), start=1):
            where = f"{path}, entry {number} of {split!r}"
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not isinstance(entry.get("findings"), dict):
                raise ValueError(f'{where} must be {{"name": file, "findings": {{"0": sentence, ...}}}}')
            volume = ENDING.sub("", entry["name"])
            label = (base / FOLDER / f"{volume}.nii.gz").relative_to(root).as_posix()
            try:
                yield Entry(split, volume, label, _masks(label, entry))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error}") from error


def _masks(label: str, entry: dict[str, Any]) -> dict[str, Mask]:
    """Return the masks by name: the sentence, or the name that "about" gives."""
    masks: dict[str, Mask] = {}
    about = entry.get("about", {})
    for channel in dict.fromkeys((*entry["findings"], *about)):
        text = " ".join(str(entry["findings"].get(channel, "")).split())
        facts = {"name": text, "kind": "finding", "side": side_in(text)} | about.get(channel, {})
        words = facts.pop("name")
        name, count = words, 2
        while name in masks:
            name, count = f"{words} ({count})", count + 1
        masks[name] = Mask(label, channel=int(channel), text=text, **facts)
    return masks


def write(root: Path, listed: dict[str, list[tuple[str, dict[str, dict[str, Any]]]]]) -> None:
    """Write the list of scans whose masks are there.

    Args:
        listed: split -> (volume, name of a mask -> its facts, "text" among them), the masks in the order of their channels.
    """
    content: dict[str, list[dict[str, Any]]] = {split: [] for split in listed}
    for split, volumes in listed.items():
        for volume, masks in volumes:
            findings, about = {}, {}
            for channel, (name, facts) in enumerate(masks.items()):
                if facts.get("text"):
                    findings[str(channel)] = facts["text"]
                about[str(channel)] = {"name": name, **{key: value for key, value in facts.items() if key != "text"}}
            content[split].append({"name": f"{volume}.nii.gz", "findings": findings, "about": about})
    write_json(root / LISTING, content)

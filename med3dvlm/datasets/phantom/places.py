"""Facts about a phantom's masks: organ, side, place and sentence of the report, for findings and for the structures around them."""

from collections.abc import Mapping
from typing import Any

from med3dvlm.datasets.m3d_seg import side_in
from med3dvlm.datasets.phantom.abdomen import POLES, SEGMENTS
from med3dvlm.datasets.phantom.body import Finding
from med3dvlm.datasets.phantom.chest import LOBES

COUNTS = {1: "one", 2: "two", 3: "three"}
STRUCTURES = {  # drawn in each region, with the organ that each is, or is a part of
    "chest": {
        "right lung": "lung", "left lung": "lung", **dict.fromkeys(LOBES, "lung"), "heart": "heart", "aorta": "aorta", "liver": "liver",
        "spleen": "spleen", "spine": "spine",
    },
    "abdomen": {
        "liver": "liver", **dict.fromkeys(SEGMENTS, "liver"), "stomach": "stomach", "spleen": "spleen",
        "right kidney": "kidney", "left kidney": "kidney", **dict.fromkeys(POLES, "kidney"), "gallbladder": "gallbladder",
        "inferior vena cava": "inferior vena cava", "aorta": "aorta", "spine": "spine",
    },
}  # fmt: skip


def about_finding(finding: Finding, facts: Mapping[str, Any], report: str) -> dict[str, Any]:
    """Return the fields of a `Mask` for findings of this kind. The side is the one that the place names, or the kind's."""
    sentences = [wording.format(place=finding.place, size=finding.size_mm, count=COUNTS[finding.count]) for wording in facts["present"]]
    return {
        "kind": "finding",
        "organ": facts["organ"],
        "side": facts.get("side") or side_in(finding.place),
        "place": finding.place,
        "text": next((sentence for sentence in sentences if sentence in report), ""),
    }


def about_structures(region: str) -> dict[str, dict[str, Any]]:
    """Return the fields of the `Mask` of each structure of a region."""
    return {name: {"kind": "structure", "organ": organ, "side": side_in(name)} for name, organ in STRUCTURES[region].items()}

"""What is known of a phantom's masks: organ, side, place and the sentence of the report, of findings and of the structures around them."""

from collections.abc import Mapping
from typing import Any

from med3dvlm.datasets.m3d_seg import side_in
from med3dvlm.datasets.phantom.body import Finding

COUNTS = {1: "one", 2: "two", 3: "three"}
STRUCTURES = {  # drawn in each region
    "chest": ("right lung", "left lung", "heart", "aorta", "liver", "spleen", "spine"),
    "abdomen": (
        "liver", "stomach", "spleen", "right kidney", "left kidney", "gallbladder", "inferior vena cava", "aorta", "spine",
    ),
}  # fmt: skip


def about_finding(finding: Finding, facts: Mapping[str, Any], report: str) -> dict[str, Any]:
    """The fields of a `Mask`, from what the data says of findings of this kind. The side is the one that the place names, or the kind's."""
    said = [wording.format(place=finding.place, size=finding.size_mm, count=COUNTS[finding.count]) for wording in facts["present"]]
    return {
        "kind": "finding",
        "organ": facts["organ"],
        "side": facts.get("side") or side_in(finding.place),
        "place": finding.place,
        "text": next((sentence for sentence in said if sentence in report), ""),
    }


def about_structure(name: str) -> dict[str, Any]:
    side = side_in(name)
    return {"kind": "structure", "organ": name.removeprefix(f"{side} "), "side": side}

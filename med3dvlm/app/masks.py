"""Masks of findings on the open scan: their form for the browser, the list beside the viewer, and files to save. Nothing is written to disk.

Shapes: D, H, W the scan's own axes; Z, Y, X the display axes (viewer.py).
"""

import gzip
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from med3dvlm.app.analysis import Segment
from med3dvlm.app.scans import OpenScan
from med3dvlm.formats.nifti import mask_file
from med3dvlm.geometry.measurements import NEIGHBOURS, bounding_box
from med3dvlm.geometry.orientation import for_screen
from med3dvlm.inference.segmentation import Segmentation, numbered_file
from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.reports.dicom_seg import dicom_segmentation
from med3dvlm.reports.findings import find_mentions, finding_states

MAX_MASKS = 20  # on a scan
TOGETHER = 4  # masks that are drawn at a time; each takes as many bytes as the scan has voxels until it is packed
MAX_NAME_LENGTH = 200  # characters
SAVES = {"zip": "NIfTI", "dcm": "DICOM Segmentation"}
UNVERIFIED = f"Drawn by a model. Nobody has verified it. {RESEARCH_NOTICE}"
NO_FINDING = "The report states no finding that is present; type one in words, or draft the report first."
NOTHING = np.zeros((0, 0, 0), bool)
NO_MASK = "No mask was drawn on this scan, so there is none to save; look for another finding."


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask, packed.

    - `found`: what was measured, without its mask.
    - `packed`: the mask within its bounding box, eight voxels a byte.
    - `bits`: the same for the browser: (Z, Y, X) within a box, packed, the lowest bit first. Empty where nothing was found.
    - `facts`: where that box lies in the picture's voxels (`origin`, `shape`), and the voxel that the planes go to (`target`).
    """

    found: Segmentation
    packed: NDArray[np.uint8]
    bits: bytes
    facts: dict[str, Any]

    def unpacked(self, shape: tuple[int, int, int]) -> Segmentation:
        """Return the segmentation with its mask (D, H, W) on the scan's own grid."""
        mask = np.zeros(shape, bool)
        if self.found.bounding_box is not None:
            box = tuple(map(slice, *self.found.bounding_box))
            inside = mask[box]
            inside[...] = np.unpackbits(self.packed, count=inside.size).reshape(inside.shape)
        return replace(self.found, mask=mask)


def pack(found: Segmentation, scan: OpenScan) -> Mask:
    """Pack a segmentation of the scan, whose mask is (D, H, W) on the scan's own grid."""
    bits, facts = _for_browser(found.mask, scan)
    inside = NOTHING if found.bounding_box is None else found.mask[tuple(map(slice, *found.bounding_box))]
    return Mask(replace(found, mask=NOTHING), np.packbits(inside), bits, facts)


def _for_browser(mask: NDArray[np.bool_], scan: OpenScan) -> tuple[bytes, dict[str, Any]]:
    """Return `bits` and `facts` of a Mask. Where the picture is coarser than the scan, a voxel belongs to the mask if any voxel of its block
    does.
    """
    order, flips = for_screen(scan.volume.orientation)
    block = scan.picture.block
    if block > 1:
        depth, height, width = mask.shape
        cut = mask[:, : height - height % block, : width - width % block]
        mask = np.logical_or.reduce(cut.reshape(depth, height // block, block, width // block, block), axis=(2, 4))
    shown = mask.transpose(order)[flips]  # (Z, Y, X)
    box = bounding_box(shown)
    if box is None:
        return b"", {"origin": [0, 0, 0], "shape": [0, 0, 0], "target": None}
    origin = np.array(box[0])
    inside = shown[tuple(map(slice, *box))]
    target = origin + _middle(inside, np.array(scan.picture.facts["spacing"]))
    facts = {"origin": origin.tolist(), "shape": list(inside.shape), "target": target.tolist()}
    return np.packbits(inside, bitorder="little").tobytes(), facts


def _middle(mask: NDArray[np.bool_], spacing: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the voxel of the largest component that is nearest to the component's centre; `spacing` in mm."""
    labels, _ = ndimage.label(mask, NEIGHBOURS)
    voxels = np.argwhere(labels == 1 + np.bincount(labels.ravel())[1:].argmax())
    distances = np.linalg.norm((voxels - voxels.mean(axis=0)) * spacing, axis=1)
    middle: NDArray[np.int64] = voxels[distances.argmin()]
    return middle


def segment_findings(segment: Segment, scan: OpenScan, names: Sequence[str]) -> Iterator[Mask]:
    """Yield a mask for each name. Raises ValueError where the model cannot segment."""
    for start in range(0, len(names), TOGETHER):
        for found in segment(scan.volume, names[start : start + TOGETHER]):
            yield pack(found, scan)


def names_to_segment(phrase: str, report: str) -> list[str]:
    """Return the phrase, or if it is empty the findings that the report states as present or uncertain.

    Raises:
        ValueError: the phrase is too long, or there is neither; one sentence.
    """
    phrase = " ".join(phrase.split())
    if len(phrase) > MAX_NAME_LENGTH:
        raise ValueError(f"The finding has {len(phrase)} characters but at most {MAX_NAME_LENGTH} are taken; name it in fewer words.")
    names = [phrase] if phrase else [readable(name) for name, state in finding_states(report).items() if state != "absent"]
    if not names:
        raise ValueError(NO_FINDING)
    return names


def readable(finding: str) -> str:
    """Write a finding's name in words: "lung_nodule" -> "lung nodule"."""
    return finding.replace("_", " ")


def stated(text: str) -> list[list[Any]]:
    """Return the places where a text states findings as present or uncertain: [start, end, finding], without nesting."""
    places: list[list[Any]] = []
    for mention in find_mentions(text):
        if mention.state != "absent" and (not places or mention.start >= places[-1][1]):
            places.append([mention.start, mention.start + len(mention.phrase), readable(mention.finding)])
    return places


def measurements(found: Segmentation) -> str:
    """Write the measurements in words; "" where the spacing is unknown."""
    parts = []
    if found.longest_diameter_mm is not None:
        parts.append(f"longest diameter {found.longest_diameter_mm:.0f} mm")
    if found.volume_ml is not None:
        digits = 2 if found.volume_ml < 1 else 1 if found.volume_ml < 100 else 0
        parts.append(f"{found.volume_ml:.{digits}f} ml")
    if found.side is not None:
        parts.append({"both": "both sides", "midline": "midline"}.get(found.side, f"{found.side} side"))
    return ", ".join(parts)


def for_viewer(masks: Mapping[int, Mask], address: str, dicom: bool) -> dict[str, Any]:
    """Return what masks.js lists and draws, and the files to save: [label, address, name]. `dicom`: whether the scan is DICOM."""
    listed = [
        {
            "number": number, "url": f"{address}/mask/{number}", "name": mask.found.name, "found": mask.found.found,
            "measurements": measurements(mask.found), "score": mask.found.score, **mask.facts,
        }
        for number, mask in masks.items()
    ]  # fmt: skip
    saves = [[label, f"{address}/masks/{kind}", f"masks.{kind}"] for kind, label in SAVES.items() if kind != "dcm" or dicom]
    return {"masks": listed, "saves": saves}


def save(masks: Sequence[Mask], scan: OpenScan, kind: str, model: str) -> bytes:
    """Save the masks that were found as one of the kinds in SAVES: a zip of NIfTI files, or a DICOM Segmentation.

    Raises:
        ValueError: nothing was found, or the scan is not one that a DICOM Segmentation can refer to; one sentence.
    """
    masks = [mask for mask in masks if mask.found.found]
    if not masks:
        raise ValueError(NO_MASK)
    if kind == "zip":
        return _nifti_zip(masks, scan, model)
    if scan.files is None:
        raise ValueError("A DICOM Segmentation needs a DICOM scan, and this scan is not DICOM; save the masks as NIfTI.")
    if scan.resampled:
        raise ValueError("The scan was straightened, so the masks do not lie on the slices of its DICOM files; save the masks as NIfTI.")
    segments = [(mask.found.name, mask.unpacked(scan.volume.shape).mask) for mask in masks]
    return dicom_segmentation(scan.files, "The scan", scan.series, segments, ("Med3DVLM", version("med3dvlm")))


def _nifti_zip(masks: Sequence[Mask], scan: OpenScan, model: str) -> bytes:
    """Return a zip of one NIfTI file for each mask (masks may overlap) and measurements.json."""
    stream, rows = io.BytesIO(), []
    with zipfile.ZipFile(stream, "w") as archive:
        for number, mask in enumerate(masks, start=1):
            found = mask.unpacked(scan.volume.shape)
            file = numbered_file(number, found.name)
            archive.writestr(file, gzip.compress(mask_file(found.mask, found.spacing, found.affine), mtime=0))
            rows.append({"file": file, "name": found.name, **found.facts})
        about = {"notice": UNVERIFIED, "model": model, "findings": rows}
        archive.writestr("measurements.json", json.dumps(about, ensure_ascii=False, indent=2))
    return stream.getvalue()

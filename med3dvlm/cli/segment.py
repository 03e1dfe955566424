"""`segment`: masks of findings and organs in a scan, from words."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from med3dvlm.cli.options import Commands, add_scan, quiet_transformers, reading

if TYPE_CHECKING:
    from med3dvlm.inference.segmentation import Segmentation

LETTERS = r"[^\W_]+"  # of any script, and digits


def add_commands(commands: Commands) -> None:
    command = commands.add_parser("segment", help="segment a finding or an organ in a scan, and measure it")
    command.add_argument("model", metavar="MODEL", type=Path, help="the folder of a trained segmenter (`med3dvlm train segmentation`)")
    add_scan(command)
    command.add_argument("texts", metavar="TEXT", nargs="+", help="what to look for, as in 'liver mass'; each gets a mask of its own")
    command.add_argument(
        "--out", metavar="FILE", type=Path, help="write the mask as .nii or .nii.gz; of several texts FILE-<text>.nii.gz for each"
    )
    command.add_argument("--dicom-seg", metavar="FILE", type=Path, help="write the masks that were found as a DICOM Segmentation")
    command.add_argument(
        "--threshold", type=float, default=0.5, metavar="P", help="probability from which a voxel counts (default: %(default)s)"
    )
    command.add_argument(
        "--presence",
        type=float,
        default=0.75,
        metavar="P",
        help="probability of the finding being there at all above which it is drawn: a lower one draws more, of those too that are not there "
        "(default: %(default)s)",
    )
    command.set_defaults(run=_segment)


def _segment(arguments: argparse.Namespace) -> int | None:
    from med3dvlm.inference.segmentation import Segmenter, require_nifti
    from med3dvlm.prompts import RESEARCH_NOTICE
    from med3dvlm.reports.dicom_study import require_dicom
    from med3dvlm.volume import read_volume

    files = _files(arguments.out, arguments.texts)
    for file in files:
        require_nifti(file)
    options = reading(arguments)
    straighten = options.pop("straighten", False)  # the mask lies on the scan as it is stored
    volume = read_volume(arguments.scan, **options)  # before the model, so that a wrong file fails at once
    for warning in volume.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    if arguments.dicom_seg is not None:
        require_dicom(Path(arguments.scan), arguments.scan, "segmentation")
    quiet_transformers()
    segmenter = Segmenter.from_pretrained(arguments.model)
    segmenter.processor.image_processor.straighten |= straighten
    found = segmenter.segment_all(volume, arguments.texts, arguments.threshold, arguments.presence)
    for one in found:
        print(line_of(one, arguments.presence))
    for file, one in zip(files, found, strict=False):
        one.save_nifti(file)
        print(f"wrote {file}{'' if one.found else ', which is empty'}", file=sys.stderr)
    if arguments.dicom_seg is not None:
        _write_dicom(arguments, [one for one in found if one.found])
    print(RESEARCH_NOTICE, file=sys.stderr)
    return None


def _files(out: Path | None, texts: Sequence[str]) -> list[Path]:
    """Return a file for each text.

    Raises:
        ValueError: two texts would have one.
    """
    if out is None or len(texts) == 1:
        return [] if out is None else [out]
    ending = ".nii.gz" if out.name.lower().endswith(".nii.gz") else out.suffix
    stem = out.name[: len(out.name) - len(ending)]
    files = [out.with_name(f"{stem}-{'-'.join(re.findall(LETTERS, text.lower()))}{ending}") for text in texts]
    if len(set(files)) < len(files):
        raise ValueError("two of the texts would be written into one file; ask for each once, in other words")
    return files


def line_of(one: "Segmentation", presence: float = 0.5) -> str:
    """Describe a mask in one line; it was drawn where its score exceeds `presence`, by default that of what an answer states."""
    start = f"{one.name}: presence {one.score:.2f}"
    if one.bounding_box is None:
        return f"{start}, {'no voxel above the threshold' if one.score > presence else 'nothing drawn'}."
    parts = [start]
    if one.volume_ml is not None:
        parts += [f"{one.volume_ml:.3g} ml", f"longest diameter {one.longest_diameter_mm:.0f} mm"]
    if one.side is not None:
        parts.append({"both": "on both sides", "midline": "in the midline"}.get(one.side, f"on the {one.side}"))
    ranges = [f"{axis} {first}-{after - 1}" for axis, first, after in zip("DHW", *one.bounding_box, strict=True)]
    parts.append(f"voxels {', '.join(ranges)}")
    return ", ".join(parts)


def _write_dicom(arguments: argparse.Namespace, found: Sequence["Segmentation"]) -> None:
    """Write a DICOM Segmentation, or say why there is none."""
    from importlib.metadata import version

    from med3dvlm.files import atomic_file
    from med3dvlm.reports.dicom_seg import dicom_segmentation

    if not found:
        print(f"Nothing was found, so {arguments.dicom_seg} is not written.", file=sys.stderr)
        return
    segments = [(one.name, one.mask) for one in found]
    content = dicom_segmentation(Path(arguments.scan), arguments.scan, arguments.series, segments, ("Med3DVLM", version("med3dvlm")))
    with atomic_file(arguments.dicom_seg) as aside:
        aside.write_bytes(content)
    print(f"wrote {arguments.dicom_seg}", file=sys.stderr)

"""Segment findings in a scan by text: masks on the scan's own grid, and their measurements.

    segmenter = Segmenter.from_pretrained("outputs/demo/stage1/segmenter")
    found = segmenter.segment("scan.nii.gz", "liver mass")
    found.volume_ml, found.longest_diameter_mm, found.side
    found.save_nifti("mask.nii.gz")

Shapes: D, H, W voxels of the scan; K texts.
"""

import gzip
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from med3dvlm.checkpoints import load_segmenter
from med3dvlm.files import atomic_file
from med3dvlm.formats.nifti import mask_file
from med3dvlm.geometry import measurements
from med3dvlm.models.clip_processor import Med3DCLIPProcessor
from med3dvlm.preprocessing import Scan, VolumeProcessor
from med3dvlm.volume import Volume, read_volume

THRESHOLD = 0.5  # probability above which a voxel belongs to a mask
# Probability of a finding being there at all above which it is drawn: where it is asked for, since of many one is often drawn wrongly from 0.5 on,
# and where a report or an answer states it.
PRESENCE, PRESENCE_WHERE_STATED = 0.75, 0.5
NIFTI_ENDINGS = (".nii", ".nii.gz")


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A mask in a scan, and its measurements.

    - `name`: what was asked for.
    - `mask`: (D, H, W) booleans on the scan's own grid, all False where nothing was found.
    - `score`: the probability of the finding being there at all.
    - `volume_ml`: the sum of the voxels; None where the spacing or the orientation of the scan is unknown.
    - `longest_diameter_mm`: of the longest of its components, see `geometry.measurements.longest_diameter_mm`; None as before.
    - `bounding_box`: the first voxel along D, H, W and the one after the last; None where nothing was found.
    - `bounding_box_mm`: lowest and highest x, y, z in RAS mm; None as before, or without geometry.
    - `side`: "left" or "right" of the patient, "midline", "both", or None; see `geometry.measurements.side_of`.
    - `spacing`: (z, y, x) in mm, and `affine`, from the index (d, h, w, 1) to RAS mm: those of the scan.
    """

    name: str
    mask: NDArray[np.bool_]
    score: float
    volume_ml: float | None = None
    longest_diameter_mm: float | None = None
    bounding_box: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
    bounding_box_mm: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    side: str | None = None
    spacing: tuple[float, float, float] | None = None
    affine: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, name: str, mask: NDArray[np.bool_], score: float, volume: Volume, middle: float | None = None) -> "Segmentation":
        """Measure a mask on a scan.

        Args:
            middle: x of the patient's mid-plane, see `geometry.measurements.body_middle`; by default estimated here.
        """
        positions = volume.voxel_positions
        box = measurements.bounding_box(mask)
        found: dict[str, Any] = {"bounding_box": box, "spacing": volume.spacing, "affine": volume.affine}
        if positions is not None:
            if box is not None and middle is None:
                middle = measurements.body_middle(volume.array, positions, volume.unit == "HU")
            found |= {
                "volume_ml": measurements.volume_ml(mask, positions),
                "longest_diameter_mm": measurements.longest_diameter_mm(mask, positions),
                "bounding_box_mm": measurements.extent_mm(mask, positions),
                "side": None if middle is None else measurements.side_of(mask, positions, middle),
            }
        return cls(name, mask, score, **found)

    @property
    def found(self) -> bool:
        """Return whether the mask has a voxel."""
        return self.bounding_box is not None

    @property
    def facts(self) -> dict[str, Any]:
        """Return the measurements for JSON."""
        return {name: getattr(self, name) for name in ("score", "volume_ml", "longest_diameter_mm", "side", "bounding_box")}

    def components(self, volume: Volume) -> list["Segmentation"]:
        """Return the mask's connected components, the largest first, each measured on the scan."""
        return [Segmentation.of(self.name, part, self.score, volume) for part in measurements.components(self.mask)]

    def save_nifti(self, path: str | Path) -> None:
        """Write the mask, 0 and 1, with the scan's own affine, so that it lies on the scan in other programs.

        Raises:
            ValueError: the name does not end in .nii or .nii.gz.
        """
        require_nifti(path)
        content = self.nifti(str(path).lower().endswith(".gz"))
        with atomic_file(Path(path)) as aside:
            aside.write_bytes(content)

    def nifti(self, compressed: bool = True) -> bytes:
        """Return the content of such a file."""
        content = mask_file(self.mask, self.spacing, self.affine)
        return gzip.compress(content, mtime=0) if compressed else content


def numbered_file(number: int, name: str) -> str:
    """Return the file name of a mask among others: (3, "Liver mass.") -> "03_liver_mass.nii.gz"."""
    return f"{number:02d}_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')[:60] or 'mask'}.nii.gz"


def require_nifti(path: str | Path) -> None:
    """Raise ValueError unless the name is that of a NIfTI file, before any work is done."""
    if not str(path).lower().endswith(NIFTI_ENDINGS):
        raise ValueError(f"{path} must end in {' or '.join(NIFTI_ENDINGS)}, the format in which a mask is written")


class Segmenter:
    """A Med3DSegmenter that segments what a text names. Its model is for prediction alone."""

    def __init__(self, model: Any, processor: Med3DCLIPProcessor) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None) -> "Segmenter":
        """Load a directory that `stages/segmentation.py` wrote; by default onto the GPU where there is one.

        Raises:
            FileNotFoundError, ValueError: there is no model, or one of another kind.
        """
        model, processor = load_segmenter(path)
        return cls(model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))), processor)  # type: ignore[arg-type]

    @torch.no_grad()
    def probabilities(self, pixel_values: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the model's probabilities for a prepared scan (1, 1, D', H', W'): of every voxel (K, D', H', W') and of presence (K),
        float32.

        Raises:
            ValueError: a text is empty, or there is none.
        """
        if not texts or not all(text.strip() for text in texts):
            raise ValueError("The text is empty; say what to look for, as in 'liver mass'.")
        coded = self.processor(text=[text.strip() for text in texts])
        device = self.model.device
        output = self.model(
            pixel_values=pixel_values.to(device, self.model.dtype),
            input_ids=coded["input_ids"][None].to(device),
            attention_mask=coded["attention_mask"][None].to(device),
        )
        return output.logits[0].float().sigmoid(), output.presence[0].float().sigmoid()

    def segment(self, scan: Scan, text: str, threshold: float = THRESHOLD, presence: float = PRESENCE) -> Segmentation:
        """Return the mask for a text, as `segment_all` does."""
        return self.segment_all(scan, [text], threshold, presence)[0]

    def segment_all(self, scan: Scan, texts: Sequence[str], threshold: float = THRESHOLD, presence: float = PRESENCE) -> list[Segmentation]:
        """Return a mask for each text.

        A voxel of the scan belongs to it where the probability, linear between the model's voxels, exceeds the threshold. The mask is
        empty unless the probability of the finding being there at all exceeds `presence`; a higher one draws fewer findings that are not.

        Args:
            scan: a path or a Volume.
            threshold, presence: above 0 and below 1.

        Raises:
            ValueError: a text is empty, a probability impossible, or the scan unusable (VolumeError).
        """
        return segment_scan(
            scan, texts, self.processor.image_processor, lambda pixel_values: self.probabilities(pixel_values, texts), threshold, presence
        )


def segment_scan(
    scan: Scan,
    names: Sequence[str],
    processor: VolumeProcessor,
    predict: Callable[[Tensor], tuple[Tensor, Tensor]],
    threshold: float,
    presence: float,
) -> list[Segmentation]:
    """Return K masks on a scan's own grid, see `Segmenter.segment_all`.

    Args:
        names: what each mask is called.
        predict: what the model says of the prepared scan, see `Segmenter.probabilities`.
    """
    for name, value in (("threshold", threshold), ("presence", presence)):
        if not 0 < value < 1:
            raise ValueError(f"The {name} is {value:g} but a probability above 0 and below 1 is needed.")
    if isinstance(scan, (str, os.PathLike)):
        scan = read_volume(scan)
    if not isinstance(scan, Volume):
        raise ValueError("A mask lies on a scan's own grid: give a path or a Volume, not a prepared tensor.")
    volume, positions = scan, scan.voxel_positions
    pixels, placement = processor.transform_and_placement(volume.straighten() if processor.straighten else volume)
    likely, scores = predict(pixels[None])
    masks = [
        _on_scan(one, volume, processor, placement, threshold) if score > presence else np.zeros(volume.shape, bool)
        for one, score in zip(likely, scores.tolist(), strict=True)
    ]
    middle = None if positions is None else measurements.body_middle(volume.array, positions, volume.unit == "HU")
    return [
        Segmentation.of(name.strip(), mask, score, volume, middle) for name, mask, score in zip(names, masks, scores.tolist(), strict=True)
    ]


def _on_scan(
    likely: Tensor, volume: Volume, processor: VolumeProcessor, placement: NDArray[np.float64], threshold: float
) -> NDArray[np.bool_]:
    """Return where the probabilities (D', H', W') exceed the threshold, on the scan's own grid."""
    # What lies a voxel and more from every one above the threshold cannot exceed it between voxels: as zeros it costs nothing.
    near = functional.max_pool3d(likely[None, None], 3, stride=1, padding=1)[0, 0] > threshold
    mask: NDArray[np.bool_] = (processor.to_scan(likely * near, volume, placement) > threshold).cpu().numpy()
    return mask

"""Random changes to training volumes, made on the device: intensity, and a small affine with a crop.

Reports and questions speak of sides, planes and directions, so nothing here mirrors a scan or turns it by a right angle, as the published
recipe's RandFlip and RandRotate90 do. Flips are there for data whose texts name no side; with any other text they are refused.

The affine is one resampling in plain torch (`grid_sample`), a volume at a time so that memory does not grow with the batch: the dictionary
transforms of MONAI and torchio work on the CPU, in the loader's processes, and would send float32 over the bus instead of whole numbers.
What lies beyond the scan is air, the recipe's lowest value.

A volume's changes follow from (seed, epoch, the row's place in its data set) and nothing else; the noise alone also from the kind of device.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from med3dvlm.datasets.streams import Purpose, stream

Matrix = NDArray[np.float64]

AXES = ("depth", "height", "width")
SIDES = re.compile(
    r"\b(left|right|anterior|posterior|superior|inferior|upper|lower|above|below|cranial|caudal|dorsal|ventral|apical|basal)(ly)?\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Augmentation:
    """How much a volume may change. Each amount is drawn uniformly from its range; with 0 for all, nothing changes.

    - `share`: of the volumes whose intensities change, and independently of those that are moved; the rest stays as evaluation sees it.
    - `scale`, `shift`: times 1 +- scale, plus +- shift; `gamma`: to the power of exp(+- gamma); `noise`: normal, of a standard deviation
      up to it. All are shares of the recipe's range, air at 0; what leaves the range is clipped.
    - `rotation`: degrees, in the plane of the slices. Of voxels: where they are wider than high, as m3d and hu_window make them when they
      stretch an oblong crop to their size, the turn shears the body a little. Out of the plane it would shear it much.
    - `zoom`: 1 +- zoom along all axes; `translation`: +- this share of each axis; `crop`: up to this share of each axis is cut off, at
      either end, and what remains fills the volume.
    - `flips`: axes ("depth", "height", "width") along which half of the volumes are mirrored.

    The amounts are customary ones, not tuned.
    """

    share: float = 0.5
    scale: float = 0.1
    shift: float = 0.05
    gamma: float = 0.2
    noise: float = 0.02
    rotation: float = 8.0
    zoom: float = 0.08
    translation: float = 0.04
    crop: float = 0.1
    flips: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self)[:-1]:
            value, most = getattr(self, field.name), 45 if field.name == "rotation" else 1 if field.name == "share" else 0.9
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise ValueError(f"augmentation: {field.name} is {value!r} but must be a number from 0 to {most}")
        if isinstance(self.flips, str) or not set(self.flips) <= set(AXES):
            raise ValueError(f"augmentation: flips is {self.flips!r} but must be a list of axes from {', '.join(AXES)}")
        object.__setattr__(self, "flips", tuple(self.flips))

    @classmethod
    def read(cls, setting: str | dict[str, Any] | None) -> "Augmentation | None":
        """Parse a setting: none, intensity, default, or a mapping (JSON if it is text) of what differs from default.

        Raises:
            ValueError: it says something else.
        """
        if setting in ("none", None):
            return None
        if setting == "default":
            return cls()
        if setting == "intensity":
            return cls(rotation=0, zoom=0, translation=0, crop=0)
        if isinstance(setting, str):
            try:
                setting = json.loads(setting)
            except json.JSONDecodeError:
                pass
        if not isinstance(setting, dict):
            raise ValueError(f"augmentation is {setting!r} but must be none, intensity, default or settings such as {{rotation: 5}}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(map(str, set(setting) - set(known))):
            raise ValueError(f"augmentation has no setting {', '.join(unknown)}; it has {', '.join(known)}")
        return cls(**setting)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings for JSON; `read` takes them."""
        return asdict(self) | {"flips": list(self.flips)}

    def check(self, texts: Iterable[str]) -> None:
        """Raise ValueError where volumes are to be flipped but the texts name a side or a direction."""
        if self.flips and (sided := [match.group() for match in map(SIDES.search, texts) if match]):
            raise ValueError(
                f"augmentation: flips along {' and '.join(self.flips)} would make {len(sided)} texts of the training split wrong, as they speak "
                f"of sides or directions (the first says {sided[0]!r}); leave flips out"
            )

    def __call__(self, volumes: Tensor, keys: Tensor, bounds: tuple[float, float]) -> Tensor:
        """Return augmented copies of volumes.

        Args:
            volumes: (B, 1, D, H, W) float32, on any device.
            keys: (B, 3) whole numbers, each volume's (seed, epoch, row).
            bounds: the lowest value, that of air, and the highest that a model sees (`VolumeProcessor.grid.values`).
        """
        lowest, top = bounds
        changed = volumes.clone()
        for volume, key in zip(changed, keys.tolist(), strict=True):
            random = stream(key, Purpose.AUGMENTATION)
            tinted, affine, flipped = self._draw_movement(random, volume.shape[1:])
            tint, deviation, seed = random.uniform(-1, 1, 3), self.noise * random.random(), int(random.integers(2**62))
            if affine is not None:
                volume.copy_(resample(volume - lowest, *affine).add_(lowest))
            if flipped:
                volume.copy_(volume.flip(flipped))
            if tinted:
                values = volume.sub_(lowest).div_(top - lowest).clamp_(0, 1).pow_(float(np.exp(self.gamma * tint[0])))
                values.mul_(1 + self.scale * tint[1]).add_(self.shift * tint[2])
                if deviation:
                    generator = torch.Generator(volume.device).manual_seed(seed)
                    values.add_(torch.randn(values.shape, generator=generator, device=volume.device), alpha=deviation)
                values.mul_(top - lowest).add_(lowest)
            volume.clamp_(lowest, top)
        return changed

    def move_masks(self, masks: Tensor, keys: Tensor) -> Tensor:
        """Transform masks (B, K, D, H, W) bool with their volumes: a voxel belongs to a mask that covers half of it."""
        moved = masks.clone()
        for own, key in zip(moved, keys.tolist(), strict=True):
            _, affine, flipped = self._draw_movement(stream(key, Purpose.AUGMENTATION), own.shape[1:])
            if affine is not None and len(own):
                own.copy_(resample(own.float(), *affine) >= 0.5)
            if flipped:
                own.copy_(own.flip(flipped))
        return moved

    def _draw_movement(self, random: np.random.Generator, shape: Sequence[int]) -> tuple[bool, tuple[Matrix, Matrix] | None, list[int]]:
        """Draw whether intensities change, the affine of `resample` or None, and the axes of (C, D, H, W) that are flipped."""
        moved, tinted = random.random(2) < self.share
        flipped = [axis + 1 for axis, draw in enumerate(random.random(3)) if draw < 0.5 and AXES[axis] in self.flips]
        affine = self._draw_affine(random, shape)
        moved &= bool(self.rotation or self.zoom or self.translation or self.crop)
        return bool(tinted), affine if moved else None, flipped

    def _draw_affine(self, random: np.random.Generator, shape: Sequence[int]) -> tuple[Matrix, Matrix]:
        """Draw matrix (3, 3) and offset (3,): where in the scan a voxel of the result comes from, both in voxels (d, h, w) from the middle."""
        angle = np.deg2rad(self.rotation * random.uniform(-1, 1))
        turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
        zoom = 1 + self.zoom * random.uniform(-1, 1)
        kept = 1 - self.crop * random.random(3)
        extent = np.array(shape) - 1
        offset = extent * ((1 - kept) * random.uniform(-0.5, 0.5, 3) + self.translation * random.uniform(-1, 1, 3))
        return turn * kept / zoom, offset


def resample(volume: Tensor, matrix: Matrix, offset: Matrix) -> Tensor:
    """Resample trilinearly: the voxel at o from the middle gets the value at `matrix @ o + offset` from the middle, 0 outside of the volume.

    Args:
        volume: (C, D, H, W).
        matrix, offset: (3, 3) and (3,) in voxels along (d, h, w).
    """
    half = np.maximum(np.array(volume.shape[1:]) - 1, 1) / 2  # affine_grid counts from -1 to 1, and (w, h, d)
    theta = np.concatenate([matrix * half / half[:, None], (offset / half)[:, None]], axis=1)
    theta[:, :3] = theta[:, 2::-1]
    rows = torch.from_numpy(theta[::-1].copy()).to(volume)[None]
    grid = torch.nn.functional.affine_grid(rows, [1, *volume.shape], align_corners=True)
    return torch.nn.functional.grid_sample(volume[None], grid, mode="bilinear", padding_mode="zeros", align_corners=True)[0]

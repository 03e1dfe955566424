"""`inspect`: describe a scan file."""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from med3dvlm.cli.options import Commands, add_scan, reading, require_writable

if TYPE_CHECKING:
    from med3dvlm.volume import Volume


def add_commands(commands: Commands) -> None:
    inspect = commands.add_parser("inspect", help="a scan's geometry, unit, intensities, what was assumed, and warnings")
    add_scan(inspect)
    inspect.add_argument("--out", type=Path, metavar="PICTURE", help="draw a picture of it into this .png file")
    inspect.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    import numpy as np

    from med3dvlm.plots import montage
    from med3dvlm.volume import read_volume

    if arguments.out and arguments.out.suffix.lower() != ".png":
        raise ValueError(f"{arguments.out}: the picture is written as PNG; give it a name that ends in .png")
    volume = read_volume(arguments.scan, **reading(arguments))
    for label, value in _facts(volume, [float(value) for value in np.percentile(volume.array, (0, 1, 50, 99, 100))]):
        print(f"{label:<12} {value}")
    if arguments.out:
        require_writable(arguments.out.parent)
        montage(volume.array, volume.spacing, arguments.out, orientation=volume.orientation, direction=volume.direction)
        print(f"{'Picture':<12} {arguments.out}")


def _facts(volume: "Volume", percentiles: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Yield the lines of `inspect`: pairs of a label and a value."""
    yield "Scan", Path(os.path.abspath(volume.source)).name
    yield "Size", " x ".join(map(str, volume.shape)) + " voxels (slices x rows x columns)"
    if volume.spacing is None:
        yield "Spacing", "unknown"
    else:
        extent = " x ".join(f"{number * mm:.0f}" for number, mm in zip(volume.shape, volume.spacing, strict=True))
        yield "Spacing", " x ".join(f"{mm:.4g}" for mm in volume.spacing) + f" mm, covering {extent} mm"
    if volume.orientation is None:
        yield "Orientation", "unknown"
    else:
        turned = f", turned by {volume.oblique:.1f} degrees" if (volume.oblique or 0) >= 0.5 else ""
        yield "Orientation", f"{volume.orientation} (where slices, rows and columns go), {volume.plane} slices{turned}"
    yield "Unit", {"HU": "HU (Hounsfield units)", "unit": "within 0..1"}.get(volume.unit, volume.unit)
    low, first, median, last, high = percentiles
    yield "Values", f"{low:g} to {high:g}; 1 % are at most {first:g}, half at most {median:g}, 99 % at most {last:g}"
    for note in volume.notes:
        yield "Note", note
    for warning in volume.warnings:
        yield "Warning", warning

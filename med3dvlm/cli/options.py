"""Arguments that several commands share, and their checks."""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from med3dvlm.programs import Parser

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # returned by `add_subparsers`
MEANING = ("orientation", "transpose", "unit", "hu", "rescale")
AUTO = "auto"  # the shard of jobs that claim their work
SCANS = "a file, a zip, or a folder with a DICOM series or numbered PNG or JPEG slices"


def add_scan(parser: argparse.ArgumentParser) -> None:
    """Add a scan and the options of `read_volume`."""
    parser.add_argument("scan", metavar="SCAN", help=f"a scan: {SCANS}")
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options of `read_volume` about geometry."""
    parser.add_argument(
        "--spacing", type=numbers("Z,Y,X"), metavar="Z,Y,X", help="mm between slices, rows and columns (default: the file's)"
    )
    parser.add_argument("--straighten", action="store_true", help="resample tilted or unevenly spaced slices to a regular grid")
    add_meaning(parser)
    add_series(parser)


def add_series(parser: argparse._ActionsContainer) -> None:
    """Add the number of a series, an option of `read_volume`."""
    parser.add_argument(
        "--series", type=int, metavar="N", help="number of a DICOM series in the list that inspect shows (default: the likeliest)"
    )


def add_meaning(parser: argparse._ActionsContainer) -> None:
    """Add the options of `read_volume` about the axes and the values."""
    from med3dvlm.volume import HU_POLICIES, UNITS

    add = parser.add_argument
    add("--orientation", type=letters, metavar="SPL", help="where slices, rows and columns go in the patient (default: by the header)")
    add("--transpose", action="store_true", help="the axes of an array are x, y, z, as nibabel and MONAI save it (default: z, y, x)")
    add(
        "--unit",
        choices=UNITS,
        help="unit of the values: HU; unit, scaled to 0..1; arbitrary, any other scale (default: by header and values)",
    )
    add(
        "--hu", choices=HU_POLICIES,
        help="whose slope and intercept make the values HU: header, the file's; csv, those of --rescale; already_hu, none; "
        "auto, by header and values (default: auto)",
    )  # fmt: skip
    add("--rescale", type=numbers("S,I"), metavar="S,I", help="slope and intercept from a table beside the file, as in 1,-1024")


def reading(arguments: argparse.Namespace, names: Sequence[str] = ("spacing", "straighten", *MEANING, "series")) -> dict[str, Any]:
    """Return the keyword arguments of `read_volume` that were given, of some names."""
    given = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in given.items() if value is not None and value is not False}


def numbers(form: str) -> Callable[[str], tuple[float, ...]]:
    """Return an argparse type: as many numbers as `form` has letters, with commas between them."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            numbers = tuple(float(number) for number in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != len(form.split(",")):
            raise argparse.ArgumentTypeError(f"{text!r} must be numbers {form} with commas between them")
        return numbers

    return parse


def letters(text: str) -> str:
    """Parse an orientation, for argparse."""
    from med3dvlm.geometry.orientation import is_orientation

    if not is_orientation(text.upper()):
        raise argparse.ArgumentTypeError(f"{text!r} must be one letter each of L/R, A/P and I/S, as in SPL")
    return text.upper()


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="number of processes (default: %(default)s)")


def check_workers(arguments: argparse.Namespace) -> None:
    if arguments.workers < 1:
        raise ValueError(f"--workers is {arguments.workers} but at least one process is needed")


def parse_size(text: str) -> tuple[int, ...]:
    try:
        depth, height, width = (int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be three whole numbers D,H,W, as in 128,256,256") from None
    return depth, height, width


def parse_shard(text: str) -> tuple[int, int] | str:
    if text == AUTO:
        return text
    try:
        part, parts = (int(number) for number in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N, as in 1/8 to 8/8, or {AUTO}") from None
    return part, parts


def require_writable(folder: Path) -> None:
    """Make the folder and check that files can be written there, before anything that takes time."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and advice for developers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()

"""Read a folder of numbered PNG or JPEG pictures, one a slice, as in teaching files and M3D-Cap's raw data."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.base import MAX_VOXELS, Parts, VolumeError

ENDINGS = (".png", ".jpg", ".jpeg")
ROUNDING = 2  # grey levels by which a JPEG's red, green and blue may differ and still be grey


def pictures(folder: Path) -> list[Path]:
    """Return the pictures in a folder, in no order. Names that begin with a dot belong to the system."""
    return [path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.name[0] != "." and path.is_file()]


def read(folder: Path, source: str) -> Parts:
    """Read the pictures as slices, by the numbers in their names (2 before 10), as displayed on a screen.

    Values are the grey levels, 0 to 255 or 0 to 65535. Spacing and orientation are unknown. Pictures of another size than
    the commonest are left out, as in M3D's preparation, with a warning; so are gaps in the numbering warned of.

    Raises:
        VolumeError: a picture is damaged, in colour or has no number, or two have the same number.
    """
    paths, warnings = _in_order(pictures(folder), source)
    names = [f"{source}: picture {place} of {len(paths)}, in the order of their numbers," for place in range(1, len(paths) + 1)]
    sizes = [_size(path, name) for path, name in zip(paths, names, strict=True)]
    size, kept = Counter(sizes).most_common(1)[0]
    if kept < len(paths):
        warnings.append(f"{len(paths) - kept} of {len(paths)} pictures are not of the commonest size {size[1]}x{size[0]} and are left out.")
    if kept * size[0] * size[1] > MAX_VOXELS:
        raise VolumeError(f"{source}: {kept} pictures of {size[1]}x{size[0]} are more voxels than are read; make them smaller.")
    slices, coloured, types = [], 0, set()
    for path, name, found in zip(paths, names, sizes, strict=True):
        if found == size:
            grey, was_colour = _grey(path, name)
            slices.append(grey)
            coloured += was_colour
            types.add(grey.dtype)
    if len(types) > 1:
        raise VolumeError(f"{source}: some pictures have 8 bits and some 16, so their grey levels do not compare; export them alike.")
    if coloured:
        warnings.append(f"{coloured} of {kept} pictures are stored in colour but show grey alone; they are read as grey.")
    return Parts(np.stack(slices), warnings=tuple(warnings))


def _in_order(paths: list[Path], source: str) -> tuple[list[Path], list[str]]:
    """Sort the pictures by the numbers in their names. Returns them with warnings about the numbering."""
    if unnumbered := sum(not re.search(r"\d", path.stem) for path in paths):
        raise VolumeError(
            f"{source}: {unnumbered} of {len(paths)} pictures have no number in their name, so their order is unknown; number them."
        )
    numbers = {path: [int(digits) for digits in re.findall(r"\d+", path.stem)] for path in paths}
    texts = {path: re.split(r"\d+", path.stem.lower()) for path in paths}
    paths = sorted(paths, key=lambda path: (list(zip(texts[path], [*numbers[path], 0], strict=True)), path.name))
    if len({(tuple(texts[path]), tuple(numbers[path])) for path in paths}) < len(paths):
        raise VolumeError(f"{source}: two pictures have the same number; leave one of each in the folder.")
    varying = [len(set(column)) > 1 for column in zip(*numbers.values(), strict=False)]
    if len({tuple(text) for text in texts.values()}) > 1 or sum(varying) > 1:
        return paths, ["the pictures' names differ in more than one number; they may be several series or out of order."]
    if len(paths) < 3:
        return paths, []
    places = np.array([numbers[path][varying.index(True)] for path in paths])
    steps = np.diff(places)
    usual = Counter(steps.tolist()).most_common(1)[0][0]
    if odd := int((steps != usual).sum()):
        gaps = f"{odd} gap{'s' if odd > 1 else ''} in the numbering of the {len(paths)} pictures"
        return paths, [f"there {'are' if odd > 1 else 'is'} {gaps}; slices may be missing."]
    return paths, []


def _size(path: Path, name: str) -> tuple[int, int]:
    """Return (columns, rows) by the header alone."""
    with _open(path, name) as image:
        size: tuple[int, int] = image.size
    return size


def _grey(path: Path, name: str) -> tuple[NDArray[Any], bool]:
    """Return the grey levels (H, W), uint8 or uint16, and whether the file stores them as colour."""
    with _open(path, name) as image:
        try:
            image.load()
        except Exception as error:  # Pillow's decoders raise almost anything on damaged data
            raise _damaged(name) from error
        if image.mode in ("L", "LA", "1"):
            return np.asarray(image.convert("L")), False
        if image.mode.startswith("I"):
            return np.asarray(image).astype(np.uint16), False
        channels = np.asarray(image.convert("RGB")).astype(np.int16)
    if np.ptp(channels, axis=2).max() > ROUNDING:
        raise VolumeError(f"{name} is in colour; export the slices in grey.")
    return channels[..., 1].astype(np.uint8), True


def _open(path: Path, name: str) -> Any:
    from PIL import Image

    try:
        return Image.open(path, formats=("PNG", "JPEG"))
    except Image.DecompressionBombError as error:
        raise VolumeError(f"{name} has more pixels than are read; make it smaller.") from error
    except Exception as error:  # as above
        raise _damaged(name) from error


def _damaged(name: str) -> VolumeError:
    """Return an error without the picture's own name, which may be a patient's."""
    return VolumeError(f"{name} cannot be read; it is damaged, cut short or neither PNG nor JPEG, so copy or export it again.")

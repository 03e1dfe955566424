"""The voxels behind a text header: their file, compression and type."""

import bz2
import io
import math
import re
import warnings as python_warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.base import VolumeError, check_size, damaged

GZIP = b"\x1f\x8b"
MAX_NAMES = 20_000  # files of one scan
MAX_BEHIND = 2**24  # bytes behind the voxels that are unpacked, to verify a checksum
PATTERN = re.compile(r"(.*)%(0?\d{0,2})d(.*?)\s+(-?\d+)\s+(-?\d+)\s+(-?\d+)(?:\s+\d+)?")
MILLIMETRES = {"mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "millimetre": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "µm": 0.001}
PACKINGS = ("raw", "zlib", "bzip2", "text", "hex")


def inflated(packed: bytes, most: int) -> tuple[bytes, int, int]:
    """Decompress one zlib stream or the members of a gzip file.

    Returns:
        The first `most` bytes; how many more there are, which are verified and not kept; how many of `packed` belong to no member.

    Raises:
        zlib.error, EOFError: it is damaged or cut short.
        OverflowError: far more follows the first `most` bytes.
    """
    pieces, size, more, rest = list[bytes](), 0, 0, packed
    while True:
        stream = zlib.decompressobj(47)  # either kind
        while not stream.eof:
            piece = stream.decompress(rest, most - size or 2**24)
            rest = stream.unconsumed_tail
            if not (piece or rest or stream.eof):
                raise EOFError("cut short")
            if size < most:
                pieces.append(piece)
                size += len(piece)
            else:
                more += len(piece)
            if more > most + MAX_BEHIND:
                raise OverflowError("too much to unpack")
        rest = stream.unused_data
        if not rest.startswith(GZIP):
            return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), more, len(rest.rstrip(b"\0"))


def behind(more: int, beside: int) -> tuple[str, ...]:
    """Return warnings about bytes that belong to no voxel: in the decompressed data, and in the file behind it."""
    number = more + beside
    return (f"{number} bytes follow the voxels in the file and are ignored.",) if number else ()


class Header(NamedTuple):
    """The fields of a header by their names in lower case, the lines of a list of files, and where the voxels begin."""

    fields: dict[str, str]
    listed: list[str]
    end: int


def files_beside(header: Path, value: str, listed: Sequence[str], source: str) -> list[Path]:
    """Return the files in the header's folder that it names: one, a "LIST" in the lines that follow, or a pattern as "%03d.raw 1 40 1".

    Raises:
        VolumeError: a name leads out of the folder, or there are too many.
    """
    names = [value.strip()]
    if re.fullmatch(r"(?i)list(\s+\d+d?)?", value.strip()):
        names = [line.strip() for line in listed if line.strip()]
    elif found := PATTERN.fullmatch(value.strip()):
        start, form, end = found.group(1, 2, 3)
        first, last, step = map(int, found.group(4, 5, 6))
        numbers = range(first, last + (1 if step > 0 else -1), step) if step else range(0)
        names = [f"{start}{number:{form}d}{end}" for number in numbers[: MAX_NAMES + 1]]
    if len(names) > MAX_NAMES:
        raise VolumeError(f"{source}: the header names more than {MAX_NAMES} files; save the scan as one file.")
    names = [name.removeprefix("./") for name in names]
    if not names or any(not name or name in (".", "..") or re.search(r"[/\\:\0]", name) for name in names):
        raise VolumeError(
            f"{source}: the header names another place for the voxels, which is not opened; save header and voxels as one file."
        )
    return [header.parent / name for name in names]


def start_of(file: Path) -> bytes:
    """Read as much of a file as a header that names other files can take."""
    with file.open("rb") as content:
        return content.read(2**20)


def read_beside(files: Sequence[Path], source: str) -> list[bytes]:
    """Read the files named by a header.

    Raises:
        VolumeError: one is not there.
    """
    if missing := sum(not file.is_file() for file in files):
        raise VolumeError(f"{source}: {missing} of the {len(files)} files that the header names are not beside it; copy them there, too.")
    return [file.read_bytes() for file in files]


def voxels(
    contents: Sequence[bytes], packing: str, dtype: np.dtype[Any], sizes: Sequence[int], source: str, kind: str, skip: int = 0
) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return the array, its slowest axis first, and warnings.

    Args:
        contents: of one file, or of several that hold equal parts of the voxels, in order.
        packing: one of PACKINGS.
        sizes: the array's lengths, the fastest axis first.
        skip: bytes before the voxels of each file, once unpacked; -1 takes its last ones.

    Raises:
        VolumeError: the size is impossible, or the data are damaged or cut short.
    """
    check_size(sizes, dtype.itemsize, sum(map(len, contents)), source, kind)
    count = math.prod(sizes) // len(contents)
    if count * len(contents) != math.prod(sizes):
        raise VolumeError(f"{source}: the voxels cannot be divided equally among the {len(contents)} files that the header names.")
    parts, warnings = [], list[str]()
    try:
        for content in contents:
            part, more = _part(content, packing, dtype, count, skip)
            parts.append(part)
            warnings += behind(more, 0)
    except (zlib.error, EOFError, OSError, OverflowError, ValueError, DeprecationWarning) as error:
        raise damaged(source, kind) from error
    array = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return array.reshape(tuple(sizes)[::-1]), tuple(dict.fromkeys(warnings))


def _part(content: bytes, packing: str, dtype: np.dtype[Any], count: int, skip: int) -> tuple[NDArray[Any], int]:
    """Return `count` values, and how many bytes follow them. Raises ValueError or what decompressing raises."""
    needed, more = count * dtype.itemsize, 0
    if packing == "text":
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("error")  # NumPy warns of text that is no number
            values = np.fromstring(content[max(skip, 0) :].replace(b",", b" "), sep=" ", count=count)
        if len(values) < count:
            raise ValueError("too few numbers")
        return values.astype(dtype), 0
    if packing == "hex":
        content = bytes.fromhex(content.decode("ascii"))
    elif packing == "zlib":
        content, more, _ = inflated(content, max(skip, 0) + needed)
    elif packing == "bzip2":
        content = bz2.open(io.BytesIO(content)).read(max(skip, 0) + needed)
    start = len(content) - needed if skip < 0 else skip
    if start < 0 or start + needed > len(content):
        raise ValueError("too few bytes")
    return np.frombuffer(content, dtype, count, start), more + len(content) - start - needed


def millimetres(unit: str, source: str) -> float:
    """Return the millimetres of a header's unit, 1 for a blank or unknown ("???") one.

    Raises:
        VolumeError: it is another.
    """
    if not unit.strip(' "?'):
        return 1.0
    if unit not in MILLIMETRES:
        raise VolumeError(f"{source}: lengths are in other units than mm, cm, m or um; save the scan in mm.")
    return MILLIMETRES[unit]


def without_ones(array: NDArray[Any]) -> NDArray[Any]:
    """Return a 4D array of one time point as 3D."""
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    return array

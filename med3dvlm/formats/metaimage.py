"""MetaImage: a header of text, with the voxels behind it (.mha) or in files beside it (.mhd), as ITK writes it."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.formats.base import Parts, VolumeError, colour, damaged
from med3dvlm.formats.packed import Header, files_beside, millimetres, read_beside, start_of, voxels, without_ones
from med3dvlm.geometry import is_geometry

TYPES = {
    "MET_CHAR": "int8", "MET_UCHAR": "uint8", "MET_SHORT": "int16", "MET_USHORT": "uint16", "MET_INT": "int32", "MET_UINT": "uint32",
    "MET_LONG": "int32", "MET_ULONG": "uint32", "MET_LONG_LONG": "int64", "MET_ULONG_LONG": "uint64", "MET_FLOAT": "float32",
    "MET_DOUBLE": "float64",
}  # fmt: skip
DIRECTIONS = ("transformmatrix", "rotation", "orientation")  # spellings of one field
OFFSETS = ("offset", "position", "origin")  # of another
USED = {
    "ndims", "dimsize", "elementtype", "elementnumberofchannels", "elementbyteordermsb", "binarydatabyteordermsb", "binarydata",
    "compresseddata", "headersize", "distanceunits", "elementspacing", "elementsize", "elementdatafile", *DIRECTIONS, *OFFSETS,
}  # fmt: skip
LINE = re.compile(rb"[ \t]*([^=:\r\n]*?)[ \t]*(?:[=:][ \t]*([^\r\n]*?)[ \t]*)?(?:\r?\n|\r|\Z)")
MAX_HEADER_BYTES = 2**22


def files_of(path: Path) -> list[Path]:
    """Return the files beside a header that hold its voxels; none where they are behind it, or where reading says what is wrong."""
    try:
        fields, listed, _ = _header(start_of(path), "")
        return [] if _is_local(fields) else files_beside(path, fields["elementdatafile"], listed, "")
    except (OSError, VolumeError):
        return []


def read(path: Path, source: str) -> Parts:
    """Read a .mha or .mhd file.

    Raises:
        VolumeError: the file is damaged, in colour, of a type that is not read, or names voxels in another folder.
    """
    content = path.read_bytes()
    fields, listed, end = _header(content, source)
    local = _is_local(fields)
    contents = [content[end:]] if local else read_beside(files_beside(path, fields["elementdatafile"], listed, source), source)
    dimension = len(sizes := _sizes(fields, source))
    if fields.get("elementnumberofchannels", "1") != "1" or fields.get("elementtype", "").endswith("_ARRAY"):
        raise colour(source)
    if fields.get("elementtype") not in TYPES:
        raise VolumeError(f"{source}: the voxels are of a type that is not read; save them as whole or real numbers of up to 64 bits.")
    order = fields.get("binarydatabyteordermsb", fields.get("elementbyteordermsb", ""))
    dtype = np.dtype(TYPES[fields["elementtype"]]).newbyteorder(">" if _true(order) else "<")
    skip = fields.get("headersize", "0")
    if not re.fullmatch(r"-1|\d{1,12}", skip):
        raise damaged(source, "MetaImage")
    packing = "zlib" if _true(fields.get("compresseddata", "")) else "raw" if _true(fields.get("binarydata", "True")) else "text"
    before = int(skip) if packing == "raw" and not (local and int(skip) > 0) else 0
    array, warnings = voxels(contents, packing, dtype, sizes, source, "MetaImage", before)
    if (array := without_ones(array)).ndim != 3:
        return Parts(array, warnings=warnings)  # Volume says what is wrong

    scale = millimetres(fields.get("distanceunits", "").lower(), source)
    lengths = _numbers(fields, ("elementspacing", "elementsize"), dimension, source)
    stated = _numbers(fields, DIRECTIONS, dimension**2, source)
    spacing = None if lengths is None else tuple(scale * length for length in lengths[2::-1])
    if stated is None:
        return Parts(array, None, spacing, warnings=warnings)
    columns = np.diag([-1.0, -1.0, 1.0]) @ np.reshape(stated, (dimension, dimension))[:3, :3].T  # the file has a row for each axis, in LPS
    if spacing is None or not (all(0 < mm < math.inf for mm in spacing) and is_geometry(columns)):
        return Parts(array, None, spacing, direction=columns, warnings=warnings)
    offset = _numbers(fields, OFFSETS, dimension, source)
    origin = None if offset is None else np.array([-scale, -scale, scale]) * offset[:3]
    return Parts(array, columns * spacing[::-1], warnings=warnings, origin=origin)


def _header(content: bytes, source: str) -> Header:
    """Parse a header; raises VolumeError where it is no MetaImage header."""
    fields: dict[str, str] = {}
    place = 0
    while place < min(len(content), MAX_HEADER_BYTES):
        found = LINE.match(content, place)
        if found is None:
            break
        name, value, place = found[1].decode("ascii", "replace").lower(), (found[2] or b"").decode("utf-8", "surrogateescape"), found.end()
        if name in USED and fields.setdefault(name, value) != value:
            break  # of two values nobody knows which counts
        if name == "elementdatafile":
            listed = content[place:].decode("utf-8", "surrogateescape").splitlines() if value.upper().startswith("LIST") else []
            return Header(fields, listed, place)
    raise damaged(source, "MetaImage")


def _is_local(fields: dict[str, str]) -> bool:
    return fields["elementdatafile"].upper() == "LOCAL"


def _true(value: str) -> bool:
    return value[:1].upper() in ("T", "1", "Y")


def _sizes(fields: dict[str, str], source: str) -> list[int]:
    words, dimension = fields.get("dimsize", "").split(), fields.get("ndims", "")
    if (
        dimension not in ("2", "3", "4")
        or len(words) != int(dimension)
        or not all(re.fullmatch(r"0*[1-9]\d{0,17}", word) for word in words)
    ):
        raise damaged(source, "MetaImage")
    return [int(word) for word in words]


def _numbers(fields: dict[str, str], names: tuple[str, ...], count: int, source: str) -> list[float] | None:
    """Return the numbers of the first of these fields that the header has."""
    stated: Any = next((fields[name] for name in names if name in fields), None)
    if stated is None:
        return None
    try:
        numbers = [float(word) for word in stated.split()]
    except ValueError as error:
        raise damaged(source, "MetaImage") from error
    if len(numbers) < count:
        raise damaged(source, "MetaImage")
    return numbers[:count]

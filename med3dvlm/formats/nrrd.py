"""NRRD: a header of text, with the voxels behind it or in files beside it. https://teem.sourceforge.net/nrrd/format.html"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.base import Parts, VolumeError, colour, damaged
from med3dvlm.formats.packed import Header, files_beside, millimetres, read_beside, start_of, voxels, without_ones

TYPES = {
    "int8": ("signedchar", "int8", "int8t"),
    "uint8": ("uchar", "unsignedchar", "uint8", "uint8t"),
    "int16": ("short", "shortint", "signedshort", "signedshortint", "int16", "int16t"),
    "uint16": ("ushort", "unsignedshort", "unsignedshortint", "uint16", "uint16t"),
    "int32": ("int", "signedint", "int32", "int32t"),
    "uint32": ("uint", "unsignedint", "uint32", "uint32t"),
    "int64": ("longlong", "longlongint", "signedlonglong", "signedlonglongint", "int64", "int64t"),
    "uint64": ("ulonglong", "unsignedlonglong", "unsignedlonglongint", "uint64", "uint64t"),
    "float32": ("float",),
    "float64": ("double",),
}
ENCODINGS = {"raw": "raw", "gzip": "zlib", "gz": "zlib", "bzip2": "bzip2", "bz2": "bzip2", "hex": "hex"} | dict.fromkeys(
    ("ascii", "text", "txt"), "text"
)
# The spaces that lead through a patient, from RAS; in others, such as a scanner's, nobody knows where left is.
SPACES = {"rightanteriorsuperior": (1, 1, 1), "leftanteriorsuperior": (-1, 1, 1), "leftposteriorsuperior": (-1, -1, 1)}
SPACES |= {"ras": (1, 1, 1), "las": (-1, 1, 1), "lps": (-1, -1, 1)}


def files_of(path: Path) -> list[Path]:
    """Return the files beside a header that hold its voxels; none where they are behind it, or where reading says what is wrong."""
    try:
        header = _header(start_of(path), "")
        return files_beside(path, header.fields["datafile"], header.listed, "") if "datafile" in header.fields else []
    except (OSError, VolumeError):
        return []


def read(path: Path, source: str) -> Parts:
    """Read a .nrrd or .nhdr file. The scan's axes are those that lead through space.

    Raises:
        VolumeError: the file is damaged, in colour, packed in a way or of a type that is not read, or names voxels in another folder.
    """
    content = path.read_bytes()
    fields, listed, end = _header(content, source)
    dtype, encoding = _type(fields, source), ENCODINGS.get(fields["encoding"].lower())
    if encoding is None:
        raise VolumeError(f"{source}: the voxels are packed in a way that is not read; save them raw, as gzip, bzip2, text or hex.")
    sizes, lines, skip = _sizes(fields, source), _whole(fields, "lineskip", source), _whole(fields, "byteskip", source)
    if "datafile" in fields:
        contents = read_beside(files_beside(path, fields["datafile"], listed, source), source)
    else:
        contents = [content[end:]]
    if lines:
        contents = [each.split(b"\n", lines)[-1] for each in contents]
    array, warnings = voxels(contents, encoding, dtype, sizes, source, "NRRD", skip)

    vectors = _vectors(fields, len(sizes), source)
    kinds = fields.get("kinds", "").lower().split()
    if (
        sizes[0] > 1
        and len(sizes) == 4
        and (vectors[0] is None if any(vectors) else re.search("color|vector|list|tensor|matrix", "".join(kinds[:1])))
    ):
        raise colour(source)
    if len(sizes) > 3 and sum(vector is not None for vector in vectors) == 3:
        aside = [axis for axis, vector in enumerate(vectors) if vector is None and sizes[axis] == 1]
        array = array.squeeze(tuple(len(sizes) - 1 - axis for axis in aside))
    if (array := without_ones(array)).ndim != 3:
        return Parts(array, warnings=warnings)  # Volume says what is wrong
    return Parts(array, warnings=warnings)._replace(**_geometry(fields, vectors, len(sizes), source, warnings))


def _header(content: bytes, source: str) -> Header:
    """Parse a header; raises VolumeError where it is no NRRD header."""
    ending = re.search(rb"\r?\n\r?\n", content)
    end = len(content) if ending is None else ending.end()
    text = content[:end].decode("utf-8", "replace")
    magic, *lines = re.split(r"\r\n|\n|\r", text)
    if not re.fullmatch(r"NRRD000\d", magic.strip()):
        raise damaged(source, "NRRD")
    fields: dict[str, str] = {}
    for place, line in enumerate(lines):
        if not line.strip() or line.startswith("#") or re.match(r"[^:]*:=", line):  # := is a key of the file's own
            continue
        name, colon, value = line.partition(":")
        name = re.sub(r"\s", "", name).lower()
        if not colon or name in fields:
            raise damaged(source, "NRRD")
        fields[name] = value.strip()
        if name == "datafile" and re.match(r"(?i)list\b", value.strip()):
            return Header(fields, lines[place + 1 :], end)
    if not {"type", "dimension", "sizes", "encoding"} <= fields.keys() or (ending is None and "datafile" not in fields):
        raise damaged(source, "NRRD")
    return Header(fields, [], end)


def _type(fields: dict[str, str], source: str) -> np.dtype[Any]:
    stated = re.sub(r"[\s_]", "", fields["type"].lower())
    name = next((name for name, spellings in TYPES.items() if stated in spellings), None)
    if name is None:
        raise VolumeError(f"{source}: the voxels are of a type that is not read; save them as whole or real numbers of up to 64 bits.")
    dtype, order = np.dtype(name), fields.get("endian", "").lower()
    if dtype.itemsize == 1 or ENCODINGS.get(fields["encoding"].lower()) == "text":
        return dtype
    if order not in ("little", "big"):
        raise VolumeError(f"{source}: the header does not say whether bytes are in little or big order (endian); save the scan again.")
    return dtype.newbyteorder("<" if order == "little" else ">")


def _sizes(fields: dict[str, str], source: str) -> list[int]:
    words = fields["sizes"].split()
    if not all(re.fullmatch(r"\d{1,18}", word) and int(word) for word in words) or fields["dimension"] != str(len(words)) or not words:
        raise damaged(source, "NRRD")
    return [int(word) for word in words]


def _whole(fields: dict[str, str], name: str, source: str) -> int:
    """Return a number of lines or bytes, 0 where none is stated."""
    stated = fields.get(name, "0")
    if not re.fullmatch(r"\d{1,12}", stated) and (name, stated) != ("byteskip", "-1"):
        raise damaged(source, "NRRD")
    return int(stated)


def _numbers(text: str, count: int, source: str) -> list[float]:
    words = text.replace(",", " ").split()
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise damaged(source, "NRRD") from error
    if len(numbers) != count:
        raise damaged(source, "NRRD")
    return numbers


def _vectors(fields: dict[str, str], dimension: int, source: str) -> list[list[float] | None]:
    """Return the direction of each axis in space, in the header's unit; None for an axis without one, or where no directions are stated."""
    stated = fields.get("spacedirections")
    if stated is None:
        return [None] * dimension
    found = re.findall(r"(?i)none|\(([^()]*)\)", stated)
    if len(found) != dimension:
        raise damaged(source, "NRRD")
    numbers = [_numbers(inner, inner.count(",") + 1, source) if inner else [] for inner in found]
    return [vector if any(vector[:3]) else None for vector in numbers]  # time leads nowhere in space


def _geometry(
    fields: dict[str, str], vectors: list[list[float] | None], dimension: int, source: str, warnings: tuple[str, ...]
) -> dict[str, Any]:
    """Return those of the fields axes, origin, spacing and warnings of `Parts` that are known."""
    leading = [vector for vector in vectors if vector is not None]
    if len(leading) == 3 and all(len(vector) >= 3 for vector in leading):
        units = re.findall('"(.*?)"', fields.get("spaceunits", "")) or [""] * 3
        lengths = np.array([millimetres(unit, source) for unit in units[:3]])
        columns: NDArray[np.float64] = (np.array([vector[:3] for vector in leading]) * lengths).T
        space = re.sub(r"[-\s]", "", fields.get("space", "").lower())
        signs = SPACES.get(re.sub(r"time$|(?<=^...)t$", "", space))
        if signs is not None:
            words = re.findall(r"[^\s(),]+", fields.get("spaceorigin", ""))
            origin = np.array(signs) * lengths * _numbers(" ".join(words), len(words), source)[:3] if len(words) >= 3 else None
            return {"axes": np.array(signs)[:, None] * columns, "origin": origin}
        spacing = tuple(float(length) for length in np.linalg.norm(columns, axis=0)[::-1])
        return {"spacing": spacing, "warnings": (*warnings, "the header does not name the space that its directions lead in.")}
    if "spacings" not in fields:
        return {}
    units = re.findall('"(.*?)"', fields.get("units", "")) or [""] * dimension
    spacings = _numbers(fields["spacings"], dimension, source)
    return {"spacing": tuple(mm * millimetres(unit, source) for mm, unit in zip(spacings[:3], units[:3], strict=False))[::-1]}

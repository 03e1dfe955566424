"""Locate the pixels of DICOM files, read the bytes of each frame, and decode them.

What the header says of its packing is compared with the bytes themselves, which decide where they leave no doubt: pixels that are not
packed under the name of a compression, packed ones under the name of none or of another, a picture without the items that should enclose it.
"""

import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.codestreams import JPEG, JPEG_2000, JPEG_LS, RLE, decoded, described, run_lengths, segments_of
from med3dvlm.formats.dicom_elements import UNDEFINED, Header, PixelElement, Unusable

DEFLATED = "1.2.840.10008.1.2.1.99"
PLAIN = "no code"
CODES = {  # by transfer syntax
    **dict.fromkeys(["", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", DEFLATED, "1.2.840.10008.1.2.1.98"], PLAIN),
    "1.2.840.10008.1.2.5": RLE,
    **{f"1.2.840.10008.1.2.4.{number}": JPEG for number in range(50, 71)},
    **{f"1.2.840.10008.1.2.4.{number}": JPEG_LS for number in (80, 81)},
    **{f"1.2.840.10008.1.2.4.{number}": JPEG_2000 for number in (90, 91, 92, 93, 201, 202, 203)},
}
REAL = {0x7FE00008: "f4", 0x7FE00009: "f8"}  # elements whose pixels are real numbers
PIXELS = {*REAL, 0x7FE00010}
ITEM = b"\xfe\xff\x00\xe0"  # encloses each part of packed pixels
MAX_INFLATED = 2**30  # bytes of a file that is packed as a whole
PLAINLY = "export them uncompressed or as JPEG 2000"


class Packing(NamedTuple):
    """How a file stores its pixels."""

    element: PixelElement
    kind: str  # NumPy's type of a stored number
    size: tuple[int, int]  # rows, columns
    frames: int
    bits: int  # used bits of each number
    shift: int  # bits below them
    signed: bool

    @property
    def frame_bytes(self) -> int:
        """Return the bytes of an uncompressed frame."""
        return math.prod(self.size) * np.dtype(self.kind).itemsize


def packing_of(header: Header, frames: int) -> Packing:
    """Read from a header how its pixels are stored; assumptions go into its notes.

    Raises:
        Unusable: it says what cannot be, or nothing of what is needed.
        EOFError: the file is too short for its pixels.
    """
    element = header.pixels
    assert element is not None
    size, real = (int(header.Rows), int(header.Columns)), REAL.get(element.tag)
    if real:
        return Packing(element, ("<" if element.little_endian else ">") + real, size, frames, 0, 0, True)
    allocated = int(header.BitsAllocated)
    if allocated not in (8, 16, 32, 64):
        raise Unusable(f"have {allocated} bits for a pixel (BitsAllocated), where 8, 16, 32 or 64 are read", "export them with 16")
    for keyword, assumed in (
        ("PhotometricInterpretation", "the values are taken as grey (MONOCHROME2)"),
        ("PixelRepresentation", "the values are taken as unsigned"),
        ("BitsStored", f"all {allocated} bits of a pixel are taken"),
    ):
        if header.get(keyword) is None:
            header.notes.add(f"the header states no {keyword}; {assumed}.")
    bits = int(header.get("BitsStored") or allocated)
    if bits > allocated:
        raise Unusable(f"state {bits} used bits of {allocated} in a pixel (BitsStored, BitsAllocated)")
    high = int(header.get("HighBit") or bits - 1)
    shift = high + 1 - bits if bits <= high + 1 <= allocated else 0
    kind = f"{'<' if element.little_endian else '>'}u{allocated // 8}"
    packing = Packing(element, kind, size, frames, bits, shift, bool(header.get("PixelRepresentation")))
    plain = element.length != UNDEFINED and CODES.get(element.syntax) == PLAIN
    if plain and not element.packed_from and frames * packing.frame_bytes > element.path.stat().st_size:
        raise EOFError("more pixels than the file can hold")
    return packing


def inflated(stream: BinaryIO) -> BinaryIO:
    """Decompress the rest of a file that is compressed as a whole.

    Raises:
        Exception: it is damaged, or unpacks to more than 1 GiB.
    """
    inflater, packed, parts, size = zlib.decompressobj(-zlib.MAX_WBITS), stream.read(), list[bytes](), 0
    while packed and not inflater.eof:
        parts.append(inflater.decompress(packed, 2**20))
        packed, size = inflater.unconsumed_tail, size + len(parts[-1])
        if size > MAX_INFLATED:
            raise Unusable(f"unpack to more than {MAX_INFLATED} bytes", "export them in another transfer syntax")
    return io.BytesIO(b"".join(parts))


def frames_of(packing: Packing, wanted: Sequence[int]) -> Iterator[tuple[bytes, bool]]:
    """Yield the bytes of the wanted frames, in order, and whether each is compressed by itself.

    Raises:
        Unusable: the pixels are others than the header says.
        Exception: the file is damaged or cut short.
    """
    element = packing.element
    with element.path.open("rb", buffering=0) as file:
        stream: BinaryIO = file
        if element.packed_from is not None:
            file.seek(element.packed_from)
            stream = inflated(file)
        stream.seek(element.place)
        start = stream.read(8)
        length, needed = element.length, packing.frames * packing.frame_bytes
        if length == UNDEFINED or (start[:4] == ITEM and length != needed):
            yield from ((content, True) for content in _enclosed(stream, packing, wanted))
        elif length >= needed and (length <= needed + 1 or CODES.get(element.syntax) == PLAIN):
            for frame in wanted:
                stream.seek(element.place + frame * packing.frame_bytes)
                yield _exactly(stream, packing.frame_bytes), False
        elif packing.frames == 1 and described(start + stream.read(1016)):
            stream.seek(element.place)
            yield _exactly(stream, length), True
        elif CODES.get(element.syntax) == PLAIN:
            stream.seek(element.place)
            _exactly(stream, length)
            raise Unusable(f"hold {length} bytes of pixels, where Rows, Columns, BitsAllocated and NumberOfFrames make it {needed}")
        else:
            raise Unusable(f"are not packed as {named(element.syntax)}, which their header states", PLAINLY)


def _enclosed(stream: BinaryIO, packing: Packing, wanted: Sequence[int]) -> Iterator[bytes]:
    """Yield the bytes of frames from the items that enclose them; the first item tells where the frames begin or is empty."""
    from pydicom.encaps import generate_frames, parse_fragments

    stream.seek(packing.element.place)
    count, places = parse_fragments(stream)

    def item(number: int) -> bytes:
        stream.seek(places[number] + 4)
        return _exactly(stream, int.from_bytes(_exactly(stream, 4), "little"))

    first = 0 if count and described(item(0)) else 1
    if packing.frames == 1:
        yield b"".join(item(number) for number in range(first, count))
    elif count - first == packing.frames:
        yield from (item(first + frame) for frame in wanted)
    else:
        stream.seek(packing.element.place)
        frames, last = set(wanted), max(wanted)
        for number, content in enumerate(generate_frames(stream, number_of_frames=packing.frames)):
            if number in frames:
                yield content
            if number == last:
                return


def _exactly(stream: BinaryIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError("the file ends within its pixels")
    return content


def picture_of(content: bytes, packed: bool, packing: Packing) -> tuple[NDArray[Any], str]:
    """Decode a frame (rows, columns), whole numbers as unsigned ones; with a note where it is not compressed as the header says.

    Raises:
        Unusable: the picture is whole but of another size or kind than the header says, or packed in a way that is not read.
        Exception: it is damaged.
    """
    kind, syntax = np.dtype(packing.kind), packing.element.syntax
    stream = described(content) if packed else None
    code = CODES.get(syntax)
    if stream is not None:
        if stream.unread:
            raise Unusable(f"are packed as {stream.unread} JPEG, which is not read", PLAINLY)
        fits = (stream.rows, stream.columns) == packing.size and stream.samples == 1 and stream.bits <= 8 * kind.itemsize
        found, picture = stream.code, decoded(content, stream) if fits else np.empty(0)
    elif packed and (segments := segments_of(content)) and len(content) != packing.frame_bytes:
        found, picture = RLE, run_lengths(content, packing.size, kind) if segments == kind.itemsize else np.empty(0)
    elif not packed or packing.frame_bytes <= len(content) <= packing.frame_bytes + 1:
        found, picture = PLAIN, np.frombuffer(content, kind, math.prod(packing.size)).reshape(packing.size)
    elif code in (None, PLAIN):
        raise Unusable(f"are packed as {named(syntax)}, which is not read", PLAINLY)
    else:
        raise ValueError("no picture in any code that is read")
    if picture.shape != packing.size or (kind.kind == "f" and found != PLAIN):
        raise Unusable("hold a packed picture of another size or kind than the header says")
    if code is None and found == PLAIN:
        raise Unusable(f"are in a transfer syntax that is not known ({named(syntax)})", PLAINLY)
    note = f"the header states {named(syntax)} but the pixels are in {found}, and are read so." if found != code else ""
    return picture.astype(kind.newbyteorder("="), copy=False), note


def named(syntax: str) -> str:
    """Return the name of a transfer syntax, or its UID where it has none."""
    from pydicom.uid import UID

    if not syntax:
        return "no transfer syntax"
    return str(UID(syntax).name) if re.fullmatch(r"[\d.]{1,64}", syntax) else "a transfer syntax that is no number"


def values_of(picture: NDArray[Any], packing: Packing, shift: int) -> tuple[NDArray[Any], bool]:
    """Return the stored values of a picture's bits, and whether unused bits hold something.

    Such bits were used for overlays once; those of a negative number may repeat its sign.
    """
    if picture.dtype.kind == "f":
        return picture, False
    picture, width = picture >> shift if shift else picture, 8 * picture.itemsize
    signed, bits = picture.view(f"i{picture.itemsize}"), packing.bits
    if not packing.signed:
        if bits == width or int(picture.max()) < 2**bits:
            return picture, False
        return picture & picture.dtype.type(2**bits - 1), True
    if bits == width or (int(signed.min()) >= -(2 ** (bits - 1)) and int(signed.max()) < 2 ** (bits - 1)):
        return signed, False
    values = (picture << (width - bits)).view(signed.dtype) >> (width - bits)
    return values, bool(((values != signed) & (picture >= 2**bits)).any())

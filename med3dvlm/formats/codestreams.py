"""Compressed pictures: recognise their codec and decode them by imagecodecs.

imagecodecs brings libjpeg-turbo (8, 12 and 16 bits, lossless too), CharLS, OpenJPEG and DICOM's run lengths, and lets other threads run
meanwhile. What pydicom's plugins bring leaves gaps (12-bit JPEG), is under the GPL (libjpeg), slow (run lengths) or ends the whole
process on damaged bytes (GDCM).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

JPEG, JPEG_LS, JPEG_2000, RLE = "JPEG", "JPEG-LS", "JPEG 2000", "RLE"
DECODERS = {JPEG: "jpeg8_decode", JPEG_LS: "jpegls_decode", JPEG_2000: "jpeg2k_decode"}
FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of JPEG that give size and kind: SOF0 to SOF15
UNREAD = {0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical", 0xCB: "arithmetic lossless"} | {
    marker: "hierarchical arithmetic" for marker in (0xCD, 0xCE, 0xCF)
}  # kinds of JPEG that no library here knows


class Codestream(NamedTuple):
    """The header of a compressed picture."""

    code: str  # one of the names above
    rows: int
    columns: int
    bits: int
    samples: int  # of each pixel
    unread: str = ""  # its kind, where no library here reads it


def described(packed: bytes) -> Codestream | None:
    """Read the header of a compressed picture; None for codecs without one, such as run lengths."""
    start = packed.find(b"\xff\x4f\xff\x51", 0, 1024)  # behind the boxes of a JP2 file, where there are any
    if start == 0 or (start > 0 and packed[4:8] == b"jP  "):
        x1, y1, x0, y0 = (int.from_bytes(packed[place : place + 4], "big") for place in range(start + 8, start + 24, 4))
        samples, bits = int.from_bytes(packed[start + 40 : start + 42], "big"), packed[start + 42 : start + 43]
        return Codestream(JPEG_2000, y1 - y0, x1 - x0, (bits[0] & 0x7F) + 1, samples) if bits else None
    if packed[:3] != b"\xff\xd8\xff":
        return None
    place = 2
    while place + 10 <= len(packed) and packed[place] == 0xFF:
        marker, length = packed[place + 1], int.from_bytes(packed[place + 2 : place + 4], "big")
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker in FRAME_HEADERS or marker == 0xF7:
            rows, columns = (int.from_bytes(packed[at : at + 2], "big") for at in (place + 5, place + 7))
            code = JPEG_LS if marker == 0xF7 else JPEG
            return Codestream(code, rows, columns, packed[place + 4], packed[place + 9], UNREAD.get(marker, ""))
        else:
            place += 2 + length
    return None


def decoded(packed: bytes, stream: Codestream) -> NDArray[Any]:
    """Decode a grey picture (rows, columns) to unsigned numbers.

    Raises:
        Exception: it is damaged or cut short.
    """
    import imagecodecs

    if stream.code == JPEG and b"\xff\xd9" not in packed.rstrip(b"\0 \xff")[-16:]:  # libjpeg would fill up what is missing and say nothing
        raise ValueError("the picture is cut short")
    picture = np.zeros((stream.rows, stream.columns), "u1" if stream.bits <= 8 else "u2" if stream.bits <= 16 else "u4")
    getattr(imagecodecs, DECODERS[stream.code])(packed, out=picture)
    return picture


def run_lengths(packed: bytes, size: tuple[int, int], kind: np.dtype[Any]) -> NDArray[Any]:
    """Decode a grey picture (rows, columns) from DICOM's run lengths; a larger one comes as one row.

    Raises:
        Exception: it is damaged or cut short.
    """
    import imagecodecs

    count = size[0] * size[1]
    try:
        content = imagecodecs.dicomrle_decode(packed, kind.newbyteorder("<"))
    except RuntimeError:
        if not packed.endswith(b"\0\0"):
            raise
        content = imagecodecs.dicomrle_decode(
            packed[: _end_of_runs(packed, count)], kind.newbyteorder("<")
        )  # zeros behind it are runs, too
    larger = len(content) >= (count + 2) * kind.itemsize  # each run of bytes may have one to spare
    return np.frombuffer(content, kind.newbyteorder("<"), -1 if larger else count).reshape((1, -1) if larger else size)


def _end_of_runs(packed: bytes, count: int) -> int:
    """Return the position where the last segment of run lengths has given `count` bytes."""
    place, given = int(np.frombuffer(packed[:64], "<u4")[segments_of(packed)]), 0
    while given < count and place < len(packed):
        head = packed[place]  # a literal run of head + 1 bytes, or beyond 128 one repeated byte
        given += head + 1 if head < 128 else 257 - head if head > 128 else 0
        place += head + 2 if head < 128 else 2 if head > 128 else 1
    return place


def segments_of(packed: bytes) -> int:
    """Return the number of segments that a header of run lengths announces, 0 for anything else."""
    numbers = np.frombuffer(packed[:64], "<u4") if len(packed) > 64 else np.zeros(16, "<u4")
    count = int(numbers[0])
    places = numbers[1 : 1 + count].astype(np.int64)
    sound = 1 <= count <= 15 and places[0] == 64 and (np.diff(places) > 0).all() and places[-1] < len(packed)
    return count if sound else 0

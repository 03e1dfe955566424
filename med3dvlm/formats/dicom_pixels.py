"""The pixels of DICOM files. pydicom decodes them; for the JPEG family it gets a plugin here, over imagecodecs.

imagecodecs brings libjpeg-turbo (8, 12 and 16 bits, lossless too), CharLS and OpenJPEG. The plugins that pydicom knows by itself leave
gaps (12-bit JPEG), are under the GPL (libjpeg) or end the whole process on damaged bytes (GDCM).
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ONE_AT_A_TIME = threading.Lock()  # pydicom refuses a plugin that another thread has just added
NAME = "med3dvlm"  # of the plugin
DECODERS = {  # by transfer syntax
    **dict.fromkeys(["1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"], "jpeg8_decode"),  # baseline, extended
    **dict.fromkeys(["1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"], "jpeg8_decode"),  # lossless
    **dict.fromkeys(["1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"], "jpegls_decode"),
    **dict.fromkeys(["1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"], "jpeg2k_decode"),
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{number}" for number in (201, 202, 203)], "jpeg2k_decode"),  # high-throughput JPEG 2000
}
DECODER_DEPENDENCIES = dict.fromkeys(DECODERS, ("imagecodecs",))  # pydicom asks a plugin's module for this name


def pictures(file: Path, syntax: str, frames: Sequence[int]) -> Iterator[NDArray[Any]]:
    """The stored values (H, W) of the frames of a grey image; `syntax` counts where the file states none.

    Raises:
        Exception: pixels are damaged, cut short or packed in an unknown way; pydicom raises nearly anything.
    """
    import pydicom
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import iter_pixels
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    plugin = NAME if syntax in DECODERS else ""
    with ONE_AT_A_TIME:
        if plugin and NAME not in get_decoder(syntax).available_plugins:
            get_decoder(syntax).add_plugin(NAME, (__name__, "decode"))
    if syntax == DeflatedExplicitVRLittleEndian:  # packed as a whole
        return iter_pixels(pydicom.dcmread(file), indices=frames, raw=True)
    return iter_pixels(file, indices=frames, raw=True, decoding_plugin=plugin, transfer_syntax_uid=syntax)


def is_available(syntax: str) -> bool:
    """Whether the plugin decodes a transfer syntax; pydicom asks."""
    return syntax in DECODERS


def decode(packed: bytes, runner: Any) -> bytes:
    """One grey frame, for pydicom, whose `runner` holds what the header says and is told the size of the numbers.

    Raises:
        ValueError: the packed picture is cut short, in colour, of another size than the header's, or its numbers are no integers.
        RuntimeError: it is damaged.
    """
    import imagecodecs

    name = DECODERS[runner.transfer_syntax]
    if name == "jpeg8_decode" and b"\xff\xd9" not in packed[-16:]:  # libjpeg would fill up what is missing and say nothing
        raise ValueError("the picture is cut short")
    for kind in ("u2", "u1", "i1", "u4"):  # imagecodecs takes u2 for i2
        # In place, so that a picture that claims to be huge takes no memory: size and type are compared before anything is decoded.
        picture = np.zeros((runner.rows, runner.columns), kind)
        try:
            getattr(imagecodecs, name)(packed, out=picture)
        except ValueError:
            continue
        runner.set_option("bits_allocated", 8 * picture.itemsize)
        if runner.pixel_representation == 1 and (unused := 8 * picture.itemsize - runner.bits_stored) > 0:
            signed = picture.view(f"i{picture.itemsize}")  # JPEG-LS knows no sign: that of the stored bits goes into those above
            signed <<= unused
            signed >>= unused
        return picture.tobytes()
    raise ValueError("the picture is not of the size or kind that the header says")

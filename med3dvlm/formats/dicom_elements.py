"""Read the elements of a DICOM header as vendors and anonymisers write them, where their meaning is certain.

pydicom finds the elements, and each is converted when it is asked for: by the type that the standard gives it where the file states
another, with a decimal comma for a point, with an empty value for none. What stays no number is either harmless, left out with a warning, or
refused by its name. No value gets into a message, since it may tell who the patient is.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from med3dvlm.formats.base import VolumeError

BINARY = {"US": "H", "SS": "h", "UL": "L", "SL": "l", "UV": "Q", "SV": "q", "FL": "f", "FD": "d", "AT": "HH", "OW": "H", "OB": "B"}
UNTYPED = ("OB", "OW", "UN")  # stated for anything
DECIMAL = ("DS", "IS")
# Numbers that nothing can be read right without; any other that is none is left out with a warning.
NEEDED = """Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SamplesPerPixel NumberOfFrames RescaleSlope RescaleIntercept
    ImagePositionPatient ImageOrientationPatient PixelSpacing LUTDescriptor LUTData""".split()
DAMAGED = ("are damaged or cut short", "copy them again")  # said only of what is
TEXT_ENDS = " \0"
UNDEFINED = 0xFFFFFFFF  # the length of what ends with a mark


class Place(NamedTuple):
    """Where an element is: its tag, and length and first byte of its value."""

    tag: int
    length: int  # in bytes, or `UNDEFINED`
    place: int


class PixelElement(NamedTuple):
    """Where a file has its pixels."""

    path: Path
    syntax: str  # transfer syntax, "" where the file states none
    tag: int
    length: int  # in bytes, or `UNDEFINED`
    place: int  # of its first byte; in a file that is packed as a whole, after unpacking
    little_endian: bool
    packed_from: int | None  # where the compressed part of a file that is compressed as a whole begins


class Unusable(Exception):
    """A slice that is whole but cannot be read. `problem` follows "3 of the DICOM slices", and `remedy` says what to do."""

    def __init__(self, problem: str, remedy: str = "export them again"):
        super().__init__(problem, remedy)


def unusable(counts: Mapping[tuple[str, str], int], source: str) -> VolumeError:
    """Return the error for slices that cannot be read, counted by problem and remedy: it names the commonest."""
    (problem, remedy), count = max(counts.items(), key=lambda item: item[1])
    return VolumeError(f"{source}: {count} of the DICOM slices {problem}; {remedy}.")


def reason(error: Exception) -> tuple[str, str]:
    """Return problem and remedy for any exception raised over a slice; pydicom and decoders raise nearly anything on damaged bytes."""
    return (error.args[0], error.args[1]) if isinstance(error, Unusable) else DAMAGED


class Header:
    """The elements of a data set by keyword, each converted when it is first asked for; several values are a list.

    `notes` are warnings about elements that were left out, `pixels` tells where the file has its pixels.
    """

    pixels: PixelElement | None = None

    def __init__(self, elements: Mapping[int, Any], notes: set[str] | None = None):
        self._elements, self._known = elements, dict[str, Any]()
        self.notes = set[str]() if notes is None else notes

    def __contains__(self, keyword: str) -> bool:
        return known(keyword)[0] in self._elements

    def __getattr__(self, keyword: str) -> Any:
        """Return an element that every image must have.

        Raises:
            Unusable: this one does.
        """
        if keyword.startswith("_"):
            raise AttributeError(keyword)
        value = self.get(keyword)
        if value is None:
            raise Unusable(f"state no {keyword}")
        return value

    def get(self, keyword: str, default: Any = None) -> Any:
        """Return the value of an element, `default` where it is missing or empty.

        Raises:
            Unusable: it is one of `NEEDED` and no number.
        """
        if keyword not in self._known:
            tag, kind, single = known(keyword)
            element = self._elements.get(tag)
            self._known[keyword] = None if element is None else self._converted(element, keyword, kind, single)
        value = self._known[keyword]
        return default if value is None else value

    def _converted(self, element: Any, keyword: str, kind: str, single: bool) -> Any:
        try:
            if kind == "SQ":
                return [Header({int(tag): item.get_item(tag) for tag in item.keys()}, self.notes) for item in _items(element)] or None
            value = value_of(element.value, element.VR or kind, kind, getattr(element, "is_little_endian", True))
            if single and isinstance(value, list) and not isinstance(value[0], str):
                if len(set(value)) > 1:
                    raise ValueError("several values for one")
                return value[0]
            return value
        except Exception:
            if keyword in NEEDED or kind == "SQ":
                raise Unusable(f"state a {keyword} that cannot be read", "correct it or export them again") from None
            self.notes.add(f"{keyword} cannot be read in some of the headers and is left out.")
            return None


@cache
def known(keyword: str) -> tuple[int, str, bool]:
    """Return the tag of an element, its type (VR) by the standard and whether it holds a single value."""
    from pydicom.datadict import dictionary_VM, dictionary_VR, tag_for_keyword

    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return int(tag), dictionary_VR(tag), dictionary_VM(tag) == "1"


def _items(element: Any) -> Any:
    from pydicom.dataelem import RawDataElement, convert_raw_data_element

    if isinstance(element, RawDataElement):
        element = convert_raw_data_element(element._replace(VR="SQ"))
    return element.value or ()


def stated(places: Sequence[Any], sequence: str, keyword: str) -> Any:
    """Return the first value of a keyword: in the functional group `sequence` of a frame, of all frames, or in the header itself."""
    for place in places:
        inner = place.get(sequence)
        value = (inner[0] if inner else place).get(keyword)
        if value is not None and value != "":
            return value
    return None


def value_of(content: Any, stated: str, kind: str, little_endian: bool = True) -> Any:
    """Decode the value of an element from its bytes: a string or number, a list of several, None for nothing.

    `stated` is the type (VR) in the file, `kind` the standard's, such as "US or SS". Numbers stand in binary by the one or as text by
    the other, and text that stands for a number becomes one.

    Raises:
        Exception: these are no numbers where numbers are meant.
    """
    if not isinstance(content, bytes):  # pydicom converted it already
        return content
    if not content:
        return None
    if stated in UNTYPED:
        stated = kind
    if "or" in stated or (stated in UNTYPED and stated not in BINARY):
        stated = "US"
    if stated in BINARY:
        form = BINARY[stated]
        size = struct.calcsize(f"<{form}")
        if len(content) % size:
            raise ValueError("no whole number of values")
        values: list[Any] = [*struct.unpack(f"{'<' if little_endian else '>'}{len(content) // size * form}", content)]
        if stated == "AT":
            values = [group << 16 | element for group, element in zip(values[::2], values[1::2], strict=True)]
    else:
        text = _text(content)
        if kind in DECIMAL or "US" in kind or kind in BINARY:
            values = [float(each) if kind == "DS" or kind in ("FL", "FD") else _whole(each) for each in _decimals(text) if each]
        else:
            values = [each.strip(TEXT_ENDS) for each in text.split("\\")]
    if any(isinstance(each, float) and not math.isfinite(each) for each in values):
        raise ValueError("no finite number")
    if values in ([], [""]):
        return None
    return values[0] if len(values) == 1 else values


def _text(content: bytes) -> str:
    try:
        return content.decode().strip(TEXT_ENDS)
    except UnicodeDecodeError:
        return content.decode("latin-1").strip(TEXT_ENDS)


def _decimals(text: str) -> Iterator[str]:
    """Parse the numbers of a text, which a backslash separates: a comma stands for a point, or for the backslash where points occur too."""
    if "," in text and "." in text and "\\" not in text:
        text = text.replace(",", "\\")
    for each in text.split("\\"):
        if "_" in each:  # Python takes 1_0 for 10
            raise ValueError("no number")
        yield each.strip(TEXT_ENDS).replace(",", ".")


def _whole(text: str) -> int:
    number = float(text)
    if number != int(number):
        raise ValueError("no whole number")
    return int(number)


def elements_before(
    stream: BinaryIO, stop: Callable[[int], bool], wanted: Sequence[str], implicit: bool, little_endian: bool
) -> tuple[dict[int, Any], Place | None]:
    """Read the wanted elements up to the first whose tag satisfies `stop`, and the place of that one, or None where there is none.

    The stream is left where that element begins.

    Raises:
        EOFError: the stream ends within an element.
    """
    from pydicom.filereader import data_element_generator

    met: list[Place] = []

    def stops(tag: int, vr: str | None, length: int) -> bool:
        if stop(tag):
            met.append(Place(int(tag), length, stream.tell()))
        return bool(met)

    elements: dict[int, Any] = {}
    tags = [known(keyword)[0] for keyword in wanted]
    for element in data_element_generator(stream, implicit, little_endian, stop_when=stops, specific_tags=tags or [0x00080005]):
        elements[int(element.tag)] = element
        if isinstance(element.value, bytes) and len(element.value) < getattr(element, "length", 0) < UNDEFINED:
            raise EOFError("the file ends within an element")
    if not met and stream.tell() > stream.seek(0, 2):
        raise EOFError("the file ends within an element")
    return elements, met[0] if met else None

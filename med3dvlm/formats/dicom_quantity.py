"""The quantity that the numbers of a DICOM slice are by its header, and how stored values are converted to it."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.dicom_elements import Header, Unusable, stated

HU = {"HU", "HOUNSFIELD", "HOUNSFIELD UNIT", "HOUNSFIELD UNITS", "[HNSF'U]", "HNSF'U"}
UNNAMED = {"", "US", "UNSPECIFIED", "NONE", "NORMALIZED", "1", "[ARB'U]"}  # they name no quantity
MODIFIED = "HU_MOD"
QUANTITIES = {  # terms of RescaleType, ImageType and FrameType
    "MGML": "MGML (mg/ml)",
    "Z_EFF": "Z_EFF (effective atomic number)",
    "EFF_ATOMIC_NUM": "EFF_ATOMIC_NUM (effective atomic number)",
    "ED": "ED (electron density)",
    "EDW": "EDW (electron density relative to water)",
    "ELECTRON_DENSITY": "ELECTRON_DENSITY",
    "OD": "OD (optical density)",
    "PCT": "PCT (percent)",
    "MAT_FRACTIONAL": "MAT_FRACTIONAL (share of a material)",
    "STD_DEVIATION": "STD_DEVIATION (standard deviation)",
    **{each: f"{each} (perfusion)" for each in ("RCBF", "RCBV", "CBF", "CBV", "MTT", "TTP", "TMAX")},
    **{each: f"{each} (a statistic)" for each in ("T_TEST", "Z_SCORE")},
}
UNIT = r"(\d*(m|u|k|M|d|c)?(l|L|g|s|m|Bq|mol|eV)|\d+|%|min|h|K|Cel)\d?"  # one of a formula such as ml/100ml/s
OTHER = "another quantity than HU"  # where the header's word for it is not known, and could be anything


class Table(NamedTuple):
    """A Modality LUT: the values of the stored numbers from `first` on; lower ones have the first value, higher ones the last."""

    first: int
    values: NDArray[Any]


class Quantity(NamedTuple):
    """The quantity of stored values and their conversion."""

    rescale: tuple[float, float] | None = None  # slope, intercept
    hu: bool = False  # the header says that they lead to HU
    other: str | None = None  # a quantity that the header names instead
    table: Table | None = None  # which holds instead of slope and intercept
    notes: tuple[str, ...] = ()


def quantity_of(places: Sequence[Any], modality: str) -> Quantity:
    """Read the quantity from a frame's header in `places`: functional groups of the frame, those of all frames, the header itself.

    Raises:
        Unusable: a table of values cannot be applied.
    """
    notes = []
    slope, intercept, kind = (
        stated(places, "PixelValueTransformationSequence", keyword) for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType")
    )
    rescale = None if slope is None and intercept is None else (float(1 if slope is None else slope), float(intercept or 0))
    sure = True
    if rescale and not rescale[0]:
        notes.append("the header states a RescaleSlope of 0, after which all voxels would be equal; 1 is used.")
        rescale, sure = (1.0, rescale[1]), False
    table = next((place.get("ModalityLUTSequence") for place in places[::-1] if place.get("ModalityLUTSequence")), None)
    if table:
        kind, rescale = table[0].get("ModalityLUTType"), None
        notes.append("the header's table of values (Modality LUT) is applied.")
    stated_term = str(kind or "").strip()
    term = stated_term.upper()
    if term == MODIFIED:
        notes.append("the header says that the HU are modified (HU_MOD), as where a material was taken out.")
    other = _other(places, stated_term)
    hu = modality == "CT" and (rescale is not None or table is not None) and sure and other is None
    hu = hu and term in HU | {MODIFIED} | ({""} if table is None else set())
    return Quantity(rescale, hu, other, _table(table[0], places[-1]) if table else None, tuple(notes))


def _other(places: Sequence[Any], term: str) -> str | None:
    """Return the quantity that a header names where it is not HU."""
    if term.upper() not in HU | UNNAMED | {MODIFIED}:
        return _named(term)
    units = [str(places[-1].get("Units") or "")]
    for place in places:
        for mapping in place.get("RealWorldValueMappingSequence") or ():
            units += [str(code.get("CodeValue") or "") for code in mapping.get("MeasurementUnitsCodeSequence") or ()]
    if named := [unit for unit in units if unit.strip().upper() not in HU | UNNAMED]:
        return _named(named[0])
    types = [stated(places[:2], f"{name}ImageFrameTypeSequence", "FrameType") for name in ("CT", "MR")]
    words = [word for each in (*types, places[-1].get("ImageType")) if isinstance(each, list) for word in each]
    return next((QUANTITIES[word] for word in words if word in QUANTITIES), None)


def _named(term: str) -> str:
    """Return the header's word for a quantity, if it is a known one or a unit and so cannot be a name."""
    if term.upper() in QUANTITIES:
        return QUANTITIES[term.upper()]
    return term if re.fullmatch(f"{UNIT}([/.*]{UNIT})*", term, re.IGNORECASE) else OTHER


def _table(item: Any, header: Header) -> Table:
    descriptor, values = item.get("LUTDescriptor"), item.get("LUTData")
    if not (isinstance(descriptor, list) and isinstance(values, list) and len(descriptor) == 3):
        raise Unusable("have a table of values (Modality LUT) without its size or values")
    count, first = int(descriptor[0]) or 65536, int(descriptor[1])
    if header.get("PixelRepresentation") and first >= 32768:
        first -= 65536
    array = np.array(values, np.int64)
    if len(array) == (count + 1) // 2 != count:  # bytes, two a word
        array = array.astype("<u2").view("u1").astype(np.int64)[:count]
    if len(array) != count:
        raise Unusable("have a table of values (Modality LUT) of another size than the header states")
    return Table(first, array)


def padding_of(header: Header) -> tuple[int, int] | None:
    """Return PixelPaddingValue, or the range to its limit, as the pixels store it (headers may write -2000 as 63536 and vice versa)."""
    value, limit = header.get("PixelPaddingValue"), header.get("PixelPaddingRangeLimit")
    if value is None:
        return None
    bits, signed = int(header.BitsAllocated), bool(header.get("PixelRepresentation"))
    found = [int(each) % 2**bits for each in (value, value if limit is None else limit)]
    if signed:
        found = [each - 2**bits if each >= 2 ** (bits - 1) else each for each in found]
    return min(found), max(found)

"""Are a scan's numbers Hounsfield units, and whose slope and intercept make them so?

A CT's stored numbers become HU by `stored x slope + intercept`, usually 1 and -1024. Files differ in who does that: most
headers state it and the reader applies it (NIfTI, DICOM); CT-RATE's first version states it in a table beside the files,
while its second version holds HU already. Doing it twice or not at all moves air from -1000 to -2024 or 24, and no later
step would notice. So each of four policies says whose slope and intercept count, and the result is checked:

- "header": the file's own.
- "csv": the stated ones, `rescale=(slope, intercept)`; the file must not have been rescaled before.
- "already_hu": none; what a header states is taken back.
- "auto": decides by header and values, and says what and why.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.base import Parts, VolumeError

HU_POLICIES = ("auto", "header", "csv", "already_hu")
AIR, DENSEST = -1100, 4000  # HU; nearly all of a CT lies between
LIGHTEST = -900  # HU; air lies between AIR and this
AIRLESS = 1e-4  # a smaller share of air is none
LOWEST_PADDING = -3100  # HU; below air, scanners write padding such as -2000 or -3024
TISSUE = -200  # HU; only fat's edges, lung and air lie below
UNRESCALED = (700, 1300)  # where soft tissue lies before 1024 is subtracted, and in HU nothing but bone
SAMPLE = 2**20  # voxels that shares are counted in


class Meaning(NamedTuple):
    """What the numbers are: the array (rescaled where the policy says so), its unit, why, and what is doubtful."""

    array: NDArray[Any]
    unit: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def interpret(parts: Parts, source: str, policy: str = "auto", rescale: Sequence[float] | None = None, unit: str | None = None) -> Meaning:
    """The values of `parts` by a policy (see the module's text), finite and not empty; a stated `unit` other than HU wins.

    "auto" with `rescale`: the file's values *look like HU* if at least 99 % lie within -1100..4000 or are the lowest value
    (padding), at least 0.01 % within -1100..-900 as air does, or else 1 % are the lowest value and that is below -200 (cut
    off there), and they do not *look un-rescaled*: that is, at most 0.1 % between -1100 and -200 and more than 10 % within
    700..1300, where soft tissue lies before the intercept -1024 (the lowest value not counted in either). If they do, or the
    header rescaled them to that, they are left alone, unless those above the lowest show air only after slope and intercept;
    else if they do after slope and intercept, these are applied; else it is an error, as nobody knows. "csv" on values that
    look like HU, or that the header rescaled, is an error: it would be done twice. So it is, in both, where soft tissue near
    0 would become air.

    "auto" without `rescale`: HU if the header says so (DICOM) and there are negative values, or, unless the header names a
    modality other than CT, if the values look like HU and the lowest is not below -3100, with a warning where there is no
    air; else "unit" within 0..1, else "arbitrary".

    Raises:
        VolumeError: contradicting wishes, slope and intercept applied twice, or values that cannot be the stated HU.
    """
    slope, intercept = _checked_wishes(source, policy, rescale, unit)
    array = parts.array
    notes = []
    if parts.rescale is not None and policy != "already_hu":
        notes.append(f"the header's {_named(parts.rescale)} are applied.")
    if unit is not None and unit != "HU":
        return Meaning(array, unit, (*notes, f"the unit is {unit!r}, as stated."))
    if policy == "auto" and rescale is None and unit is None:
        return _guess(parts, tuple(notes))

    if policy == "csv":
        reason = f"the stated {_named((slope, intercept))} are applied, as hu='csv' says."
        if parts.rescale is not None:
            raise VolumeError(
                f"{source}: the header states {_named(parts.rescale)}, so hu='csv' would rescale twice; use hu='header', or 'auto'."
            )
        if (slope, intercept) != (1, 0) and _looks_like_hu(array):
            raise VolumeError(f"{source}: {_spread(array)}, so they are HU already and hu='csv' would rescale twice; use hu='already_hu'.")
        if _sinks(array, slope, intercept):
            raise VolumeError(
                f"{source}: soft tissue seems to lie near 0 ({_spread(array)}) and the stated {_named((slope, intercept))} would "
                "make air of it, so the values are HU already and hu='csv' would rescale twice; use hu='already_hu'."
            )
        array = _rescaled(array, slope, intercept)
    elif policy == "already_hu":
        reason = "the stored values are HU, as hu='already_hu' says; no slope and intercept are applied."
        if parts.rescale is not None and np.isnan(parts.rescale).any():
            raise VolumeError(
                f"{source}: slope and intercept differ from slice to slice, so hu='already_hu' cannot be meant; use 'header'."
            )
        if parts.rescale is not None:
            array = _stored(array, *parts.rescale)
    elif policy == "header":
        reason = "the values are HU by the header, as hu='header' says."
    elif rescale is None:
        reason = "the values are HU, as unit='HU' says."
    else:
        array, reason = _decided(parts, source, slope, intercept)
    if problem := _impossible(array):
        raise VolumeError(f"{source}: as HU the values cannot be right: {problem}; choose another hu= or unit='arbitrary'.")
    return Meaning(array, "HU", (*notes, reason), _padding(array))


def _checked_wishes(source: str, policy: str, rescale: Sequence[float] | None, unit: str | None) -> tuple[float, float]:
    """Slope and intercept, (1, 0) if none are stated."""
    if policy not in HU_POLICIES:
        raise VolumeError(f"{source}: hu is {policy!r} but must be one of {', '.join(HU_POLICIES)}.")
    if policy == "csv" and rescale is None:
        raise VolumeError(f"{source}: hu='csv' needs the slope and intercept of the table; state rescale=(slope, intercept).")
    if unit is not None and unit != "HU" and (policy != "auto" or rescale is not None):
        raise VolumeError(f"{source}: unit {unit!r} contradicts hu and rescale, which lead to HU; state only one of them.")
    numbers = (1.0, 0.0) if rescale is None else tuple(float(number) for number in rescale)
    if len(numbers) != 2 or not np.isfinite(numbers).all() or numbers[0] <= 0:
        raise VolumeError(f"{source}: rescale is {rescale} but must be two numbers (slope, intercept), the slope above 0.")
    return numbers[0], numbers[1]


def _decided(parts: Parts, source: str, slope: float, intercept: float) -> tuple[NDArray[Any], str]:
    """Policy "auto" with a stated slope and intercept: the array in HU and the reason."""
    array, stated = parts.array, _named((slope, intercept))
    already = f"the values are HU already ({_spread(array)}); the stated {stated} are not applied."
    looks = _looks_like_hu(array)
    if looks and (parts.rescale is not None or _airy(array) > 0.001):
        return array, already
    if parts.rescale is not None:
        raise VolumeError(
            f"{source}: the header's {_named(parts.rescale)} are applied, yet the values do not look like HU ({_spread(array)}), and "
            f"others are stated ({stated}); say which are right with hu='header' or hu='already_hu'."
        )
    rescaled = _rescaled(array, slope, intercept)
    if _looks_like_hu(rescaled) and not _sinks(array, slope, intercept) and (not looks or _airy(rescaled) > 0.001):
        return rescaled, f"the values as stored are no HU ({_spread(array)}) and are after the stated {stated}, which are applied."
    if looks:
        return array, already
    raise VolumeError(
        f"{source}: neither as stored ({_spread(array)}) nor after the stated {stated} do the values look like HU; "
        "say which they are with hu='csv' or hu='already_hu'."
    )


def _guess(parts: Parts, notes: tuple[str, ...]) -> Meaning:
    """Policy "auto" without a stated slope and intercept."""
    array, modality = parts.array, parts.modality
    low, high = float(array.min()), float(array.max())
    if parts.hu:
        problem = _impossible(array) if low < 0 else f"they are {low:g} to {high:g}"
        if problem is None:
            return Meaning(array, "HU", (*notes, "the unit is HU, as the header says."), _padding(array))
        doubt = f"the header says CT but the values look un-rescaled or changed: {problem}."
        return Meaning(array, "arbitrary", notes, (doubt,))
    if modality in (None, "CT") and low >= LOWEST_PADDING and _looks_like_hu(array):
        doubts = () if _has_air(array) else ("the unit is taken to be HU, yet no values lie near -1000 as air does; state it with unit=.",)
        return Meaning(array, "HU", (*notes, f"the unit is HU by the values: {_spread(array)}, as in a CT."), (*_padding(array), *doubts))
    warnings = []
    if modality in (None, "CT") and LOWEST_PADDING <= low <= TISSUE and not _has_air(array) and _within(array) >= 0.99:
        warnings.append("no values lie near -1000 as air does, so they are not taken as HU; if they are, state unit='HU'.")
    unrescaled = _looks_unrescaled(array) if low < 0 else 1500 <= high <= 4200
    if modality in (None, "CT") and unrescaled and (array == np.rint(array)).all():
        warnings.append(f"values are whole numbers from {low:g} to {high:g}; if this is a CT, it looks un-rescaled.")
    if 0 <= low and high <= 1:
        return Meaning(array, "unit", (*notes, "the values lie within 0..1."), tuple(warnings))
    why = f"the header says {modality}" if modality else f"the header names no unit and the values do not look like HU ({_spread(array)})"
    return Meaning(array, "arbitrary", (*notes, f"the unit is arbitrary: {why}."), tuple(warnings))


def _looks_like_hu(array: NDArray[Any]) -> bool:
    cut_off = AIR <= array.min() <= TISSUE and (_sample(array) == array.min()).mean() >= 0.01  # as by a window, below it
    return bool((_has_air(array) or cut_off) and _within(array) >= 0.99 and not _looks_unrescaled(array))


def _has_air(array: NDArray[Any]) -> bool:
    sample = _sample(array)
    return bool(((sample >= AIR) & (sample <= LIGHTEST)).mean() >= AIRLESS)


def _looks_unrescaled(array: NDArray[Any]) -> bool:
    above = _above_lowest(array)
    return bool(_airy(array) <= 0.001 and ((above >= UNRESCALED[0]) & (above <= UNRESCALED[1])).mean() > 0.1)


def _airy(array: NDArray[Any]) -> float:
    """The share of air, lung and their edges in what is not the lowest value."""
    above = _above_lowest(array)
    return float(((above >= AIR) & (above <= TISSUE)).mean())


def _sinks(stored: NDArray[Any], slope: float, intercept: float) -> bool:
    """Whether rescaling would make air of soft tissue: of a body in HU alone, on 0 or cut off, which does not show that it is HU."""
    above = _above_lowest(stored)
    return bool((slope * above + intercept < TISSUE).mean() > 0.99 and (np.abs(above) <= -TISSUE).mean() > 0.5)


def _above_lowest(array: NDArray[Any]) -> NDArray[Any]:
    """What is neither padding nor cut off: those of the sample above the lowest value, which is itself the answer where there are none."""
    sample = _sample(array).astype(np.float64)
    above: NDArray[Any] = sample[sample > array.min()]
    return above if above.size else sample


def _impossible(array: NDArray[Any]) -> str | None:
    """Why values cannot be HU; None where they may be."""
    low, high = float(array.min()), float(array.max())
    if low < -32768 or high > 32767:
        return f"they are {low:g} to {high:g}, beyond what 16 bits hold"
    if low >= 0 and high <= 1:
        return "they lie within 0..1, so they were scaled"
    if low > 0:
        return f"the lowest is {low:g}, so there is no air, fat or water"
    if _looks_unrescaled(array):
        return "soft tissue seems to lie near 1000 and there is no air near -1000, so they are un-rescaled"
    if (within := _within(array)) < 0.9:
        return f"only {within:.0%} lie within {AIR}..{DENSEST}, so they were rescaled twice or not at all"
    return None


def _within(array: NDArray[Any]) -> float:
    """The share of voxels that lie where a CT's do, or are padding."""
    sample = _sample(array)
    return float((((sample >= AIR) & (sample <= DENSEST)) | (sample == array.min())).mean())


def _sample(array: NDArray[Any]) -> NDArray[Any]:
    """About a million voxels of a large array, evenly spread; the odd step keeps away from rows of an even length."""
    return array.reshape(-1)[:: array.size // SAMPLE | 1]


def _spread(array: NDArray[Any]) -> str:
    return f"they reach from {array.min():g} to {array.max():g}, {_within(array):.0%} of them within {AIR}..{DENSEST} or padding"


def _padding(array: NDArray[Any]) -> tuple[str, ...]:
    low = float(array.min())
    return (f"the lowest value is {low:g} HU, below that of air; it is probably padding.",) if low < AIR else ()


def _rescaled(array: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    return array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _stored(array: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """What the header's slope and intercept made `array` of; whole numbers where rounding alone keeps it from them."""
    stored = (array.astype(np.float64) - intercept) / slope
    whole = np.rint(stored)
    return whole if np.abs(stored - whole).max() < 0.01 else stored


def _named(rescale: Sequence[float]) -> str:
    return f"slope {rescale[0]:g} and intercept {rescale[1]:g}" if not np.isnan(rescale[0]) else "slope and intercept of each slice"

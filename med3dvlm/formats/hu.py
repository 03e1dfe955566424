"""Decide whether a scan's numbers are Hounsfield units, and which slope and intercept convert them.

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
from med3dvlm.formats.hu_values import AIR, SCALES, TISSUE, Spread

HU_POLICIES = ("auto", "header", "csv", "already_hu")
LOWEST_PADDING = -3100  # HU; below air, scanners write padding such as -2000 or -3024


class Meaning(NamedTuple):
    """The meaning of a scan's numbers: the array (rescaled where the policy says so), its unit, the reasons, and doubts."""

    array: NDArray[Any]
    unit: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def interpret(parts: Parts, source: str, policy: str = "auto", rescale: Sequence[float] | None = None, unit: str | None = None) -> Meaning:
    """Return the values of `parts` by a policy (see the module's text), finite and not empty; a stated `unit` other than HU takes precedence.

    "auto" with `rescale`: the file's values *look like HU* if at least 99 % lie within -1100..4000 or are the lowest value
    (padding), at least 0.01 % within -1100..-900 as air does, or else 1 % are the lowest value and that is below -200 (cut
    off there), and they do not *look un-rescaled*: that is, at most 0.1 % between -1100 and -200 and more than 10 % within
    700..1300, where soft tissue lies before the intercept -1024 (the lowest value not counted in either). If they do, or the
    header rescaled them to that, they are left alone, unless those above the lowest show air only after slope and intercept;
    else if they do after slope and intercept, these are applied; else it is an error, as nobody knows. "csv" on values that
    look like HU, or that the header rescaled, is an error: it would be done twice. So it is, in both, where soft tissue near
    0 would become air.

    "auto" without `rescale`: not HU if the header names another quantity. HU if the header says so (DICOM) and there are
    negative values, or, unless the header names a modality other than CT, if the values look like HU and the lowest is not
    below -3100, with a warning where there is no air; but neither where soft tissue seems to lie near -1000. Else "unit"
    within 0..1, else "arbitrary", with a warning where the values would be HU on another scale, such as 10 x HU.

    Under every policy, negative numbers that were read as unsigned ones of 16 bits are made negative again, with a warning.

    Raises:
        VolumeError: contradicting wishes, slope and intercept applied twice, or values that cannot be the stated HU.
    """
    slope, intercept = _checked_wishes(source, policy, rescale, unit)
    notes, warnings = [], []
    spread = Spread(parts.array)
    if (unwrapped := spread.unwrapped(parts.rescale)) is not None:
        warnings.append("values above 57344 are negative numbers that were written as unsigned ones; 65536 is subtracted from them.")
        parts, spread = parts._replace(array=unwrapped), Spread(unwrapped)
    if parts.rescale is not None and policy != "already_hu":
        notes.append(f"the header's {_named(parts.rescale)} are applied.")
    if unit is not None and unit != "HU":
        return Meaning(parts.array, unit, (*notes, f"the unit is {unit!r}, as stated."), tuple(warnings))
    if policy == "auto" and rescale is None and unit is None:
        meaning = _guess(parts, spread)
    else:
        array, reason = _by_wish(parts, spread, source, policy, slope, intercept, rescale is not None)
        spread = spread if array is parts.array else Spread(array)
        if problem := spread.impossible:
            raise VolumeError(
                f"{source}: as HU the values cannot be right: {problem}; choose another hu (--hu), or unit='arbitrary' (--unit arbitrary)."
            )
        doubts = [f"the header says that the values are {parts.quantity} and no HU."] if parts.quantity else []
        meaning = Meaning(array, "HU", (reason,), (*_padding(spread), *doubts, *_sunk(spread, parts)))
    return meaning._replace(notes=(*notes, *meaning.notes), warnings=(*warnings, *meaning.warnings))


def _by_wish(
    parts: Parts, spread: Spread, source: str, policy: str, slope: float, intercept: float, stated: bool
) -> tuple[NDArray[Any], str]:
    """Return the array in HU and the reason, where a policy, slope and intercept (`stated`) or the unit HU are stated."""
    array = parts.array
    if policy == "csv":
        if parts.rescale is not None:
            raise VolumeError(
                f"{source}: the header states {_named(parts.rescale)}, so hu='csv' would rescale twice; use hu='header' (--hu header), or 'auto'."
            )
        if (slope, intercept) != (1, 0) and spread.looks_like_hu and not spread.looks_sunk:
            raise VolumeError(
                f"{source}: {spread}, so they are HU already and hu='csv' would rescale twice; use hu='already_hu' (--hu already_hu)."
            )
        if spread.sinks(slope, intercept):
            raise VolumeError(
                f"{source}: soft tissue seems to lie near 0 ({spread}) and the stated {_named((slope, intercept))} would "
                "turn it into air, so the values are HU already and hu='csv' would rescale twice; use hu='already_hu' (--hu already_hu)."
            )
        return _rescaled(array, slope, intercept), f"the stated {_named((slope, intercept))} are applied, as hu='csv' says."
    if policy == "already_hu":
        if parts.rescale is not None and np.isnan(parts.rescale).any():
            raise VolumeError(
                f"{source}: slope and intercept differ from slice to slice, so the values are not HU yet; use hu='header' (--hu header)."
            )
        array = array if parts.rescale is None else _stored(array, *parts.rescale)
        return array, "the stored values are HU, as hu='already_hu' says; no slope and intercept are applied."
    if policy == "header":
        return array, "the values are HU by the header, as hu='header' says."
    if not stated:
        return array, "the values are HU, as the stated unit says."
    return _decided(parts, spread, source, slope, intercept)


def _checked_wishes(source: str, policy: str, rescale: Sequence[float] | None, unit: str | None) -> tuple[float, float]:
    """Return slope and intercept, (1, 0) if none are stated."""
    if policy not in HU_POLICIES:
        raise VolumeError(f"{source}: hu is {policy!r} but must be one of {', '.join(HU_POLICIES)}.")
    if policy == "csv" and rescale is None:
        raise VolumeError(
            f"{source}: hu='csv' needs the slope and intercept of the table; state rescale=(slope, intercept) (--rescale S,I)."
        )
    if unit is not None and unit != "HU" and (policy != "auto" or rescale is not None):
        raise VolumeError(f"{source}: unit {unit!r} contradicts hu and rescale, which lead to HU; state only one of them.")
    numbers = (1.0, 0.0) if rescale is None else tuple(float(number) for number in rescale)
    if len(numbers) != 2 or not np.isfinite(numbers).all() or numbers[0] <= 0:
        raise VolumeError(f"{source}: rescale is {rescale} but must be two numbers (slope, intercept), the slope above 0.")
    return numbers[0], numbers[1]


def _decided(parts: Parts, spread: Spread, source: str, slope: float, intercept: float) -> tuple[NDArray[Any], str]:
    """Apply policy "auto" with a stated slope and intercept. Returns the array in HU and the reason."""
    array, stated = parts.array, _named((slope, intercept))
    if parts.quantity:
        raise VolumeError(
            f"{source}: the header says that the values are {parts.quantity}, yet slope and intercept are stated for HU; leave them out, "
            "or overrule the header with hu='csv' or 'already_hu' (--hu)."
        )
    already = f"the values are HU already ({spread}); the stated {stated} are not applied."
    looks = spread.looks_like_hu
    if looks and (parts.rescale is not None or spread.airy > 0.001):
        return array, already
    if parts.rescale is not None:
        raise VolumeError(
            f"{source}: the header's {_named(parts.rescale)} are applied, yet the values do not look like HU ({spread}), and "
            f"others are stated ({stated}); choose the right ones with hu='header' or 'already_hu' (--hu)."
        )
    rescaled = Spread(_rescaled(array, slope, intercept))
    if rescaled.looks_like_hu and not spread.sinks(slope, intercept) and (not looks or rescaled.airy > 0.001):
        return rescaled.array, f"the values as stored are no HU ({spread}) and are after the stated {stated}, which are applied."
    if looks:
        return array, already
    raise VolumeError(
        f"{source}: neither as stored ({spread}) nor after the stated {stated} do the values look like HU; "
        "choose what they are with hu='csv' or 'already_hu' (--hu)."
    )


def _guess(parts: Parts, spread: Spread) -> Meaning:
    """Apply policy "auto" without a stated slope and intercept."""
    array, modality = parts.array, parts.modality
    low, high = spread.low, spread.high
    if parts.quantity:
        return Meaning(array, "arbitrary", (f"the unit is arbitrary: the header says that the values are {parts.quantity}.",))
    sunk = _sunk(spread, parts)
    if parts.hu:
        problem = spread.impossible if low < 0 else f"they are {low:g} to {high:g}"
        if problem is not None:
            doubt = f"the header says CT but the values look un-rescaled or changed: {problem}."
            return Meaning(array, "arbitrary", warnings=(doubt, *_other_scale(spread, parts)))
        if not sunk:
            return Meaning(array, "HU", ("the unit is HU, as the header says.",), _padding(spread))
        return Meaning(array, "arbitrary", ("the unit is arbitrary: the header says HU and the values contradict it.",), sunk)
    if modality not in (None, "CT"):
        return Meaning(array, *_no_hu(spread, f"the header says {modality}"))
    if low >= LOWEST_PADDING and spread.looks_like_hu and not sunk:
        doubt = "the unit is taken to be HU, yet no values lie near -1000 as air does; if it is not, state another unit (--unit)."
        doubts = _padding(spread) if spread.has_air else (*_padding(spread), doubt)
        return Meaning(array, "HU", (f"the unit is HU by the values: {spread}, as in a CT.",), doubts)
    warnings = [*sunk] or [*_other_scale(spread, parts)]
    if LOWEST_PADDING <= low <= TISSUE and not spread.has_air and spread.within >= 0.99 and not warnings:
        warnings.append("no values lie near -1000 as air does, so they are not taken as HU; if they are, state unit='HU' (--unit HU).")
    unrescaled = spread.looks_unrescaled if low < 0 else 1500 <= high <= 4200
    if unrescaled and not warnings and (array == np.rint(array)).all():
        warnings.append(f"values are whole numbers from {low:g} to {high:g}; if this is a CT, it looks un-rescaled.")
    why = "the values may be HU rescaled twice" if sunk else f"the header names no unit and the values do not look like HU ({spread})"
    return Meaning(array, *_no_hu(spread, why), tuple(warnings))


def _no_hu(spread: Spread, why: str) -> tuple[str, tuple[str, ...]]:
    """Return the unit of values that are not HU, and a note with the reason."""
    if 0 <= spread.low and spread.high <= 1:
        return "unit", ("the values lie within 0..1.",)
    return "arbitrary", (f"the unit is arbitrary: {why}.",)


def _other_scale(spread: Spread, parts: Parts) -> tuple[str, ...]:
    """Say on which other scale the values would be HU, and how to state it."""
    if spread.scale is None or 0 <= spread.low <= spread.high <= 1:
        return ()
    slope, intercept = SCALES[spread.scale]
    how = "un-rescaled" if intercept < 0 else "rescaled twice" if intercept > 0 else "scaled"
    return (f"the values look like a CT in {spread.scale}, {how}; if it is one, {_remedy(parts, slope, intercept)}.",)


def _padding(spread: Spread) -> tuple[str, ...]:
    return (f"the lowest value is {spread.low:g} HU, below that of air; it is probably padding.",) if spread.low < AIR else ()


def _sunk(spread: Spread, parts: Parts) -> tuple[str, ...]:
    """Say that 1024 may have been subtracted twice, and what helps."""
    if not spread.looks_sunk:
        return ()
    return (
        "apart from a filling, nearly all values lie near -1000 as air does and hardly any near 0, so HU may have been rescaled twice; "
        f"if so, {_remedy(parts, 1, 1024)}, and if they are HU, state unit='HU' (--unit HU).",
    )


def _remedy(parts: Parts, slope: float, intercept: float) -> str:
    """Say how slope and intercept lead to HU."""
    if parts.rescale is None:
        return f"state rescale=({slope:g}, {intercept:g}) with hu='csv' (--rescale {slope:g},{intercept:g} --hu csv)"
    if slope == parts.rescale[0] == 1 and abs(intercept + parts.rescale[1]) < 100:  # never for NaN
        return "state hu='already_hu' (--hu already_hu)"
    return "export the scan again without slope and intercept"


def _rescaled(array: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    return array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _stored(array: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """Take back the header's slope and intercept; whole numbers where only rounding kept them from being whole."""
    stored = (array.astype(np.float64) - intercept) / slope
    whole = np.rint(stored)
    return whole if np.abs(stored - whole).max() < 0.01 else stored


def _named(rescale: Sequence[float]) -> str:
    return f"slope {rescale[0]:g} and intercept {rescale[1]:g}" if not np.isnan(rescale[0]) else "slope and intercept of each slice"

"""Choose the scan among the stacks in DICOM files, and describe the stacks.

Originals come before what was made of them (MIP, reformat), then the one with the most slices comes first, then axial, then thin slices, then
the lower series number. A stack that is no more than half of its series is not taken by itself: the user picks by number.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from med3dvlm.formats.base import AmbiguousSeriesError, VolumeError, colour
from med3dvlm.formats.dicom_attributes import ATTRIBUTES, common_attributes, differences, is_reformat, number_of
from med3dvlm.formats.dicom_geometry import BY_NUMBER, heights_of, natural_key, places_of
from med3dvlm.formats.dicom_slices import COLOUR, SECONDARY, Slice, Stack
from med3dvlm.formats.dicom_stacks import by_reference, stacks_of

PLANES = ("sagittal", "coronal", "axial")
MAX_LISTED = 20  # stacks in a message


class Choice(NamedTuple):
    """The chosen stack; a description of each stack that may be picked, the chosen one first; warnings."""

    stack: Stack
    lines: tuple[str, ...]
    warnings: tuple[str, ...]


class Series(NamedTuple):
    """What the headers say about a stack that may be picked.

    - `number`: by which `choose` picks it.
    - `study`, `series`: 16 hexadecimal digits of the SHA-256 of the UIDs.
    - `plane`: the anatomical one nearest to the slices, "" where they state none; `thickness` in mm, None likewise.
    - `derived`: it was made of other images (MIP, reformat).
    - `extent`: of the body that it covers, in mm^3.
    - `doubt`: why it may be no scan of its own, "" for nothing.
    """

    number: int
    study: str
    series: str
    slices: int
    plane: str
    thickness: float | None
    derived: bool
    extent: float
    doubt: str


def listing(slices: list[Slice], source: str) -> list[Series]:
    """Describe all stacks that `choose` picks from, in its order.

    Raises:
        VolumeError: there is none.
    """
    found, stacks, _ = _candidates(slices, source)
    series = []
    for number, stack in enumerate(stacks, start=1):
        attributes = common_attributes(each.attributes for each in stack)
        _, study, uid = stack[0].series
        known: Any = (_plane(stack), number_of(attributes.get("thickness")), is_reformat(attributes), _extent(stack), _doubt(stack, found))
        series.append(Series(number, _digest(study), _digest(uid), len(stack), *known))
    return series


def _digest(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:16]


def choose(slices: list[Slice], series: int | None, source: str) -> Choice:
    """Return stack number `series` from 1, or the first of those that may be scans.

    Raises:
        VolumeError: there is none, no such number, or none is the scan beyond doubt; the message lists what may be picked.
    """
    found, stacks, warnings = _candidates(slices, source)
    if (patients := len({stack[0].series[0] for stack in stacks})) > 1:
        warnings.append(f"the scans found are of {patients} patients.")

    words = _described(stacks)
    lines = [f"{number}: {text}" for number, text in enumerate(words, start=1)]
    listed = "; ".join(lines[:MAX_LISTED]) + (f"; and so on up to {len(lines)}" if len(lines) > MAX_LISTED else "")
    if series is not None and not 1 <= series <= len(stacks):
        raise VolumeError(f"{source}: there is no series {series}; choose one of {listed}.")
    picked = 0 if series is None else series - 1
    stack = stacks[picked]
    if series is None and (doubt := _doubt(stack, found)):
        raise AmbiguousSeriesError(f"{source}: {doubt}; choose one by series number, or give its files alone: {listed}.", tuple(lines))
    if (stack[0].position or stack[0].location) is not None and (repeated := _repeated(stack)):
        others = f"; or choose another by series number: {listed}" if len(stacks) > 1 else ""
        raise VolumeError(
            f"{source}: {repeated}, and neither an attribute (acquisition, phase, echo, kernel or the like) nor the order in which they were "
            f"taken tells them apart; export each of them as a series of its own{others}."
        )
    if series is None and len(stacks) > 1:
        warnings.append(f"of the {len(stacks)} series number 1 is taken as {_reason(stacks)}.")
    return Choice(stack, (lines.pop(picked), *lines), tuple(warnings))


def _candidates(slices: list[Slice], source: str) -> tuple[list[list[Stack]], list[Stack], list[str]]:
    """Return all stacks as `stacks_of` gives them, those that may be picked, the likeliest scan first, and warnings.

    Raises:
        VolumeError: none may be picked.
    """
    found, warnings = stacks_of(slices)
    every = [stack for stacks in found for stack in stacks]
    stacks = _sorted(stack for stack in every if len(stack) > 1 and not stack[0].kind)
    if not stacks:  # some archives know nothing but secondary captures
        stacks = _sorted(stack for stack in every if len(stack) > 1 and stack[0].kind == SECONDARY)
    kept = {id(stack) for stack in stacks}
    left = Counter[str]()
    for stack in every:
        if id(stack) not in kept:
            left[stack[0].kind or "single image of another series, size or orientation"] += len(stack)
    counts = ", ".join(f"{count} x {kind}" for kind, count in left.most_common())
    if not stacks:
        raise _no_scan(every, counts, source)
    if counts:
        warnings.append(f"left out as not part of the scan: {counts}.")
    return found, stacks, warnings


def _sorted(stacks: Iterable[Stack]) -> list[Stack]:
    """Sort the stacks, the likeliest scan first."""
    every = list(stacks)
    reach = _reach(every)
    return sorted(every, key=lambda stack: [value for _, value in _ranked(stack, reach)])


def _ranked(stack: Stack, reach: float) -> list[tuple[str, Any]]:
    """Return the sort key of a stack, lowest first, each part with the words for why it comes first.

    What was made of other images comes later where originals `reach` over at least half as much of the body.
    """
    attributes = common_attributes(each.attributes for each in stack)
    numbers = [
        number if (number := number_of(attributes.get(name))) is not None else math.inf for name in ("series", "thickness", *ATTRIBUTES)
    ]
    return [
        ("the others were made of other images (MIP, reformat)", is_reformat(attributes) and 0 < _extent(stack) <= 2 * reach),
        ("it has the most slices", -len(stack)),
        ("of the longest it is axial", _plane(stack) != "axial"),
        ("of the longest it has the thinnest slices", numbers[1]),
        ("of the longest it has the lowest series number", numbers[0]),
        ("of equal ones its acquisition, phase or echo is the first", numbers[2:]),
        (
            "of equal ones it was taken first",
            (number_of(attributes.get("pass")) or 0, attributes.get("time", ""), min(each.number or 0 for each in stack)),
        ),
        ("of equal ones its files' names are the first", natural_key(stack[0].path)),
    ]


def _reach(stacks: Iterable[Stack]) -> float:
    return max((_extent(stack) for stack in stacks if not is_reformat(common_attributes(each.attributes for each in stack))), default=0.0)


def _extent(stack: Stack) -> float:
    """Return the volume that a stack covers, in mm^3, with pixels of 1 mm where no size is stated."""
    found, spacing = heights_of(stack), stack[0].spacing or (1.0, 1.0)
    long = len(stack) if found is None or found[1] == BY_NUMBER else float(np.ptp(found[0]))
    return long * math.prod(stack[0].size) * math.prod(spacing)


def _reason(stacks: Sequence[Stack]) -> str:
    """Say why the first stack comes before the second."""
    reach = _reach(stacks)
    pairs = zip(_ranked(stacks[0], reach), _ranked(stacks[1], reach), strict=True)
    return next((words for (words, one), (_, other) in pairs if one != other), "all are alike")


def _doubt(first: Stack, planes: Sequence[Sequence[Stack]]) -> str:
    """Say why the first stack may not be the scan: it is no more than half of what its series holds, counting all stacks and single images of
    its kind. "" for no doubt.
    """
    made = is_reformat(common_attributes(each.attributes for each in first))

    def is_sibling(stack: Stack) -> bool:
        alike = (stack[0].series, stack[0].kind) == (first[0].series, first[0].kind)
        return alike and (made or not is_reformat(common_attributes(each.attributes for each in stack)))

    siblings = [[stack for stack in stacks if is_sibling(stack)] for stacks in planes]
    siblings = [stacks for stacks in siblings if stacks]
    own = next(stacks for stacks in siblings if any(stack is first for stack in stacks))
    if 2 * len(first) <= sum(map(len, own)):
        together = [each for stack in own for each in stack]
        if by_reference(together):
            return f"one series has slices in {len(own)} frames of reference, whose positions cannot be compared"
        return _repeated(together) or f"{len(together)} slices of one series are {len(own)} stacks that lie among each other"
    if 2 * len(first) > sum(len(stack) for stacks in siblings for stack in stacks):
        return ""
    lone = sum(len(stack) == 1 for stacks in siblings for stack in stacks)
    return f"one series mixes {len(siblings)} orientations or sizes" + (f", {lone} of them in single images" if lone else "")


def _repeated(stack: Stack) -> str:
    """Say how often several slices lie at one place; "" where none do."""
    found = heights_of(stack)
    if found is None:
        return ""
    counts = np.bincount(places_of(*found))
    if counts.max() == 1:
        return ""
    times = f"a 4D series, {counts.max()} times each (phases, echoes or time points)"
    kind = times if counts.min() == counts.max() else "duplicates or several scans"
    return f"{len(stack)} slices at {len(counts)} places are no single stack but {kind}"


def _plane(stack: Stack) -> str:
    """Return the anatomical plane nearest to the slices; "" where they state none."""
    if stack[0].orientation is None:
        return ""
    row, column = np.reshape(stack[0].orientation, (2, 3))
    return PLANES[int(np.abs(np.cross(row, column)).argmax())]


def _described(stacks: Sequence[Stack]) -> list[str]:
    """Describe each stack in a line of words, with what differs between them."""
    words = [described(stack) for stack in stacks]
    planes = [_plane(stack) for stack in stacks]
    if len(set(planes)) > 1:
        words = [f"{text}, {plane}" if plane else text for text, plane in zip(words, planes, strict=True)]
    return differences([common_attributes(each.attributes for each in stack) for stack in stacks], words)


def described(stack: Stack) -> str:
    """Describe a stack's size and modality."""
    rows, columns = stack[0].size
    return f"{len(stack)} slices of {rows} x {columns}, {stack[0].modality[:16]}{', ' + stack[0].kind if stack[0].kind else ''}"


def _no_scan(stacks: Sequence[Stack], counts: str, source: str) -> VolumeError:
    kinds = {stack[0].kind for stack in stacks}
    if kinds == {COLOUR}:
        return colour(source)
    if kinds != {""}:
        return VolumeError(f"{source}: there is no scan here but {counts}; give the folder of the scan itself.")
    if len(stacks) == 1:
        rows, columns = stacks[0][0].size
        return VolumeError(f"{source}: this is a 2D image ({rows}x{columns}); give the folder with all slices of the scan.")
    orientations = "series, sizes or orientations are mixed, so no two make a stack"
    return VolumeError(f"{source}: these are {len(stacks)} single 2D images ({orientations}); give the folder with all slices of one scan.")

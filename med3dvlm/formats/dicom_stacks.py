"""Which DICOM slices make one stack, and which stack is the scan.

Slices belong to one stack if patient, study, series, modality, size, orientation (to half a degree) and pixel spacing agree, and if no
attribute of dicom_attributes.py tells them apart where they lie at one place or among each other. An attribute that merely differs from slice
to slice, or from one part of the stack to the next, splits none. Where no attribute does it, the order in which slices were taken may: one pass
through the body after the other, or all the images of one place after those of another.

Of several stacks originals come before what was made of them (MIP, reformat), then the one with the most slices comes first, then axial, then
thin slices, then the lower series number.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.base import VolumeError, colour
from med3dvlm.formats.dicom_attributes import ATTRIBUTES, OTHERS, common_marks, differences, is_reformat, number_of
from med3dvlm.formats.dicom_geometry import BY_NUMBER, heights_of, natural, places_of, uneven
from med3dvlm.formats.dicom_pixels import frames_of, picture_of, values_of
from med3dvlm.formats.dicom_slices import COLOUR, SECONDARY, Slice, Stack

SAME_DIRECTION = math.radians(0.5)
FEWEST = 3  # slices of a stack that lies among those of another
ONE_PLACE = "image at one and the same place"
PLANES = ("sagittal", "coronal", "axial")
MOST_LISTED = 20  # stacks in a message


class Choice(NamedTuple):
    """The stack that is read; a line of words for each stack that may be picked, this one's first; warnings."""

    stack: Stack
    lines: tuple[str, ...]
    warnings: tuple[str, ...]


def choose(slices: list[Slice], series: int | None, source: str) -> Choice:
    """Stack number `series` from 1, or the first of those that may be scans.

    Raises:
        VolumeError: there is none, no such number, or none is the scan beyond doubt; the message lists what may be picked.
    """
    slices, warnings = _without_copies(slices)
    found = [[stack for stack in _separated(plane)] for plane in _planes(slices)]
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
        warnings.append(f"left out as no part of the scan: {counts}.")
    if (patients := len({stack[0].series[0] for stack in stacks})) > 1:
        warnings.append(f"the scans found are of {patients} patients.")

    words = _described(stacks)
    lines = [f"{number}: {text}" for number, text in enumerate(words, start=1)]
    listed = "; ".join(lines[:MOST_LISTED]) + (f"; and so on up to {len(lines)}" if len(lines) > MOST_LISTED else "")
    if series is not None and not 1 <= series <= len(stacks):
        raise VolumeError(f"{source}: there is no series {series}; choose one of {listed}.")
    picked = 0 if series is None else series - 1
    stack = stacks[picked]
    if series is None and (doubt := _doubt(stack, found)):
        raise VolumeError(f"{source}: {doubt}; choose one with series=, of {listed}.")
    if (stack[0].position or stack[0].location) is not None and (repeated := _repeated(stack)):
        others = f", or choose another with series=, of {listed}" if len(stacks) > 1 else ""
        raise VolumeError(
            f"{source}: {repeated}, and neither an attribute (acquisition, phase, echo, kernel or the like) nor the order in which they were "
            f"taken tells them apart; export each of them as a series of its own{others}."
        )
    if series is None and len(stacks) > 1:
        warnings.append(f"of the {len(stacks)} series number 1 is taken as {_reason(stacks)}.")
    return Choice(stack, (lines.pop(picked), *lines), tuple(warnings))


def _without_copies(slices: list[Slice]) -> tuple[list[Slice], list[str]]:
    """The slices without those that are there twice, and a warning: the same SOP instance at the same place with the same pixels."""
    seen: dict[Any, Slice] = {}
    kept = []
    for each in slices:
        key = each.series, each.instance, each.frame, each.size, each.position, each.orientation, each.quantity.rescale
        other = seen.setdefault(key, each) if each.instance and each.pixels else each
        if other is each or not _same_pixels(other, each):
            kept.append(each)
    copies = len(slices) - len(kept)
    return kept, [f"{copies} images are there twice (the same SOP instance) and count once."] if copies else []


def _same_pixels(one: Slice, other: Slice) -> bool:
    try:
        return np.array_equal(_pixels(one), _pixels(other))
    except Exception:  # damaged pixels, which are told of when the stack is read
        return False


def _pixels(each: Slice) -> NDArray[Any]:
    assert each.pixels is not None, "slices of a scan have pixels"
    ((content, packed),) = frames_of(each.pixels, [each.frame])
    return values_of(picture_of(content, packed, each.pixels)[0], each.pixels, each.pixels.shift)[0]


def _planes(slices: Iterable[Slice]) -> list[Stack]:
    """The slices by series, size, orientation and pixel spacing."""
    alike: dict[Any, list[Stack]] = defaultdict(list)
    for each in slices:
        stated = each.orientation is None, each.position is None, each.spacing is None
        groups = alike[each.series, each.kind, each.modality, each.size, stated]
        # The last of them only, so that thousands of orientations take no hours.
        group = next((group for group in groups[-50:] if _same_plane(group[0], each)), None)
        if group is None:
            groups.append(group := [])
        group.append(each)
    return [group for groups in alike.values() for group in groups]


def _same_plane(one: Slice, other: Slice) -> bool:
    turned = zip(one.orientation or (), other.orientation or (), strict=True)
    scaled = zip(one.spacing or (), other.spacing or (), strict=True)
    return all(abs(a - b) < SAME_DIRECTION for a, b in turned) and all(math.isclose(a, b, rel_tol=1e-3) for a, b in scaled)


# Slices of one plane


def _separated(stack: Stack) -> Iterator[Stack]:
    """The stacks that slices of one plane are."""
    found = heights_of(stack) if len(stack) > 1 and stack[0].kind in ("", SECONDARY) else None
    if found is None:
        yield stack
        return
    heights, near = found
    places = places_of(heights, near)
    if not places.any():
        yield [each._replace(kind=ONE_PLACE) for each in stack]
        return
    parts = _parts_by_reference(stack) or _parts(stack, heights, places, near != BY_NUMBER)
    if parts is None:
        yield stack
        return
    for part in parts:
        yield from _separated(part)


def _parts_by_reference(stack: Stack) -> list[Stack] | None:
    """The slices by frame of reference: positions in several cannot be compared. None for one, and where each slice has its own."""
    parts = _by(stack, [each.marks.get("reference", "") for each in stack])
    return parts if len(parts) > 1 and min(map(len, parts)) > 1 else None


def _by(stack: Stack, labels: Iterable[Any]) -> list[Stack]:
    parts: dict[Any, Stack] = defaultdict(list)
    for each, label in zip(stack, labels, strict=True):
        parts[label].append(each)
    return list(parts.values())


def _parts(stack: Stack, heights: NDArray[np.float64], places: NDArray[np.intp], in_space: bool) -> list[Stack] | None:
    """The slices by the attribute that tells those at one place or among each other apart into the fewest parts; None for one sound stack,
    and where nothing does."""
    counts = np.bincount(places)
    excess, most = len(stack) - len(counts), int(counts.max())
    if not excess and not in_space:
        return None
    names = [*ATTRIBUTES, *OTHERS, *sorted({name for each in stack for name in each.marks} - {*ATTRIBUTES, *OTHERS})]
    if excess:

        def separates(labels: NDArray[np.intp]) -> bool:
            sizes = np.bincount(labels)
            rest = len(stack) - len(np.unique(np.stack([labels, places]), axis=1)[0])
            return 1 < len(sizes) <= 2 * most and sizes[sizes == 1].sum() <= len(stack) / 4 and rest <= excess / 10

        attributes = _attributes(stack, names, 2 * most)
        pairs = ((one * (int(other.max()) + 1) + other) for one, other in combinations(attributes, 2))
        candidates = [attributes, [np.unique(each, return_inverse=True)[1] for each in pairs]]
    else:

        def separates(labels: NDArray[np.intp]) -> bool:
            return _interleave([heights[labels == label] for label in range(int(labels.max()) + 1)], heights)

        # An MR may take every second slice first; in two times alone it is one stack.
        names = [name for name in names if name != "time" or stack[0].modality != "MR"]
        candidates = [_attributes(stack, names, len(stack) // FEWEST)]
    passes = [labels for labels in _passes(stack, heights, places) if np.bincount(labels).min() > 1 and (excess or uneven(heights))]
    best = [labels for group in (*candidates, passes) for labels in group if separates(labels)]
    if not best:
        return None
    labels = min(best, key=lambda labels: int(labels.max()))
    if any(labels is each for each in passes):
        stack = [each._replace(marks={**each.marks, "pass": str(label)}) for each, label in zip(stack, labels, strict=True)]
    return _by(stack, labels)


def _attributes(stack: Stack, names: Iterable[str], most: int) -> list[NDArray[np.intp]]:
    """For each attribute that has 2 to `most` values among the slices: their numbers (slices,)."""
    found = []
    for name in names:
        values = [each.marks.get(name, "") for each in stack]
        numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
        if 1 < len(numbers) <= most:
            found.append(np.array([numbers[value] for value in values]))
    return found


def _interleave(parts: list[NDArray[np.float64]], heights: NDArray[np.float64]) -> bool:
    """Whether slices at `heights`, one at each place, are stacks that lie among each other: some of the parts overlap, and each part is evenly
    spaced where all together are not, or all are but each part has wider distances of its own."""
    if min(map(len, parts)) < FEWEST:
        return False
    ends = sorted((part.min(), part.max()) for part in parts)
    if all(after[0] > before[1] for before, after in pairwise(ends)):
        return False
    together, alone = uneven(heights), sum(map(uneven, parts))
    if together:
        return alone < together / 2
    usual = np.median(np.diff(np.sort(heights)))
    return not alone and all(np.median(np.diff(np.sort(part))) > 1.5 * usual for part in parts)


def _passes(stack: Stack, heights: NDArray[np.float64], places: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
    """The slices by the pass in which they were taken, in the order of their numbers and in that of their times.

    A pass leads through the body in one direction; or the images of a place follow each other, as many at each, and the first ones are a pass.
    """
    numbers = [(each.number, each.frame) for each in stack]
    orders: list[Sequence[Any]] = []
    if len(set(numbers)) == len(stack) and all(each.number is not None for each in stack):
        orders.append(numbers)
    if all("time" in each.marks for each in stack):
        orders.append([(each.marks["time"], number or 0, frame) for each, (number, frame) in zip(stack, numbers, strict=True)])
    counts = np.bincount(places)
    for keys in orders:
        order = sorted(range(len(stack)), key=keys.__getitem__)
        steps = np.sign(np.diff(places[order]))
        labels, label, direction = np.zeros(len(stack), dtype=np.intp), 0, 0
        for index, step in zip(order[1:], steps, strict=True):
            if step == 0 or step * direction < 0:
                label, direction = label + 1, 0
            else:
                direction = int(step)
            labels[index] = label
        yield labels
        if np.count_nonzero(steps) == len(counts) - 1 and counts.min() == counts.max():
            labels[order] = np.arange(len(stack)) % counts.max()
            yield labels


# Which stack


def _sorted(stacks: Iterable[Stack]) -> list[Stack]:
    """The stacks, the likeliest scan first."""
    every = list(stacks)
    reach = _reach(every)
    return sorted(every, key=lambda stack: [value for _, value in _ranked(stack, reach)])


def _ranked(stack: Stack, reach: float) -> list[tuple[str, Any]]:
    """What a stack is ranked by, the lowest first, each with the words for why that comes first.

    What was made of other images comes later where originals `reach` over at least half as much of the body.
    """
    marks = common_marks(each.marks for each in stack)
    numbers = [number if (number := number_of(marks.get(name))) is not None else math.inf for name in ("series", "thickness", *ATTRIBUTES)]
    return [
        ("the others were made of other images (MIP, reformat)", is_reformat(marks) and 0 < _extent(stack) <= 2 * reach),
        ("it has the most slices", -len(stack)),
        ("of the longest it is axial", _plane(stack) != "axial"),
        ("of the longest it has the thinnest slices", numbers[1]),
        ("of the longest it has the lowest series number", numbers[0]),
        ("of equal ones its acquisition, phase or echo is the first", numbers[2:]),
        (
            "of equal ones it was taken first",
            (number_of(marks.get("pass")) or 0, marks.get("time", ""), min(each.number or 0 for each in stack)),
        ),
        ("of equal ones its files' names are the first", natural(stack[0].path)),
    ]


def _reach(stacks: Iterable[Stack]) -> float:
    return max((_extent(stack) for stack in stacks if not is_reformat(common_marks(each.marks for each in stack))), default=0.0)


def _extent(stack: Stack) -> float:
    """The volume that a stack covers, in mm^3; that of its pixels, taken as 1 mm, where nothing states more."""
    found, spacing = heights_of(stack), stack[0].spacing or (1.0, 1.0)
    long = len(stack) if found is None or found[1] == BY_NUMBER else float(np.ptp(found[0]))
    return long * math.prod(stack[0].size) * math.prod(spacing)


def _reason(stacks: Sequence[Stack]) -> str:
    """Why the first stack comes before the second."""
    reach = _reach(stacks)
    pairs = zip(_ranked(stacks[0], reach), _ranked(stacks[1], reach), strict=True)
    return next((words for (words, one), (_, other) in pairs if one != other), "all are alike")


def _doubt(first: Stack, planes: Sequence[Sequence[Stack]]) -> str:
    """What keeps the first stack from being the scan: it is no more than half of what its series holds, all stacks and single images counted
    that are of its kind. "" for nothing."""
    made = is_reformat(common_marks(each.marks for each in first))

    def is_sibling(stack: Stack) -> bool:
        alike = (stack[0].series, stack[0].kind) == (first[0].series, first[0].kind)
        return alike and (made or not is_reformat(common_marks(each.marks for each in stack)))

    siblings = [[stack for stack in stacks if is_sibling(stack)] for stacks in planes]
    siblings = [stacks for stacks in siblings if stacks]
    own = next(stacks for stacks in siblings if any(stack is first for stack in stacks))
    if 2 * len(first) <= sum(map(len, own)):
        together = [each for stack in own for each in stack]
        return _repeated(together) or f"{len(together)} slices of one series are {len(own)} stacks that lie among each other or apart"
    if 2 * len(first) > sum(len(stack) for stacks in siblings for stack in stacks):
        return ""
    lone = sum(len(stack) == 1 for stacks in siblings for stack in stacks)
    return f"one series mixes {len(siblings)} orientations or sizes" + (f", {lone} of them in single images" if lone else "")


def _repeated(stack: Stack) -> str:
    """How often several slices lie at one place, in words; "" where none do."""
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
    """The anatomical plane nearest to the slices; "" where they state none."""
    if stack[0].orientation is None:
        return ""
    row, column = np.reshape(stack[0].orientation, (2, 3))
    return PLANES[int(np.abs(np.cross(row, column)).argmax())]


def _described(stacks: Sequence[Stack]) -> list[str]:
    """A line of words for each stack; what differs stands in it."""
    words = [described(stack) for stack in stacks]
    planes = [_plane(stack) for stack in stacks]
    if len(set(planes)) > 1:
        words = [f"{text}, {plane}" if plane else text for text, plane in zip(words, planes, strict=True)]
    return differences([common_marks(each.marks for each in stack) for stack in stacks], words)


def described(stack: Stack) -> str:
    """A stack's size and modality in words."""
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

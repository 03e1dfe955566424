"""Group DICOM slices into stacks.

Slices belong to one stack if patient, study, series, modality, size, orientation (to half a degree) and pixel spacing agree, and if no
attribute of dicom_attributes.py tells them apart where they lie at one place or among each other. An attribute that merely differs from slice
to slice, or from one part of the stack to the next, splits none. Where no attribute does it, the order in which slices were taken may: one pass
through the body after the other, or all the images of one place after those of another.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.dicom_attributes import ATTRIBUTES, OTHERS
from med3dvlm.formats.dicom_geometry import BY_NUMBER, heights_of, places_of, uneven
from med3dvlm.formats.dicom_pixels import frames_of, picture_of, values_of
from med3dvlm.formats.dicom_slices import SECONDARY, Slice, Stack

SAME_DIRECTION = math.radians(0.5)
MIN_SLICES = 3  # of a stack that is interleaved with another
ONE_PLACE = "image at one and the same place"


def stacks_of(slices: list[Slice]) -> tuple[list[list[Stack]], list[str]]:
    """Return the stacks, single images too, those of one series, size and orientation together; and warnings."""
    slices, warnings = _without_copies(slices)
    return [[*_separated(plane)] for plane in _planes(slices)], warnings


def _without_copies(slices: list[Slice]) -> tuple[list[Slice], list[str]]:
    """Remove slices that occur twice (the same SOP instance at the same place with the same pixels), with a warning."""
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
    except Exception:  # damaged pixels, which are an error when the stack is read
        return False


def _pixels(each: Slice) -> NDArray[Any]:
    assert each.pixels is not None, "slices of a scan have pixels"
    ((content, packed),) = frames_of(each.pixels, [each.frame])
    return values_of(picture_of(content, packed, each.pixels)[0], each.pixels, each.pixels.shift)[0]


def _planes(slices: Iterable[Slice]) -> list[Stack]:
    """Group the slices by series, size, orientation and pixel spacing."""
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


def _separated(stack: Stack) -> Iterator[Stack]:
    """Split slices of one plane into stacks."""
    found = heights_of(stack) if len(stack) > 1 and stack[0].kind in ("", SECONDARY) else None
    if found is None:
        yield stack
        return
    heights, near = found
    places = places_of(heights, near)
    if not places.any():
        yield [each._replace(kind=ONE_PLACE) for each in stack]
        return
    parts = by_reference(stack) or _parts(stack, heights, places, near != BY_NUMBER)
    if parts is None:
        yield stack
        return
    for part in parts:
        yield from _separated(part)


def by_reference(stack: Stack) -> list[Stack] | None:
    """Group the slices by frame of reference: positions in several cannot be compared. None for one, and where each slice has its own."""
    parts = _by(stack, [each.attributes.get("reference", "") for each in stack])
    return parts if len(parts) > 1 and min(map(len, parts)) > 1 else None


def _by(stack: Stack, labels: Iterable[Any]) -> list[Stack]:
    parts: dict[Any, Stack] = defaultdict(list)
    for each, label in zip(stack, labels, strict=True):
        parts[label].append(each)
    return list(parts.values())


def _parts(stack: Stack, heights: NDArray[np.float64], places: NDArray[np.intp], in_space: bool) -> list[Stack] | None:
    """Split the slices by the attribute, the two attributes or the passes that separate overlapping slices into the fewest parts.

    None for one sound stack, and where nothing tells them apart.
    """
    counts = np.bincount(places)
    excess, most = len(stack) - len(counts), int(counts.max())
    if not excess and not in_space:
        return None
    passes = [*_passes(stack, heights, places)]
    if excess:

        def separates(labels: NDArray[np.intp]) -> bool:
            sizes = np.bincount(labels)
            rest = len(stack) - len(np.unique(np.stack([labels, places]), axis=1)[0])
            return 1 < len(sizes) <= 2 * most and sizes[sizes == 1].sum() <= len(stack) / 4 and rest <= excess / 10

        attributes = _attributes(stack, 2 * most)
        pairs = ((one * (int(other.max()) + 1) + other) for one, other in combinations(attributes, 2))
        candidates = [*attributes, *(np.unique(each, return_inverse=True)[1] for each in pairs)]
    else:
        even, in_one_pass = not uneven(heights), any(not labels.any() for labels in passes)
        if even and in_one_pass:
            return None

        def separates(labels: NDArray[np.intp]) -> bool:
            return _interleave([heights[labels == label] for label in range(int(labels.max()) + 1)], heights, in_one_pass)

        candidates = _attributes(stack, len(stack) // MIN_SLICES)
        if even and stack[0].modality != "CT":  # an MR may take every second slice first
            passes = []
    best = [labels for labels in (*candidates, *(each for each in passes if np.bincount(each).min() > 1)) if separates(labels)]
    if not best:
        return None
    labels = min(best, key=lambda labels: int(labels.max()))
    if any(labels is each for each in passes):
        stack = [each._replace(attributes={**each.attributes, "pass": str(label)}) for each, label in zip(stack, labels, strict=True)]
    return _by(stack, labels)


def _attributes(stack: Stack, most: int) -> list[NDArray[np.intp]]:
    """Return for each attribute with 2 to `most` values among the slices the slices' value numbers (slices,)."""
    names = [*ATTRIBUTES, *OTHERS, *sorted({name for each in stack for name in each.attributes} - {*ATTRIBUTES, *OTHERS})]
    found = []
    for name in names:
        values = [each.attributes.get(name, "") for each in stack]
        numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
        if 1 < len(numbers) <= most:
            found.append(np.array([numbers[value] for value in values]))
    return found


def _interleave(parts: list[NDArray[np.float64]], heights: NDArray[np.float64], in_one_pass: bool) -> bool:
    """Return whether slices at `heights`, one at each place, are interleaved stacks: some of the parts overlap, and their distances change
    less often than those of all together, by more than a missing slice does; or never, and are wider, unless all were taken in one pass.
    """
    if min(map(len, parts)) < MIN_SLICES:
        return False
    ends = sorted((part.min(), part.max()) for part in parts)
    if all(after[0] > before[1] for before, after in pairwise(ends)):
        return False
    together, alone = uneven(heights), sum(map(uneven, parts))
    if together - alone > 2 and alone < together / 2:
        return True
    nearest = np.diff(np.sort(heights)).min()
    return not alone and not in_one_pass and all(np.diff(np.sort(part)).min() > 1.5 * nearest for part in parts)


def _passes(stack: Stack, heights: NDArray[np.float64], places: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
    """Group the slices by the pass in which they were taken, in the order of their numbers and of their times.

    A pass leads through the body in one direction; or the images of a place follow each other, as many at each, and the first ones are a pass.
    """
    numbers = [(each.number, each.frame) for each in stack]
    orders: list[Sequence[Any]] = []
    if len(set(numbers)) == len(stack) and all(each.number is not None for each in stack):
        orders.append(numbers)
    if all("time" in each.attributes for each in stack):
        orders.append([(each.attributes["time"], number or 0, frame) for each, (number, frame) in zip(stack, numbers, strict=True)])
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
        if counts.max() > 1 and np.count_nonzero(steps) == len(counts) - 1 and counts.min() == counts.max():
            labels = np.zeros(len(stack), dtype=np.intp)
            labels[order] = np.arange(len(stack)) % counts.max()
            yield labels

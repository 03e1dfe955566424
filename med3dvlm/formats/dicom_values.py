"""Decode the pixels of a stack of DICOM slices with several threads, in the stack's order, and convert them to the quantity of their header."""

import math
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from med3dvlm.formats.base import MAX_VOXELS, VolumeError
from med3dvlm.formats.dicom_choice import described
from med3dvlm.formats.dicom_elements import reason, unusable
from med3dvlm.formats.dicom_pixels import frames_of, picture_of, values_of
from med3dvlm.formats.dicom_slices import Slice, Stack

MAX_THREADS = 8
CLEARLY = 3  # times as far from the neighbouring slice, by three of four voxels: sure evidence

Input = TypeVar("Input")
Output = TypeVar("Output")
Rescale = tuple[float, float]
Decoded = tuple[int, NDArray[Any] | None, str, Exception | None]  # place in the stack, numbers, a note, what was raised


def decoded(stack: Stack, source: str, warnings: list[str]) -> list[NDArray[Any]]:
    """Return the stored values of each slice (H, W), in the stack's order; adds to `warnings`.

    Raises:
        VolumeError: slices are damaged or cannot be read, or there are too many voxels.
    """
    if len(stack) * math.prod(stack[0].size) > MAX_VOXELS:
        raise VolumeError(f"{source}: {described(stack)} are more than the {MAX_VOXELS} voxels that are read; crop or resample the scan.")
    found: dict[int, NDArray[Any]] = {}
    notes, problems = set[str](), Counter[tuple[str, str]]()
    for place, picture, note, error in in_order(partial(_decoded, stack), _read(stack)):
        if picture is None:
            problems[reason(error or EOFError())] += 1
        else:
            found[place] = picture
        notes |= {note} - {""}
    if missing := len(stack) - len(found) - problems.total():
        problems[reason(EOFError())] += missing
    if problems.total():
        raise unusable(problems, source)

    pictures = [found.pop(place) for place in range(len(stack))]
    shifted = [place for place, each in enumerate(stack) if each.pixels and each.pixels.shift]
    low = bool(shifted) and all(int(pictures[place].max()) < 2 ** _packing(stack[place]).bits for place in shifted)
    if low:
        notes.add("the header says that the lowest bits of the pixels do not count (HighBit), yet no other ones are used; all are taken.")
    changed = 0
    for place, (values, dirty) in enumerate(in_order(partial(_stored, stack, pictures, low), range(len(stack)))):
        pictures[place], changed = values, changed + dirty
    if changed:
        notes.add(f"bits that do not count (BitsStored) hold something in {changed} slices, such as an overlay; they are left out.")
    warnings += sorted(notes)
    return pictures


def _packing(each: Slice) -> Any:
    assert each.pixels is not None, "slices of a scan have pixels"
    return each.pixels


def _read(stack: Stack) -> Iterator[tuple[int, bytes, bool, Exception | None]]:
    """Yield place in the stack, bytes and whether they are compressed, file by file; or the exception for a place."""
    wanted: dict[Any, list[int]] = defaultdict(list)  # places in the stack, by file
    for place, each in enumerate(stack):
        wanted[each.path].append(place)
    for places in wanted.values():
        places.sort(key=lambda place: stack[place].frame)
        read = 0
        try:
            for content, packed in frames_of(_packing(stack[places[0]]), [stack[place].frame for place in places]):
                yield places[read], content, packed, None
                read += 1
        except Exception as error:
            for place in places[read:]:
                yield place, b"", False, error


def _decoded(stack: Stack, read: tuple[int, bytes, bool, Exception | None]) -> Decoded:
    place, content, packed, error = read
    if error is not None:
        return place, None, "", error
    try:
        return place, *picture_of(content, packed, _packing(stack[place])), None
    except Exception as raised:  # counted; the commonest is reported
        return place, None, "", raised


def _stored(stack: Stack, pictures: list[NDArray[Any]], low: bool, place: int) -> tuple[NDArray[Any], bool]:
    packing = _packing(stack[place])
    return values_of(pictures[place], packing, 0 if low else packing.shift)


def threads() -> int:
    """Return the number of processors of this process, at most `MAX_THREADS`."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def in_order(function: Callable[[Input], Output], inputs: Iterable[Input]) -> Iterator[Output]:
    """Map a function over inputs in several threads, in order, reading few inputs ahead."""
    count = threads()
    if count == 1:
        yield from map(function, inputs)
        return
    with ThreadPoolExecutor(count) as pool:
        waiting: deque[Future[Output]] = deque()
        for each in inputs:
            waiting.append(pool.submit(function, each))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Range(NamedTuple):
    """The lowest and highest rescaled value of a slice without its padding, infinite where there is none, and the padding's size."""

    low: float
    high: float
    padded: int


def rescaled(stored: list[NDArray[Any]], stack: Stack, rescales: list[Rescale], warnings: list[str]) -> NDArray[Any]:
    """Apply slope and intercept, or the table, of each slice to its stored values: (D, H, W), int16 where that loses nothing, else float32."""
    places = range(len(stack))
    ranges = [*in_order(lambda place: _range(stored[place], stack[place], rescales[place]), places)]
    lowest, highest = min(each.low for each in ranges), max(each.high for each in ranges)
    whole = all(number.is_integer() and abs(number) < 2**31 for rescale in rescales for number in rescale)
    exact = whole and all(picture.dtype.kind in "iu" for picture in stored) and -32768 <= lowest <= highest <= 32767
    array = np.empty((len(stored), *stored[0].shape), np.int16 if exact else np.float32)

    def bring(place: int) -> tuple[int, float]:
        """Rescale a slice. Returns how many voxels of padding were replaced, and their values."""
        picture, (slope, intercept) = _through_table(stored[place], stack[place]), rescales[place]
        stored[place] = picture[:0]  # its memory is free
        if exact and not ranges[place].padded:  # whole numbers of 16 bits come out right, whatever is carried beyond them in between
            values = picture if slope == 1 and picture.itemsize == 2 else picture.astype(np.int16)
            if slope != 1:
                values *= np.int64(slope).astype(np.int16)
            np.add(values, np.int64(intercept).astype(values.dtype), out=array[place], casting="unsafe", dtype=values.dtype)
            return 0, 0.0
        values, example, count = picture * np.float64(slope) + intercept, 0.0, 0
        padding = _padding(picture, stack[place])
        if padding is not None and lowest <= highest:
            beyond = padding & ((values < lowest) | (values > highest))
            if count := int(beyond.sum()):
                example, values[beyond] = float(values[beyond][0]), lowest
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and that is refused later
            array[place] = values
        return count, example

    replaced = [each for each in in_order(bring, places) if each[0]]
    if replaced:
        warnings.append(
            f"{sum(count for count, _ in replaced)} voxels are padding ({replaced[0][1]:g}), beyond the image's own values; "
            f"they are set to its lowest, {lowest:g}."
        )
    return array


def _range(picture: NDArray[Any], each: Slice, rescale: Rescale) -> Range:
    padding = _padding(picture, each)
    real = _through_table(picture if padding is None or not padding.any() else picture[~padding], each)
    if not real.size:
        return Range(math.inf, -math.inf, picture.size)
    ends = [rescale[0] * float(real.min()) + rescale[1], rescale[0] * float(real.max()) + rescale[1]]
    return Range(min(ends), max(ends), picture.size - real.size)


def _padding(picture: NDArray[Any], header: Slice) -> NDArray[np.bool_] | None:
    """Return where the stored values (H, W) stand for "no image here"."""
    return None if header.padding is None else (picture >= header.padding[0]) & (picture <= header.padding[1])


def _through_table(picture: NDArray[Any], each: Slice) -> NDArray[Any]:
    """Return the values that a Modality LUT has for the stored ones."""
    table = each.quantity.table
    if table is None:
        return picture
    places = np.clip(picture.astype(np.int64) - table.first, 0, len(table.values) - 1)
    values: NDArray[Any] = table.values[places]
    return values


def rescales_of(stored: list[NDArray[Any]], stack: Stack, source: str, warnings: list[str]) -> list[Rescale]:
    """Return slope and intercept of each slice, (1, 0) where no header states any.

    Where only some state them, the neighbouring slices show whether they hold for the others, too: for all of these or for none, and
    those that show nothing, such as slices of air alone, follow the rest.

    Raises:
        VolumeError: they do not show it.
    """
    found = [each.quantity.rescale for each in stack]
    known = [place for place, rescale in enumerate(found) if rescale is not None]
    missing = [place for place, rescale in enumerate(found) if rescale is None and stack[place].quantity.table is None]
    if not missing or all(found[place] == (1, 0) for place in known):
        return [rescale or (1.0, 0.0) for rescale in found]
    others: dict[int, Rescale] = {}
    shown = set[bool]()
    for place in missing:
        nearest = min(known, key=lambda other: abs(other - place))
        slope, intercept = others[place] = found[nearest] or (1.0, 0.0)
        own, neighbour = (stored[each].astype(np.float64) for each in (place, nearest))
        without, within = (
            float(np.quantile(np.abs(values - slope * neighbour - intercept), 0.75)) for values in (own, slope * own + intercept)
        )
        shown |= {within < without} if CLEARLY * min(without, within) < max(without, within) else set()
    if len(shown) != 1:
        raise VolumeError(
            f"{source}: {len(missing)} of {len(stack)} slices state no RescaleSlope and RescaleIntercept, and the neighbouring slices do not "
            "show whether those of the others hold for them, too; export the series again."
        )
    applied = shown.pop()
    how = "those of the others are applied" if applied else "their values are left as they are stored"
    warnings.append(
        f"{len(missing)} of {len(stack)} slices state no RescaleSlope and RescaleIntercept; {how}, as the neighbouring slices show."
    )
    return [rescale or (others[place] if applied and place in others else (1.0, 0.0)) for place, rescale in enumerate(found)]

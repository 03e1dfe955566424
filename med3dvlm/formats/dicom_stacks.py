"""Which DICOM slices make one stack, and which stack is the scan.

Slices belong to one stack if patient, series, modality, size, orientation and pixel spacing agree; the largest stack is the scan.
"""

import math
from collections import Counter, defaultdict
from typing import Any

from med3dvlm.formats.base import VolumeError, colour
from med3dvlm.formats.dicom_slices import COLOUR, SECONDARY, Slice

Stack = list[Slice]


def stacks_of(slices: list[Slice], source: str, warnings: list[str]) -> list[Stack]:
    """The stacks that may be scans, the largest first; what is left out goes into `warnings`.

    Raises:
        VolumeError: there is none.
    """
    alike: dict[Any, list[Stack]] = defaultdict(list)
    for each in slices:
        stated = each.orientation is None, each.position is None, each.spacing is None
        groups = alike[each.series, each.kind, each.modality, each.size, stated]
        # The last of them only, so that thousands of orientations take no hours.
        group = next((group for group in groups[-50:] if _same_plane(group[0], each)), None)
        if group is None:
            groups.append(group := [])
        group.append(each)
    stacks = sorted((group for groups in alike.values() for group in groups), key=lambda group: (-len(group), group[0].series))
    kept = [stack for stack in stacks if len(stack) > 1 and not stack[0].kind]
    if not kept:  # some archives know nothing but secondary captures
        kept = [stack for stack in stacks if len(stack) > 1 and stack[0].kind == SECONDARY]
    left = Counter[str]()
    for stack in stacks:
        if not any(stack is each for each in kept):
            left[stack[0].kind or "single image of another series, size or orientation"] += len(stack)
    counts = ", ".join(f"{count} x {kind}" for kind, count in left.most_common())
    if not kept:
        raise _no_scan(stacks, counts, source)
    if counts:
        warnings.append(f"left out as no part of the scan: {counts}.")
    if (patients := len({stack[0].series[0] for stack in kept})) > 1:
        warnings.append(f"the scans found are of {patients} patients.")
    return kept


def _same_plane(one: Slice, other: Slice) -> bool:
    """Whether orientation and pixel spacing agree to 0.001."""
    pairs = zip((one.orientation or ()) + (one.spacing or ()), (other.orientation or ()) + (other.spacing or ()), strict=True)
    return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3) for a, b in pairs)


def _no_scan(stacks: list[Stack], counts: str, source: str) -> VolumeError:
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


def chosen(stacks: list[Stack], series: int | None, source: str) -> Stack:
    """Number `series` from 1, or the first.

    Raises:
        VolumeError: there is no such number, or the first is a small part of a series that mixes orientations.
    """
    listed = "; ".join(f"{number}: {described(stack)}" for number, stack in enumerate(stacks, start=1))
    if series is not None and not 1 <= series <= len(stacks):
        raise VolumeError(f"{source}: there is no series {series}; choose one of {listed}.")
    if series is not None:
        return stacks[series - 1]
    siblings = [stack for stack in stacks if stack[0].series == stacks[0][0].series and stack[0].orientation is not None]
    if siblings and 2 * len(stacks[0]) <= sum(map(len, siblings)):
        raise VolumeError(f"{source}: one series mixes {len(siblings)} orientations or sizes; choose one with series=, of {listed}.")
    return stacks[0]


def described(stack: Stack) -> str:
    rows, columns = stack[0].size
    return f"{len(stack)} slices of {rows} x {columns}, {stack[0].modality[:16]}{', ' + stack[0].kind if stack[0].kind else ''}"

"""Judge the scale of a scan's values by their distribution, never by a single value.

A CT in Hounsfield units has air near -1000, soft tissue near 0 and bone above it. Masked, cut off or padded scans have a *filling*
besides: one value that most of the rest is set to. It lies outside the tissue and says nothing.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

AIR, DENSEST = -1100, 4000  # HU; nearly all of a CT lies between
LIGHTEST = -900  # HU; air lies between AIR and this
AIRLESS = 1e-4  # a smaller share of air is none
TISSUE = -200  # HU; only fat's edges, lung and air lie below, and soft tissue between this and its opposite
UNRESCALED = (700, 1300)  # where soft tissue lies before 1024 is subtracted, and in HU nothing but bone
SUNK = (-1150, -850)  # where soft tissue lies after 1024 is subtracted once too often
FILLED = 0.1  # a value that so many voxels have is a filling, not noise
SAMPLE = 2**20  # voxels that shares are counted in
WRAPPED = (8192, 57344)  # numbers of 16 bits: no scan has as dense a voxel as the first; as unsigned, HU below 0 lie above the second
SCALES = {  # other scales of stored HU, with slope and intercept to convert them back
    "HU + 1024": (1, -1024),
    "HU + 8192": (1, -8192),
    "HU + 32768": (1, -32768),
    "HU - 1024": (1, 1024),
    "10 x HU": (0.1, 0),
    "10 x (HU + 1024)": (0.1, -1024),
    "HU / 10, percent of water": (10, 0),
    "HU / 100": (100, 0),
    "HU / 1000": (1000, 0),
    "attenuation with water at 1": (1000, -1000),
    "attenuation with water at 100": (10, -1000),
}


class Spread:
    """The distribution of an array's values: their ends, counted over all, and shares, counted over about a million evenly spread."""

    def __init__(self, array: NDArray[Any]):
        self.array, self.low, self.high = array, float(array.min()), float(array.max())

    def __str__(self) -> str:
        return f"they reach from {self.low:g} to {self.high:g}, {self.within:.0%} of them within {AIR}..{DENSEST} or padding"

    @cached_property
    def sample(self) -> NDArray[Any]:
        """Return about a million values; the odd step avoids rows of an even length."""
        sample: NDArray[Any] = self.array.reshape(-1)[:: self.array.size // SAMPLE | 1].astype(np.float64)
        return sample

    @cached_property
    def above(self) -> NDArray[Any]:
        """Return the values that are neither padding nor cut off: the sample above the lowest value, or that value where there is nothing
        above.
        """
        above: NDArray[Any] = self.sample[self.sample > self.low]
        return above if above.size else self.sample

    @cached_property
    def filling(self) -> float | None:
        """Return the commonest value, where at least one voxel in ten has it; else None."""
        if self.array.dtype == np.int16:  # counting is quicker than sorting
            counts = np.bincount((self.sample - self.low).astype(np.intp))
            commonest = self.low + int(counts.argmax())
        else:
            values, counts = np.unique(self.sample, return_counts=True)
            commonest = float(values[counts.argmax()])
        return commonest if counts.max() >= FILLED * self.sample.size else None

    @cached_property
    def within(self) -> float:
        """Return the share of voxels in the range of a CT, padding included."""
        return _share((self.sample >= AIR) & (self.sample <= DENSEST) | (self.sample == self.low))

    @cached_property
    def has_air(self) -> bool:
        return _between(self.sample, AIR, LIGHTEST) >= AIRLESS

    @cached_property
    def airy(self) -> float:
        """Return the share of air, lung and their edges in the values above the lowest."""
        return _between(self.above, AIR, TISSUE)

    @cached_property
    def looks_unrescaled(self) -> bool:
        """Return whether soft tissue lies near 1000 and no air near -1000."""
        return self.airy <= 0.001 and _between(self.above, *UNRESCALED) > 0.1

    @cached_property
    def looks_like_hu(self) -> bool:
        """Return whether values lie in the range of a CT, with air among them or cut off above it, and not as before rescaling."""
        cut_off = AIR <= self.low <= TISSUE and _share(self.sample == self.low) >= 0.01  # as by a window
        return (self.has_air or cut_off) and self.within >= 0.99 and not self.looks_unrescaled

    @cached_property
    def impossible(self) -> str | None:
        """Say why the values cannot be HU; None where they may be."""
        if self.low < -32768 or self.high > 32767:
            return f"they are {self.low:g} to {self.high:g}, beyond what 16 bits hold"
        if self.low >= 0 and self.high <= 1:
            return "they lie within 0..1, so they were scaled"
        if self.low > 0:
            return f"the lowest is {self.low:g}, so there is no air, fat or water"
        if self.looks_unrescaled:
            return "soft tissue seems to lie near 1000 and there is no air near -1000, so they are un-rescaled"
        if self.within < 0.9:
            return f"only {self.within:.0%} lie within {AIR}..{DENSEST}, so they were rescaled twice or not at all"
        return None

    @cached_property
    def looks_sunk(self) -> bool:
        """Return whether soft tissue seems to lie where air does, as in a body whose air was masked or cropped away when 1024 is subtracted
        from HU. A thin limb in padding may look the same.
        """
        filling = self.filling if self.filling is not None and self.filling < TISSUE else None
        body = self.above if filling is None else self.above[self.above != filling]
        least = 0.1 if 1 - body.size / self.sample.size >= FILLED else 0.005  # without a filling, the air may be real
        return _between(body, *SUNK) >= 0.5 and _between(body, TISSUE, -TISSUE) < least

    def sinks(self, slope: float, intercept: float) -> bool:
        """Return whether rescaling would turn soft tissue into air: for a body in HU alone, on 0 or cut off, which does not show that it is
        HU.
        """
        return _share(slope * self.above + intercept < TISSUE) > 0.99 and _between(self.above, TISSUE, -TISSUE) > 0.5

    @cached_property
    def scale(self) -> str | None:
        """Return the name in `SCALES` of the scale on which the values would be HU with both air and soft tissue; None where none fits."""
        return next((name for name, rescale in SCALES.items() if self._is_ct(*rescale)), None)

    def _is_ct(self, slope: float, intercept: float) -> bool:
        """Return whether rescaled values are a CT's: peaks of air and of soft tissue, less bone, nearly nothing beyond."""
        values = slope * self.sample + intercept
        air, valley, soft = _between(values, AIR, LIGHTEST), _between(values, -700, -300), _between(values, TISSUE, -TISSUE)
        within = (values >= AIR) & (values <= DENSEST) | (self.sample == self.low)
        return min(air, soft) >= 0.05 and soft >= 2 * valley and soft >= 0.5 * _between(values, TISSUE, DENSEST) and _share(within) >= 0.99

    def unwrapped(self, rescale: Sequence[float] | None) -> NDArray[Any] | None:
        """Subtract 65536 from negative 16-bit numbers that were read as unsigned.

        `rescale`: the slope and intercept that are in the values. None where this is not surely what happened.
        """
        slope, intercept = rescale or (1.0, 0.0)
        if slope != 1 or self.low < intercept or self.high <= WRAPPED[1] + intercept or self.high > 65535 + intercept:
            return None
        if _between(self.sample, WRAPPED[0] + intercept, WRAPPED[1] + intercept) > 0:
            return None
        array = np.where(self.array > WRAPPED[1] + intercept, self.array - np.float32(65536), self.array)
        return array if Spread(array).looks_like_hu else None


def _share(chosen: NDArray[np.bool_]) -> float:
    return float(chosen.mean()) if chosen.size else 0.0


def _between(values: NDArray[Any], low: float, high: float) -> float:
    """Return the share of values from `low` to `high`."""
    return _share((values >= low) & (values <= high))


def looks_like_labels(array: NDArray[Any]) -> bool:
    """Return whether this is most likely a segmentation: whole numbers within 0..255, at most 16 of them, or else nine in ten voxels above 0
    equal to the next in their row, which the noise in a scan prevents.

    A doubt, no refusal: a scan in coarse grey levels, or one that a program drew, has such numbers too.
    """
    if array.dtype != np.int16 or array.min() < 0 or array.max() > 255:
        return False
    counts = sum(np.bincount(picture.reshape(-1), minlength=256) for picture in array)
    if np.count_nonzero(counts) <= 16:
        return True
    left, right = array[..., :-1], array[..., 1:]
    inside = left > 0
    return bool((inside & (left == right)).sum() >= 0.9 * inside.sum() > 0)

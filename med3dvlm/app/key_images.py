"""Key images: slices marked in the viewer that are saved with the report."""

import io

import numpy as np

from med3dvlm.app.scans import OpenScan
from med3dvlm.geometry.orientation import for_screen
from med3dvlm.plots.slices import draw_slice, take_slice
from med3dvlm.reports.draft import KeyImage

PLANES = ("axial", "coronal", "sagittal")  # that cut the display axes z, y, x
MAX_KEY_IMAGES = 20  # in a report
LONGER_SIDE = 1024  # pixels of a picture


def key_image(scan: OpenScan, plane: str, index: int, window: tuple[float, float]) -> KeyImage:
    """Draw slice `index` (from 0, in the viewer's order) of a plane; window[0] is black, window[1] white.

    Raises:
        ValueError: there is no such plane, slice or window; one sentence.
    """
    if plane not in PLANES:
        raise ValueError(f"There is no plane {str(plane)[:20]!r}; there are {', '.join(PLANES)}.")
    cut, picture = PLANES.index(plane), scan.picture
    count = picture.stored.shape[cut]
    if not 0 <= index < count:
        raise ValueError(f"There is no slice {index + 1}; the {plane} plane has {count}.")
    low, high = window
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"The window is {low:g} to {high:g} but its lowest value must be below its highest.")
    facts = picture.facts
    stored, pixel = take_slice(picture.stored, cut, index, facts["spacing"], None)
    values = facts["slope"] * stored.astype(np.float64) + facts["intercept"]
    buffer = io.BytesIO()
    draw_slice(values, (low, high), pixel, LONGER_SIDE).save(buffer, "png")
    order, flips = for_screen(scan.volume.orientation)
    place = None
    if order[cut] == 0 and scan.as_filed:
        place = index if flips[cut].step == 1 else count - 1 - index
    name, unit = facts["names"][plane], f" {facts['unit']}".rstrip()
    label = f"{name}, slice {index + 1} of {count}, window {low:g} to {high:g}{unit}"
    return KeyImage(label, buffer.getvalue(), place)

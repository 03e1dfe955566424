"""Choose the series of a DICOM study that are read.

thin-axial   of each study one: of the axial series made of no other images, that cover at least half as much of the body as the
             largest of them, the one with the thinnest slices; of equal ones the one with the most slices, then the first. Where
             none is axial, the one that `read_volume` takes.
all          every series, each a case of its own
"""

from collections.abc import Sequence
from math import inf

from med3dvlm.formats.dicom import Series


def chosen(series: Sequence[Series], rule: str) -> list[Series]:
    """Return the series that are read, of all studies in one place."""
    if rule == "all":
        return list(series)
    studies = dict.fromkeys(one.study for one in series)
    return [_thin_axial([one for one in series if one.study == study]) for study in studies]


def _thin_axial(series: Sequence[Series]) -> Series:
    axial = [one for one in series if one.plane == "axial" and not one.derived and not one.doubt]
    if not axial:
        return series[0]
    largest = max(one.extent for one in axial)
    large = [one for one in axial if 2 * one.extent >= largest]
    return min(large, key=lambda one: (inf if one.thickness is None else one.thickness, -one.slices, one.number))

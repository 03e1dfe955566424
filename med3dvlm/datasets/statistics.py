"""Statistics of a preparation: the numbers of summary.json."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from med3dvlm.preprocessing import VolumeProcessor

BINS = 50  # of a volume's histogram
NUMBERS = re.compile(r"-?\d[\d.]*(?:(?:, | x )-?\d[\d.]*)*")
SERIES = re.compile(r"\(#: .*\)")


def statistics(index: Sequence[dict[str, Any]], processor: VolumeProcessor) -> dict[str, Any]:
    """Return least, median and greatest shape (D, H, W) and spacing (z, y, x), the commonest shapes, orientations, units, kinds of warnings,
    and how many scans have which mask.
    """
    spacings = [line["spacing"] for line in index if line["spacing"] is not None]
    masks = _counted(name for line in index for name, mask in line.get("masks", {}).items() if mask["voxels"])
    return {
        "recipe": processor.recipe,
        "size": list(processor.size),
        "dtype": str(processor.stored_dtype).removeprefix("torch."),
        "shapes": _spread([line["shape"] for line in index]),
        "spacings": _spread(spacings) | {"unknown": len(index) - len(spacings)},
        "orientations": _counted(line["orientation"] or "unknown" for line in index),
        "units": _counted(line["unit"] for line in index),
        "warnings": _counted(kind for line in index for kind in {kind_of(warning) for warning in line["warnings"]}),
        **({"masks": masks} if masks else {}),
    }


def kind_of(warning: str) -> str:
    """Return the warning without its numbers and without a list of series: "there are # series (...); number # is read, ..."."""
    return SERIES.sub("(...)", NUMBERS.sub("#", warning))


def _spread(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    if not rows:
        return {}
    quantiles = np.percentile(np.asarray(rows), (0, 5, 50, 95, 100), axis=0).round(4).tolist()
    return dict(zip(("least", "5 %", "median", "95 %", "greatest"), quantiles, strict=True))


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))

"""Draw a body in Hounsfield units: chest or abdomen, a contrast phase, findings, any acquisition plane and spacing."""

import numpy as np
from numpy.typing import NDArray

from med3dvlm.datasets.phantom.abdomen import draw_abdomen
from med3dvlm.datasets.phantom.body import Body, Build
from med3dvlm.datasets.phantom.canvas import HIGHEST, LOWEST, Acquisition, Canvas, empty_canvas
from med3dvlm.datasets.phantom.chest import draw_chest

REGIONS = {"chest": draw_chest, "abdomen": draw_abdomen}
ENLARGED = {"cardiomegaly": "heart", "splenomegaly": "spleen"}  # findings that are no more than an organ of another size


def draw(body: Body, acquisition: Acquisition) -> Canvas:
    """Return the scan of a body, see `draw_with_masks`."""
    return draw_with_masks(body, acquisition)[0]


def draw_with_masks(body: Body, acquisition: Acquisition) -> tuple[Canvas, dict[str, NDArray[np.bool_]]]:
    """Scan a body; the array holds whole HU in [LOWEST, HIGHEST]. With it a mask (D, H, W) of each finding, by kind: the voxels in which the scan
    differs from one without the finding, as if those drawn later were not there, or the whole organ where that is enlarged.

    Rows and columns follow the display convention of the nearest plane (see `med3dvlm.preprocessing`), whatever the voxel sizes.
    """
    scanner = np.random.default_rng(acquisition.seed)
    canvas = empty_canvas(acquisition, scanner)
    anatomy = np.random.default_rng(body.seed)
    build = Build(
        size=anatomy.uniform(0.94, 1.06, 3),
        shift=anatomy.uniform(-5, 5, (16, 3)),
        findings={finding.kind: finding for finding in body.findings},
        random=anatomy,
        phase=acquisition.phase,
    )
    REGIONS[body.region](canvas, build)
    masks = canvas.finding_masks()
    masks |= {kind: canvas.structures()[organ] for kind, organ in ENLARGED.items() if kind in build.findings}
    noise = scanner.standard_normal(canvas.array.shape, dtype=np.float32) * np.float32(scanner.uniform(8, 18))
    canvas.array += noise
    canvas.array = np.clip(np.rint(canvas.array), LOWEST, HIGHEST)
    return canvas, masks

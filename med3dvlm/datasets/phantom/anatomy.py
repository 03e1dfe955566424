"""Draw a body in Hounsfield units: chest or abdomen, a contrast phase, findings, any acquisition plane and spacing."""

import numpy as np

from med3dvlm.datasets.phantom.abdomen import draw_abdomen
from med3dvlm.datasets.phantom.body import Body, Build
from med3dvlm.datasets.phantom.canvas import Acquisition, Canvas, empty_canvas
from med3dvlm.datasets.phantom.chest import draw_chest

REGIONS = {"chest": draw_chest, "abdomen": draw_abdomen}


def draw(body: Body, acquisition: Acquisition) -> Canvas:
    """Scan a body; the array holds whole HU in [-1000, 600], as a scanner that clips at both ends would store them.

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
    noise = scanner.standard_normal(canvas.array.shape, dtype=np.float32) * np.float32(scanner.uniform(8, 18))
    canvas.array += noise
    canvas.array = np.clip(np.rint(canvas.array), -1000, 600)
    return canvas

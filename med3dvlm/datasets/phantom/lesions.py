"""Where a phantom's findings lie: the voxels in which the scan with a finding differs from the scan without it.

Nothing is drawn for this that the scan does not show. Some findings draw random numbers for their place, so that leaving one out would move
those that are drawn after it: both scans of a pair therefore end with the finding, and what is drawn later is in neither.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from med3dvlm.datasets.phantom.anatomy import draw
from med3dvlm.datasets.phantom.body import Body
from med3dvlm.datasets.phantom.canvas import Acquisition

# In the order in which `chest` and `abdomen` draw random numbers for them; an effusion comes after the growth of the heart that it surrounds.
DRAWN = (
    "emphysema", "pleural_effusion", "cardiomegaly", "pericardial_effusion", "hiatal_hernia", "lymphadenopathy", "lung_opacity",
    "consolidation", "lung_nodule", "medical_material", "mosaic_attenuation_pattern", "interlobular_septal_thickening",
    "pulmonary_fibrotic_sequela", "atelectasis", "peribronchial_thickening", "bronchiectasis", "arterial_wall_calcification",
    "coronary_artery_wall_calcification",
    "ascites", "splenomegaly", "aortic_aneurysm", "gallstone", "liver_mass", "renal_cyst", "kidney_stone",
)  # fmt: skip
LEAST = 10.0  # HU; the noise is the same in both scans, so anything beyond rounding is the finding


def lesion_mask(body: Body, acquisition: Acquisition, kind: str) -> NDArray[np.bool_]:
    """(D, H, W) of the scan that `draw` makes of the body: where a finding of this kind is, as if those drawn later were not there.

    Raises:
        ValueError: the body has no such finding.
    """
    if kind not in {finding.kind for finding in body.findings}:
        raise ValueError(f"the body has no {kind!r}; it has {', '.join(finding.kind for finding in body.findings) or 'no finding'}")
    place = DRAWN.index(kind)
    without = tuple(finding for finding in body.findings if DRAWN.index(finding.kind) < place)
    with_it = (*without, *(finding for finding in body.findings if finding.kind == kind))
    scans = [draw(replace(body, findings=findings), acquisition).array for findings in (with_it, without)]
    mask: NDArray[np.bool_] = np.abs(scans[0] - scans[1]) >= LEAST
    return mask

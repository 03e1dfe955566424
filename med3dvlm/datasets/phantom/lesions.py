"""Where a phantom's findings lie: the voxels in which the scan with a finding differs from the scan without it.

Nothing is drawn for this that the scan does not show. Some findings draw random numbers for their place, so that leaving one out would move
those that are drawn after it: scans are therefore compared that end with a finding and with the one before it. What is no more than an
organ of another size lies where the organ does.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from med3dvlm.datasets.phantom.anatomy import draw
from med3dvlm.datasets.phantom.body import Body
from med3dvlm.datasets.phantom.canvas import Acquisition, Canvas

# In the order in which `chest` and `abdomen` draw random numbers for them; an effusion comes after the growth of the heart that it surrounds.
DRAWN = (
    "emphysema", "pleural_effusion", "cardiomegaly", "pericardial_effusion", "hiatal_hernia", "lymphadenopathy", "lung_opacity",
    "consolidation", "lung_nodule", "medical_material", "mosaic_attenuation_pattern", "interlobular_septal_thickening",
    "pulmonary_fibrotic_sequela", "atelectasis", "peribronchial_thickening", "bronchiectasis", "arterial_wall_calcification",
    "coronary_artery_wall_calcification",
    "ascites", "splenomegaly", "aortic_aneurysm", "gallstone", "liver_mass", "renal_cyst", "kidney_stone",
)  # fmt: skip
ENLARGED = {"cardiomegaly": "heart", "splenomegaly": "spleen"}
LEAST = 10.0  # HU; the noise is the same in both scans, so anything beyond rounding is the finding


def draw_with_masks(body: Body, acquisition: Acquisition) -> tuple[Canvas, dict[str, NDArray[np.bool_]]]:
    """The scan that `draw` makes of the body, and for each kind of finding where it is (D, H, W), as if those drawn later were not there."""
    findings = sorted(body.findings, key=lambda finding: DRAWN.index(finding.kind))
    scans = [draw(replace(body, findings=tuple(findings[:count])), acquisition) for count in range(len(findings) + 1)]
    pairs = zip(findings, scans, scans[1:], strict=False)
    return scans[-1], {finding.kind: _mask(finding.kind, before, after) for finding, before, after in pairs}


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
    return _mask(kind, *(draw(replace(body, findings=findings), acquisition) for findings in (without, with_it)))


def _mask(kind: str, before: Canvas, after: Canvas) -> NDArray[np.bool_]:
    if kind in ENLARGED:
        return after.structure(ENLARGED[kind])
    mask: NDArray[np.bool_] = np.abs(after.array - before.array) >= LEAST
    return mask

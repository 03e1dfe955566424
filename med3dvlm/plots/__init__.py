"""Every picture that evaluation, the demo, the preparation and the command line write, each a PNG.

matplotlib is imported inside the functions and used through `Figure` objects, so no global figure or backend changes.
A picture is written aside and then renamed: an interrupted run leaves the old picture or the new one, never half of one.
Colours are Okabe and Ito's, told apart by colour-blind readers.
"""

from med3dvlm.plots.canvas import DOTS_PER_INCH, FOOTER
from med3dvlm.plots.charts import findings_bars, loss_curves, retrieval_curve, vqa_bars
from med3dvlm.plots.detection import calibration_curve, precision_recall_curves, roc_curves
from med3dvlm.plots.preparation import prepared_volumes
from med3dvlm.plots.scans import cases, montage

__all__ = [
    "DOTS_PER_INCH", "FOOTER", "calibration_curve", "cases", "findings_bars", "loss_curves", "montage",
    "precision_recall_curves", "prepared_volumes", "retrieval_curve", "roc_curves", "vqa_bars",
]  # fmt: skip

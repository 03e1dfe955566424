"""The CT-CLIP path: an image-text model of chest CT learns from the scans and reports of CT-RATE (DCFormer paper, Methods; arXiv 2403.17834).

deepspeed stages/ct_clip.py --config stages/configs/demo/ct_clip.yaml
python stages/ct_clip.py --config stages/configs/smoke/ct_clip.yaml --encoder vit3d_naive
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.training.ct_clip"))

"""The CT-CLIP path: an image-text model of chest CT learns from the scans and reports of CT-RATE (DCFormer paper, Methods; arXiv 2403.17834).

deepspeed stages/ct_clip.py --config stages/configs/demo/ct_clip.yaml
python stages/ct_clip.py --config stages/configs/smoke/ct_clip.yaml --encoder vit3d_naive
"""

from med3dvlm.training.ct_clip import main
from med3dvlm.training.run import launch

if __name__ == "__main__":
    launch(main)

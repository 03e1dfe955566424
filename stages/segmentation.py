"""Segmentation: train a decoder on the encoder of a stage-1 model to draw what prompts name.

deepspeed stages/segmentation.py --config stages/configs/demo/segmentation.yaml
python stages/segmentation.py --config stages/configs/smoke/segmentation.yaml --dual-cross-attention false
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.training.segmentation"))

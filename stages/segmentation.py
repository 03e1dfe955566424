"""Segmentation: a decoder on the encoder of a stage-1 model learns where the things lie that prompts name.

deepspeed stages/segmentation.py --config stages/configs/demo/segmentation.yaml
python stages/segmentation.py --config stages/configs/smoke/segmentation.yaml --dual_cross_attention false
"""

from med3dvlm.training.run import launch
from med3dvlm.training.segmentation import main

if __name__ == "__main__":
    launch(main)

"""Stage 1: vision encoder and text encoder learn from pairs of volume and report (Med3DVLM paper, section 3.2.1).

deepspeed stages/stage1_siglip.py --config stages/configs/demo/stage1_siglip.yaml
python stages/stage1_siglip.py --config stages/configs/smoke/stage1_siglip.yaml --learning_rate 1e-3
"""

from med3dvlm.training.run import launch
from med3dvlm.training.stage1_siglip import main

if __name__ == "__main__":
    launch(main)

"""Stage 1: vision encoder and text encoder learn from pairs of volume and report (Med3DVLM paper, section 3.2.1).

deepspeed stages/stage1_siglip.py --config stages/configs/demo/stage1_siglip.yaml
python stages/stage1_siglip.py --config stages/configs/smoke/stage1_siglip.yaml --learning-rate 1e-3
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.training.stage1_siglip"))

"""Stage 2: the projector learns to put the image into the language model's words; everything else is frozen (paper, section 3.2.2).

deepspeed stages/stage2_projector.py --config stages/configs/demo/stage2_projector.yaml
python stages/stage2_projector.py --config stages/configs/smoke/stage2_projector.yaml --projector low_high_mlp
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.training.stage2_projector"))

"""Stage 3: LoRA on every linear layer of the language model, and the projector (paper, section 3.2.3); then the merge.

deepspeed stages/stage3_lora.py --config stages/configs/demo/stage3_lora.yaml
python stages/stage3_lora.py --config stages/configs/smoke/stage3_lora.yaml --lora-rank 8
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.training.stage3_lora"))

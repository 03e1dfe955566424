"""Stage 0, for the built-in demo alone: train a small Qwen2 and its tokenizer on the words of the training texts.

deepspeed stages/stage0_language_model.py --config stages/configs/demo/stage0_language_model.yaml
python stages/stage0_language_model.py --config stages/configs/smoke/stage0_language_model.yaml --max-steps 4
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.training.stage0_language_model"))

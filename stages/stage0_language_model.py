"""Before the stages, for the embedded default alone: a small Qwen2 with a tokenizer of its own learns the words of the training texts.

deepspeed stages/stage0_language_model.py --config stages/configs/demo/stage0_language_model.yaml
python stages/stage0_language_model.py --config stages/configs/smoke/stage0_language_model.yaml --max_steps 4
"""

from med3dvlm.training.run import launch
from med3dvlm.training.stage0_language_model import main

if __name__ == "__main__":
    launch(main)

"""Evaluate zero-shot detection of findings by a Med3DCLIP.

python eval/zero_shot.py --model outputs/ct_clip/model --data outputs/ct_clip/prepared --split valid --output outputs/ct_clip/eval/zero_shot
python eval/zero_shot.py --data outputs/ct_clip/prepared --split valid --output outputs/ct_clip/eval/zero_shot --score-only
torchrun --nproc_per_node 2 eval/zero_shot.py --model ... --templates 4
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.evaluation.zero_shot"))

"""Evaluate visual question answering by a Med3DVLM.

python eval/vqa.py --model outputs/demo/model --data outputs/demo/prepared --output outputs/demo/eval/vqa
python eval/vqa.py --data outputs/demo/prepared --output outputs/demo/eval/vqa --score-only
torchrun --nproc_per_node 2 eval/vqa.py --model outputs/demo/model --data outputs/demo/prepared --output outputs/demo/eval/vqa
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.evaluation.vqa"))

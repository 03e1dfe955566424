"""Train a linear probe on a frozen image encoder for CT-RATE's 18 findings (DCFormer paper, Table 2), or for whichever the data have labels
of.

python eval/linear_probe.py --model outputs/ct_clip/model --data outputs/ct_clip/prepared --split valid --output outputs/ct_clip/eval/probe
python eval/linear_probe.py --data outputs/ct_clip/prepared --split valid --output outputs/ct_clip/eval/probe --score-only
python eval/linear_probe.py --model outputs/ct_clip/model --data other/prepared --output other/probe --probe outputs/ct_clip/eval/probe
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.evaluation.linear_probe"))

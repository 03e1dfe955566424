"""Evaluate retrieval by a Med3DCLIP: which report belongs to a volume, and which volume to a report.

python eval/retrieval.py --model outputs/demo/stage1 --data outputs/demo/prepared --output outputs/demo/eval/retrieval
python eval/retrieval.py --data outputs/demo/prepared --output outputs/demo/eval/retrieval --score-only --pools 50,100 --ks 5,10,50,100
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.evaluation.retrieval"))

"""Evaluate saliency maps against the true places of lesions, which are known for phantoms.

    python eval/saliency.py --model outputs/demo/model --clip outputs/demo/stage1 --data outputs/demo/prepared \\
        --scans outputs/demo/phantoms --output outputs/demo/eval/grounding
    python eval/saliency.py --data outputs/demo/prepared --output outputs/demo/eval/grounding --score-only
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.evaluation.saliency"))

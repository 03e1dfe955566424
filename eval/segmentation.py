"""Evaluate the masks of a Med3DSegmenter against those of the data, finding by finding.

python eval/segmentation.py --model outputs/demo/stage1/segmenter --data outputs/demo/prepared --output outputs/demo/eval/segmentation
python eval/segmentation.py --data outputs/demo/prepared --output outputs/demo/eval/segmentation --score-only
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.evaluation.segmentation"))

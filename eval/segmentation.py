"""Masks that a Med3DSegmenter draws, finding by finding, against those of the data.

python eval/segmentation.py --model outputs/demo/segmentation --data outputs/demo/prepared --output outputs/demo/eval/segmentation
python eval/segmentation.py --data outputs/demo/prepared --output outputs/demo/eval/segmentation --score_only
"""

from med3dvlm.evaluation import script
from med3dvlm.evaluation.segmentation import main

if __name__ == "__main__":
    script(main)

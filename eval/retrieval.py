"""Retrieval of a Med3DCLIP: which report belongs to a volume, and which volume to a report.

python eval/retrieval.py --model outputs/demo/stage1 --data outputs/demo/prepared --output outputs/demo/eval/retrieval
python eval/retrieval.py --data outputs/demo/prepared --output outputs/demo/eval/retrieval --score_only --pools 50,100 --ks 5,10,50,100
"""

from med3dvlm.evaluation import script
from med3dvlm.evaluation.retrieval import main

if __name__ == "__main__":
    script(main)

"""Visual question answering of a Med3DVLM, question by question.

python eval/vqa.py --model outputs/demo/model --data outputs/demo/prepared --output outputs/demo/eval/vqa
python eval/vqa.py --data outputs/demo/prepared --output outputs/demo/eval/vqa --score_only
torchrun --nproc_per_node 2 eval/vqa.py --model outputs/demo/model --data outputs/demo/prepared --output outputs/demo/eval/vqa
"""

from med3dvlm.evaluation import script
from med3dvlm.evaluation.vqa import main

if __name__ == "__main__":
    script(main)

"""Reports that a Med3DVLM writes, against the radiologist's.

python eval/report_gen.py --model outputs/demo/model --data outputs/demo/prepared --output outputs/demo/eval/report
python eval/report_gen.py --data outputs/demo/prepared --output outputs/demo/eval/report --score_only --bertscore
"""

from med3dvlm.evaluation import script
from med3dvlm.evaluation.report_gen import main

if __name__ == "__main__":
    script(main)

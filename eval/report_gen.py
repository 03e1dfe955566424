"""Evaluate the reports that a Med3DVLM writes against the radiologist's.

python eval/report_gen.py --model outputs/demo/model --data outputs/demo/prepared --output outputs/demo/eval/report
python eval/report_gen.py --data outputs/demo/prepared --output outputs/demo/eval/report --score-only --bertscore
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.evaluation.report_gen"))

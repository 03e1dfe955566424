"""Compare a run of an evaluation with another run, with the papers, or with itself without duplicates.

python eval/compare.py outputs/demo/eval/report outputs/other/eval/report
python eval/compare.py outputs/demo/eval/vqa --split-file outputs/demo/prepared/audit/deduplicated.json
python eval/compare.py --published outputs/demo
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.evaluation.compare"))

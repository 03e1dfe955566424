"""Write report.html: the figures of runs, their baselines without the scan, and their cases, in one file.

python eval/page.py outputs/paper --cases 200 --megabytes 10
python eval/page.py runs/retrieval runs/report_7b --output runs/report.html
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.evaluation.page"))

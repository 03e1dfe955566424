"""A radiology workstation in the browser: look at one's own scan and talk with a model about it, on this machine only.

python app/chat.py outputs/demo/model
python app/chat.py outputs/demo/model --port 8080 --mcp
python app/chat.py outputs/demo/model --host 0.0.0.0 --auth-file accounts.json    # for others; see accounts.py
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.app.chat"))

"""Accounts of a shared workstation: a file of names and hashed passwords. This program writes it, and the chat reads it by --auth-file.

python app/accounts.py accounts.json anna            # asks for the password; a name that is there gets a new one
python app/chat.py outputs/demo/model --auth-file accounts.json --host 0.0.0.0
"""

import sys

from med3dvlm.programs import run

if __name__ == "__main__":
    sys.exit(run("med3dvlm.app.accounts"))

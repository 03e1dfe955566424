"""`python -m med3dvlm.cli` is `med3dvlm`."""

import sys

from med3dvlm.cli import main

if __name__ == "__main__":  # not in worker processes, which may import this file
    sys.exit(main())

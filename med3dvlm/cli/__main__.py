"""`python -m med3dvlm.cli` is `med3dvlm`."""

import sys

from med3dvlm.cli import main

sys.exit(main())

"""Run a command and append {"step", "seconds", "peak_rss_gb"} to a file: python stages/timed.py FILE STEP COMMAND..."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    path, step, *command = sys.argv[1:]
    started = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    # The largest process below this one, in GB; the kernel counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    if code == 0:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "seconds": round(time.perf_counter() - started, 1), "peak_rss_gb": round(peak, 2)}) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())

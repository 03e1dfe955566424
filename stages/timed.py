"""Run a command and append {"step", "seconds", "peak_rss_gb", "code"} to a file: python stages/timed.py FILE STEP COMMAND...

A line is written however the command ends. `peak_rss_gb` is the most that the command and all processes below it held together, seen twice
a second; memory that processes share counts once for each. Ctrl+C reaches the command by itself, SIGTERM is passed on to it.
"""

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil


def resident_bytes(pid: int) -> int:
    """Memory of a process and all below it."""
    total = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.Error:  # one ended just now; the next look has the rest
        pass
    return total


def main() -> int:
    path, step, *command = sys.argv[1:]
    started, peak, code = time.perf_counter(), 0, None
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    process = subprocess.Popen(command)
    while code is None:
        if caught:
            process.send_signal(caught.pop())
        peak = max(peak, resident_bytes(process.pid))
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=0.5)
    line = {"step": step, "seconds": round(time.perf_counter() - started, 1), "peak_rss_gb": round(peak / 1e9, 2), "code": code}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return code if code >= 0 else 128 - code  # as a shell counts a signal


if __name__ == "__main__":
    sys.exit(main())

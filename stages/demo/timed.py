"""Run a command and append {"step", "seconds", "peak_rss_gb", "processes", "code"} to a file: python stages/demo/timed.py FILE STEP COMMAND...

A line is written however the command ends. `peak_rss_gb` is the most that the command and all processes below it held together, seen twice
a second; memory that processes share counts once for each. `processes` has the name and the peak of each that held 0.1 GB, the largest first.
Ctrl+C reaches the command by itself, SIGTERM is passed on to it.
"""

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil


def resident_bytes(pid: int) -> dict[tuple[int, str], int]:
    """Memory of a process and each below it, by its id and name: that of its script, where it has one."""
    held = {}
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            words = [word for word in one.cmdline() if not word.startswith("-")]
            held[one.pid, Path(words[min(1, len(words) - 1)]).name if words else ""] = one.memory_info().rss
    except psutil.Error:  # one ended just now; the next look has the rest
        pass
    return held


def main() -> int:
    path, step, *command = sys.argv[1:]
    started, peak, code = time.perf_counter(), 0, None
    peaks: dict[tuple[int, str], int] = {}
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    process = subprocess.Popen(command)
    while code is None:
        if caught:
            process.send_signal(caught.pop())
        held = resident_bytes(process.pid)
        peak = max(peak, sum(held.values()))
        peaks |= {one: max(size, peaks.get(one, 0)) for one, size in held.items()}
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=0.5)
    seconds = round(time.perf_counter() - started, 1)
    each = sorted(((name, round(size / 1e9, 2)) for (_, name), size in peaks.items() if size >= 1e8), key=lambda one: -one[1])
    line = {"step": step, "seconds": seconds, "peak_rss_gb": round(peak / 1e9, 2), "processes": each, "code": code}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return code if code >= 0 else 128 - code  # as a shell counts a signal


if __name__ == "__main__":
    sys.exit(main())

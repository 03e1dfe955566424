"""stages/demo/timed.py: time and memory of a command, however it ends."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

HOLD = "import time; held = b'x' * 10**8; time.sleep(2)"


def timed(repository: Path, file: Path, *command: str) -> list[str]:
    return [sys.executable, str(repository / "stages" / "demo" / "timed.py"), str(file), "step", *command]


def only_line(file: Path) -> dict[str, Any]:
    (line,) = map(json.loads, file.read_text().splitlines())
    return dict(line)


@pytest.mark.parametrize(("command", "code", "noted"), [("exit 0", 0, 0), ("exit 3", 3, 3), ("kill -9 $$", 137, -9)])
def test_a_line_is_written_however_the_command_ends(command: str, code: int, noted: int, repository: Path, tmp_path: Path) -> None:
    done = subprocess.run(timed(repository, tmp_path / "seconds.jsonl", "sh", "-c", command), check=False)
    line = only_line(tmp_path / "seconds.jsonl")
    assert (done.returncode, line["code"], line["step"]) == (code, noted, "step") and 0 <= line["seconds"] < 60


def test_memory_is_the_sum_of_all_processes(repository: Path, tmp_path: Path) -> None:
    two = f"import subprocess, sys; other = subprocess.Popen([sys.executable, '-c', {HOLD!r}]); {HOLD}; other.wait()"
    subprocess.run(timed(repository, tmp_path / "seconds.jsonl", sys.executable, "-c", two), check=True)
    line = only_line(tmp_path / "seconds.jsonl")
    assert 0.2 <= line["peak_rss_gb"] < 0.35 and line["seconds"] >= 2
    assert len(line["processes"]) == 2 and all(0.1 <= peak < 0.18 for _, peak in line["processes"])


def test_a_stopped_command_is_recorded(repository: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    process = subprocess.Popen(timed(repository, tmp_path / "seconds.jsonl", "sh", "-c", f"touch {started}; exec sleep 60"))
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # Ctrl+C goes to the command too; this one did not
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert only_line(tmp_path / "seconds.jsonl")["code"] == -signal.SIGTERM

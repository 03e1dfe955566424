"""Memory that is freed is used again."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from med3dvlm.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.zeros(1 << 24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for glibc alone")
def test_the_kernel_is_asked_for_pages_once() -> None:
    faults = {}
    for way in ("kept", "given back"):
        command = [sys.executable, "-c", PROGRAM, way]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True, env={"PATH": ""}) for _ in range(3)]
        faults[way] = min(int(run.stdout) for run in runs)  # a kernel short of memory takes pages away meanwhile
    assert faults["kept"] < 0.1 * faults["given back"]

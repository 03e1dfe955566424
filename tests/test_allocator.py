"""Freed memory is reused."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from med3dvlm.allocator import keep_freed_memory
torch.cuda.is_available = lambda: sys.argv[1] == "with a GPU"
if sys.argv[1] != "given back":
    keep_freed_memory()
for _ in range(16):
    torch.zeros(1 << 24)  # 64 MiB; each of the first few leaves a crumb of its alignment, until malloc's cache of crumbs is full
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for glibc alone")
def test_pages_are_requested_from_the_kernel_once() -> None:
    faults = {}
    for way in ("kept", "given back", "with a GPU"):
        run = subprocess.run([sys.executable, "-c", PROGRAM, way], check=True, capture_output=True, text=True, env={"PATH": ""})
        faults[way] = int(run.stdout)
    assert faults["kept"] < 0.1 * faults["given back"]
    assert faults["with a GPU"] > 0.9 * faults["given back"]

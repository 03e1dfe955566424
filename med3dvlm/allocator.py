"""Keep freed memory for the next tensor. Without this, encoders on CPUs spend half of their time waiting for pages from the kernel."""

import ctypes
import sys

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tell glibc's malloc to reuse what it has instead of giving large blocks back.

    Does nothing without glibc, and nothing where there is a GPU, since weights that moved to it would keep their host memory. Programs call
    it at their start, before any thread runs, since it applies to the whole process.
    """
    import torch

    if not sys.platform.startswith("linux") or torch.cuda.is_available():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)

"""Keep freed memory for the next tensor: without that, half of an encoder's time on CPUs is the kernel handing out pages."""

import ctypes
import sys

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tell glibc's malloc to reuse what it has instead of giving large blocks back.

    Does nothing where there is no glibc, or where there is a GPU: weights that have moved there would keep their place in the host's memory.
    For programs to call at their start, before threads are there: it holds for the whole process.
    """
    import torch

    if not sys.platform.startswith("linux") or torch.cuda.is_available():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)

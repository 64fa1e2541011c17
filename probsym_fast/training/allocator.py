"""Settings of the C allocator for training."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of mallopt(3)


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next step; returns whether it did. Does nothing with other C libraries.

    Every step allocates and frees the same large tensors. By default glibc returns each one above 32 MB to the kernel,
    which then clears its new pages one by one.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))

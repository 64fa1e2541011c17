"""The C library's allocator, set for training."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of mallopt(3)


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next step of this process; whether it did (elsewhere nothing happens).

    A step frees and takes the same large tensors again and again; as glibc comes, every one of more than 32 MB is given
    back to the kernel and its fresh pages are cleared one by one when first written.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries than glibc
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))

"""Debug mode: a GPU's values are checked as the CPU's are, and its kernels are waited for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_on = os.environ.get("PROBSYM_DEBUG", "0") not in ("", "0")


def debugging() -> bool:
    return _on


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Within it, or in a process with PROBSYM_DEBUG=1, bad values on a GPU raise as they do on the CPU.

    Without it values on a GPU are not read, since that waits for it: a node number out of range counts as no node there, and
    NaN goes on. With it every op checks its node numbers, offsets, permutations and counts, and that scores and matrices
    are finite, before a kernel is launched, with the CPU's messages; and every Triton kernel is waited for, so that one
    that fails is named with its op and shapes. Slow. Code traced by torch.compile and CUDA graphs while they are captured
    are not checked. For all threads.
    """
    global _on
    before, _on = _on, bool(enabled)
    try:
        yield
    finally:
        _on = before

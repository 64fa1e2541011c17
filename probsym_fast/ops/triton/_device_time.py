"""Time on a GPU by its own clock, and the host's beside it. Nothing is allocated on the GPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

CYCLES = 2.5e9  # of a GPU's clock a second, at most
QUEUE = 0.5  # seconds that a GPU waits at most until the host has queued its work


def device_times(run: Callable[[], object], count: int, *, queued: bool = True) -> tuple[list[float], float]:
    """Seconds of each of `count` calls on the current GPU, between events, and seconds of the host to queue one.

    queued: the GPU waits until the host has queued all calls, so that short kernels do not wait for it in between. Else the
    calls run as they come, and the times hold the GPU's gaps. A call that waits for the GPU is measured with its gaps too.
    The caches are warm. The function must have run before: nothing is left to compile.
    """
    torch.cuda.synchronize()
    if queued:
        start = time.perf_counter()
        run()
        torch.cuda._sleep(int(CYCLES * min(QUEUE, 1.5 * count * (time.perf_counter() - start))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    start = time.perf_counter()
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    host = (time.perf_counter() - start) / count
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)], host

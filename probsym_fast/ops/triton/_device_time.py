"""Time on a GPU by its own clock, and the host's time. Allocates nothing on the GPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

CYCLES = 2.5e9  # most cycles of a GPU's clock per second
QUEUE = 0.5  # most seconds that a GPU waits for the host to queue its work


def device_times(run: Callable[[], object], count: int, *, queued: bool = True) -> tuple[list[float], float]:
    """Seconds of each of `count` calls on the current GPU, between events, and the host's seconds to queue one call.

    queued: the GPU waits until the host has queued all calls, so that short kernels do not wait for the host. Otherwise
    calls run as they come, and the times include the GPU's gaps. So do those of a call that waits for the GPU. Caches
    are warm. Call the function once before: compilation must be done.
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

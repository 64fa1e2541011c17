"""Memory: the peak of a computation, and what is free on a device."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(function: Callable[[], Any], device: torch.device | str) -> int:
    """Peak bytes of tensors while function() runs, above those held before, on a CPU or GPU.

    On a CPU every allocation is recorded, so the result is exact. On a GPU it is the caching allocator's peak, which is
    reset first. Raises RuntimeError for other devices.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise RuntimeError(f"peak_memory: device must be a CPU or a CUDA GPU, got {device}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports on stderr that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a GPU, including the caching allocator's reserve; None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

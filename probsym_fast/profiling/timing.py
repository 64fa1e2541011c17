"""Timing functions in turn on any device, and naming the machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize(device: torch.device | str) -> None:
    """Waits for the GPU; does nothing on other devices."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    variants: dict[str, Callable], device: torch.device | str, seconds: float, rounds: int = 5
) -> dict[str, list[float]]:
    """Seconds per call of each variant, timed in turn (A B C A B C ...) so that drift affects all of them alike.

    A turn is 50 ms of calls, or one call if it is longer. A fifth as many untimed calls warm it up, or none if a call takes
    over half a second. Runs at least `rounds` rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():  # warm up
        function()
        function()
    repeats, untimed = {}, {}
    for name, function in variants.items():
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        duration = time.perf_counter() - start + 1e-9
        repeats[name] = max(1, min(500, int(0.05 / duration)))
        untimed[name] = 1 + repeats[name] // 5 if duration < 0.5 else 0  # warms caches and threads again
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or min(map(len, times.values())) < rounds:
        for name, function in variants.items():
            for _ in range(untimed[name]):
                function()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            synchronize(device)
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def machine(device: torch.device | str) -> dict[str, object]:
    """Device and software versions."""
    gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else processor(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

"""Timing on any device: functions called in turn, and the machine's name."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize(device: torch.device | str) -> None:
    """Waits for the GPU's work; nothing elsewhere."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    variants: dict[str, Callable], device: torch.device | str, seconds: float, rounds: int = 5
) -> dict[str, list[float]]:
    """Seconds of each variant, called in turn (A B C A B C ...) so that a drift of the machine meets all of them.

    A turn is 50 ms of calls or one call, after a fifth as many that are not timed (none of more than half a second): the
    times are those of a warm function. At least so many rounds.
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
        untimed[name] = (
            1 + repeats[name] // 5 if duration < 0.5 else 0
        )  # brings back caches and threads that others took
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
    """Names the device and the software."""
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

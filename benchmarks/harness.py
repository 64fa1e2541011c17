"""Shared by the benchmarks: ratios of variants timed in turn, counts of bytes and operations, limits of the machine."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import torch

from probsym_fast.ops.triton._device_time import device_times
from probsym_fast.profiling import timing as _timing
from probsym_fast.profiling.timing import interleave


@dataclass
class Row:
    """One variant of one case. Times are quartiles over rounds in seconds, on a GPU by its own clock."""

    case: str
    variant: str
    low: float
    median: float
    high: float
    rounds: int
    ratio: float = 1.0  # median of the reference over this median, same rounds
    bytes: int = 0
    operations: int = 0
    share: float = 0.0  # of the limit: the larger of bytes over bandwidth and operations over rate, over the median
    host: float = 0.0  # on a GPU: median time until the work of one call is queued
    busy: float = 0.0  # on a GPU: time of all kernels of one call
    kernels: list[dict] = field(default_factory=list)  # on a GPU: the longest, as `kernels_of` finds them
    extra: dict = field(default_factory=dict)


COMPILED = True  # False leaves out the variants of torch.compile


def chosen(variants: dict[str, Callable]) -> dict[str, Callable]:
    """Those to time."""
    return variants if COMPILED else {name: run for name, run in variants.items() if "compiled" not in name}


def compare(
    case: str,
    variants: dict[str, Callable],
    *,
    device: str,
    reference: str = "reference",
    bytes: int = 0,
    operations: int = 0,
    dtype: torch.dtype = torch.float32,
    seconds: float = 4.0,
    whole: bool = False,
) -> list[Row]:
    """A row per variant. bytes, operations: the least that the computation needs; dtype: that of its products. Limits of a
    CPU are measured before and after the variants, and the better ones count.

    whole: for whole training steps. On a GPU, times then include the gaps between kernels.
    """
    before = limit(device, dtype, bytes, operations)
    if device == "cuda":
        times, host = interleave_on_gpu(variants, seconds, queued=not whole)
    else:
        times, host = interleave(variants, device, seconds), {}
    least = min(before, limit(device, dtype, bytes, operations))
    base, rows = statistics.median(times[reference]), []
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        row = Row(case, name, low, median, high, len(values), base / median, bytes, operations, least / median)
        if host:
            row.host = statistics.median(host[name])
            found = kernels_of(variants[name], PROFILED if median < LONG else 1)
            row.busy, row.kernels = sum(x["seconds"] * x["count"] for x in found), found[:KEPT]
        rows.append(row)
    return rows


KEPT, PROFILED, LONG = 25, 8, 5e-3  # kernels of a row; calls that are profiled, of calls that are no longer than this


def kernels_of(run: Callable[[], object], calls: int = PROFILED) -> list[dict]:
    """Kernels of one call on a GPU, the longest first: name, launches (count) and median seconds of a launch."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name].append(event.device_time / 1e6)
    found = [
        {"kernel": name, "count": len(values) / calls, "seconds": statistics.median(values)}
        for name, values in times.items()
    ]
    return sorted(found, key=lambda x: -x["seconds"] * x["count"])


def interleave_on_gpu(
    variants: dict[str, Callable], seconds: float, rounds: int = 5, *, queued: bool = True
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """`interleave` by the GPU's clock (`device_times`), one median per turn; the second result is the host's time."""
    times, host, repeats = ({name: [] for name in variants} for _ in range(3))
    for name, function in variants.items():
        function()  # compiles
        first, _ = device_times(function, 2, queued=False)
        repeats[name] = max(1, min(50, int(0.05 / min(first))))
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or min(map(len, times.values())) < rounds:
        for name, function in variants.items():
            found, _ = device_times(function, repeats[name], queued=queued)
            times[name].append(statistics.median(found))
            host[name].append(host_time(function))
    return times, host


def host_time(run: Callable[[], object], calls: int = 3) -> float:
    """Seconds until the work of one call is queued on an idle GPU; many calls would fill its queue, and the host wait."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    host = (time.perf_counter() - start) / calls
    torch.cuda.synchronize()
    return host


def fastest(ways: dict[str, Callable], device: str) -> float:
    """Seconds of the fastest call among all of them."""
    times = interleave_on_gpu(ways, 1.5)[0] if device == "cuda" else interleave(ways, device, 0.3)
    return min(map(min, times.values()))


def once_on_a_gpu(measure: Callable) -> Callable:
    """A CPU's limits are measured again for every case: shared machines change their speed, and cases their threads."""
    kept = cache(measure)

    @wraps(measure)
    def now(device: str, *more: Any) -> float:
        return (kept if device == "cuda" else measure)(device, *more)

    return now


@once_on_a_gpu
def bandwidth(device: str) -> float:
    """Bytes per second of a large copy, reads plus writes."""
    size = 2**26 if device == "cpu" else 2**29
    x = torch.randn(size, device=device)
    y = torch.empty_like(x)
    return 8 * size / fastest({"copy": lambda: y.copy_(x)}, device)


@once_on_a_gpu
def rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, by the faster of torch's libraries."""
    n = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    ways = {"product": lambda: a @ b}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        ways["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return 2 * n**3 / fastest(ways, device)


def limit(device: str, dtype: torch.dtype, bytes: int, operations: int) -> float:
    """Seconds: the larger of bytes over bandwidth and operations over rate."""
    return max(bytes and bytes / bandwidth(device), operations and operations / rate(device, dtype))


def machine(device: str) -> dict:
    """Device, its limits, and software versions."""
    half = {"bfloat16_TFLOP_s": round(rate(device, torch.bfloat16) / 1e12, 1)} if device == "cuda" else {}
    return _timing.machine(device) | {
        "bandwidth_GB_s": round(bandwidth(device) / 1e9, 1),
        "float32_GFLOP_s": round(rate(device, torch.float32) / 1e9, 1),
        **half,
    }

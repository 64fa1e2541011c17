"""What the benchmarks share: variants timed in turn, ratios, counted bytes and operations, the machine's limits."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Row:
    """One variant of one case; times in seconds, quartiles of all rounds."""

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
    extra: dict = field(default_factory=dict)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(variants: dict[str, Callable], device: str, seconds: float) -> dict[str, list[float]]:
    """Times of each variant, called in turn (A B C A B C ...) so that a drift of the machine meets all of them.

    A turn is 50 ms of calls or one call, after a fifth as many that are not timed (none of more than half a second): the
    times are those of a warm function.
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
    while time.perf_counter() < stop or min(map(len, times.values())) < 5:
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


def compare(
    case: str,
    variants: dict[str, Callable],
    *,
    device: str,
    reference: str = "reference",
    bytes: int = 0,
    operations: int = 0,
    seconds: float = 4.0,
) -> list[Row]:
    """A row a variant; bytes and operations are those that the computation needs at least."""
    times = interleave(variants, device, seconds)
    base = statistics.median(times[reference])
    bandwidth, rate = limits(device)
    rows = []
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        limit = max(bytes / bandwidth, operations / rate)
        rows.append(Row(case, name, low, median, high, len(values), base / median, bytes, operations, limit / median))
    return rows


@cache
def limits(device: str) -> tuple[float, float]:
    """Measured here: bytes a second of a large copy (read + write), float32 operations a second of a large product, by the
    faster of torch's libraries."""
    size = 2**26 if device == "cpu" else 2**29
    x = torch.randn(size, device=device)
    y = torch.empty_like(x)
    n = 2048 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device)
    ways = {"copy": lambda: y.copy_(x), "product": lambda: a @ a}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        ways["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, a, None, "none", [], "")
    times = interleave(ways, device, 1.5)
    return 8 * size / min(times.pop("copy")), 2 * n**3 / min(map(min, times.values()))


@cache
def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Measured here: operations a second of a large matrix product in that dtype, the peak that steps are held against."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = interleave({"product": lambda: a @ b}, device, 1.5)
    return 2 * n**3 / min(times["product"])


def operations_of(function: Callable) -> int:
    """Operations of the matrix products and attentions that one call of it makes, those of the backward pass too."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def machine(device: str) -> dict:
    """Names the device and the software."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    bandwidth, rate = limits(device)
    half = {"bfloat16_TFLOP_s": round(matrix_rate(device, torch.bfloat16) / 1e12, 1)} if device == "cuda" else {}
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bandwidth_GB_s": round(bandwidth / 1e9, 1),
        "float32_GFLOP_s": round(rate / 1e9, 1),
        **half,
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

"""What the benchmarks share: ratios of variants timed in turn, counted bytes and operations, the machine's limits."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from probsym_fast import _timing
from probsym_fast._timing import interleave


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
    """Names the device, its limits and the software."""
    bandwidth, rate = limits(device)
    half = {"bfloat16_TFLOP_s": round(matrix_rate(device, torch.bfloat16) / 1e12, 1)} if device == "cuda" else {}
    return _timing.machine(device) | {
        "bandwidth_GB_s": round(bandwidth / 1e9, 1),
        "float32_GFLOP_s": round(rate / 1e9, 1),
        **half,
    }

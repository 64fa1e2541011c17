"""The table as a page."""

from __future__ import annotations

from benchmarks.gpu_model.around import GRAPHS, Share
from benchmarks.gpu_model.devices import DEVICES, GUIDE
from benchmarks.gpu_model.latency import WAIT
from benchmarks.gpu_model.model import OVERHEAD
from benchmarks.gpu_model.table import Row

FULL = 90  # the architecture with every column


def page(rows: list[Row], seen: list[Row], shares: list[Share], triton: str) -> str:
    """seen: rows of devices that have measured. shares: of steps on the device of FULL."""
    names = "; ".join(f"{k // 10}.{k % 10}: {x.name} ({x.source})" for k, x in DEVICES.items())
    parts = [
        "# Predicted times of the GPU kernels",
        "No figure on this page was measured, except in columns that say *measured*. "
        f"`python -m benchmarks.gpu_model --write` makes it from the compiled code (triton {triton}). "
        "How to read it: docs/gpu.md.",
        f"Devices: {names}; {GUIDE}. Between kernels: {OVERHEAD * 1e6:.0f} µs. A dependent load: {WAIT} cycles.",
        f"## Ops on {DEVICES[FULL].name}",
        "Times in µs. *launches*: our kernels + the library's calls. *share*: of the limit (the larger of bytes over "
        "bandwidth and operations over rate) in the predicted time of the part that the case names. A dash: it is "
        "unknown. The limit of embed counts a row of the weight for each edge, most of which a cache holds: its share "
        "can exceed 100 %.",
        _ops([row for row in rows if row.architecture == FULL]),
        "## Ops on the others",
        "Predicted time of the part that the case names, in µs, and its share of the limit.",
        _others(rows),
        f"## A training step of ViT-B/16 around its backbone, on {DEVICES[FULL].name}",
        f"PATTERN-PS in bfloat16, {GRAPHS} graphs. Times in ms. *around*: distribution, permutation, tokens, readout, loss, "
        "and Adam for their weights, in our kernels and the library's calls. *share*: of the whole step, without the host.",
        _around(shares),
        f"## Kernels on {DEVICES[FULL].name}",
        "Each kernel where it takes longest. *iteration*: instructions an iteration of its innermost loops, or of the whole "
        "kernel if it has none. *bits*: the widest load and store there. *of*: what its predicted time is made of.",
        _kernels([row for row in rows if row.architecture == FULL]),
    ]
    for device in dict.fromkeys(row.device for row in seen):
        parts += _beside(device, [row for row in seen if row.device == device])
    return "\n\n".join(parts) + "\n"


def _beside(device: str, rows: list[Row]) -> list[str]:
    """What a device measured, beside what is predicted for it."""
    lines = ["| op | case | limit | predicted | measured | measured / predicted | share, measured | host, measured |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for x in rows:
        if x.measured:
            ratio = number(x.measured / x.predicted) if x.predicted else "–"
            cells = [x.op, x.case, us(x.limit), us(x.predicted), us(x.measured), ratio, percent(x.share), us(x.host)]
            lines.append(f"| {' | '.join(cells)} |")
    kernels = [
        "| kernel | case | predicted | measured | measured / predicted | predicted from |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = {}
        for x in row.kernels:  # of several launches the longest is predicted, and the median is measured
            if x.get("measured") and (x["seconds"] or 0) >= (found.get(x["kernel"], x)["seconds"] or 0):
                found[x["kernel"]] = x
        for name, x in found.items():
            ratio = number(x["measured"] / x["seconds"]) if x["seconds"] else "–"
            cells = [name, row.case, us(x["seconds"]), us(x["measured"]), ratio, x["of"] or "–"]
            kernels.append(f"| {' | '.join(cells)} |")
    return [
        f"## Measured on {device}, beside what is predicted for it",
        "Times in µs, of the part that the case names. The limit is by the bandwidth and the rates measured on that machine. "
        "*host*: until one call is queued.",
        "\n".join(lines),
        "Kernels: the median of all launches in a call, forward and backward.",
        "\n".join(kernels),
    ]


def _ops(rows: list[Row]) -> str:
    lines = [
        "| op | case | MB | GFLOP | limit | launches | forward, predicted | both, predicted | share, predicted | mostly |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for x in rows:
        own = [k for k in x.kernels if x.of != "forward" or k["direction"] == "forward"]
        longest = max(own, key=lambda k: (k["seconds"] or 0) * k["count"])
        cells = [
            x.op, x.case + (", forward" if x.of == "forward" and "forward" not in x.case else ""), number(x.bytes / 1e6),
            number(x.operations / 1e9), us(x.limit), f"{x.launches} + {x.library}", us(x.forward), us(x.both),
            percent(x.share), f"{longest['kernel']} ({longest['of'] or '–'})",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _around(shares: list[Share]) -> str:
    head = (
        "samples",
        "step, predicted",
        "around: ours, predicted",
        "library, predicted",
        "share, predicted",
        "longest, µs",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for x in shares:
        longest = ", ".join(f"{name} {us(seconds)}" for name, seconds in x.kernels[:6])
        times = (number(1e3 * seconds) for seconds in (x.whole, x.ours, x.library))
        lines.append(f"| {' | '.join([str(x.samples), *times, percent(x.share), longest])} |")
    return "\n".join(lines)


def _others(rows: list[Row]) -> str:
    others = [k for k in DEVICES if k != FULL]
    head = " | ".join(f"{DEVICES[k].name}, predicted" for k in others)
    lines = [f"| case | {head} |", "|---|" + "---|" * len(others)]
    by_case: dict[str, dict[int, Row]] = {}
    for x in rows:
        by_case.setdefault(x.case, {})[x.architecture] = x
    for case, found in by_case.items():
        if not set(others) <= set(found):
            continue
        cells = []
        for k in others:
            x = found[k]
            cells.append(f"{us(x.predicted)} ({percent(x.share) or '–'})")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _kernels(rows: list[Row]) -> str:
    lines = [
        "| kernel | op | blocks x warps | registers | shared | occupancy | waves | instructions | iteration | bits | tensor "
        "cores | MB | predicted, µs | of |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    longest: dict[tuple[str, str], dict] = {}
    for row in rows:
        for x in row.kernels:
            key = row.op, x["kernel"]
            if key not in longest or (x["seconds"] or 0) > (longest[key]["seconds"] or 0):
                longest[key] = x
    for (op, kernel), x in longest.items():
        cells = [
            kernel, op, f"{x['blocks']} x {x['warps']}", str(x["registers"]), str(x["shared"]), percent(x["occupancy"]),
            number(x["waves"]), f"{x['instructions']}" if not x["unknown"] else "–",
            ", ".join(f"{n:.0f}" for n in x["iteration"]), f"{x['load']}, {x['store']}", "yes" if x["tensor"] else "",
            number(x["bytes"] / 1e6), us(x["seconds"]), x["of"] or f"unknown: {x['unknown']}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def us(seconds: float | None) -> str:
    """In microseconds."""
    return "–" if seconds is None else number(seconds * 1e6)


def number(x: float) -> str:
    return "" if not x else f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"

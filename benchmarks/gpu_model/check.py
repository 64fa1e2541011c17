"""What continuous integration holds still in the compiled kernels: no spills, wide loads, and instructions an iteration."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu_model import sass
from benchmarks.gpu_model.launches import Launch
from benchmarks.gpu_model.model import examined, widths

KEPT = Path(__file__).parents[1] / "results" / "gpu-predicted.json"
GROWTH = 1.1  # most instructions an iteration over those that were written down
Checked = dict[str, dict[str, Any]]


def name(launch: Launch) -> str:
    return f"{launch.function.fn.__module__.rsplit('.', 1)[-1]}.{launch.kernel}"


def checked(pairs: Iterable[tuple[Launch, Any]]) -> Checked:
    """Facts of the first launch of each kernel that has a loop, with what triton has compiled of it."""
    first: dict[str, tuple[Launch, Any]] = {}
    for launch, made in pairs:
        first.setdefault(name(launch), (launch, made))
    found = {}
    for kernel, (launch, made) in first.items():
        if not sass.parse_ptx(made.asm["ptx"]).loops:
            continue
        seen = examined(launch, made)
        load, store = widths(seen.code)
        found[kernel] = {"stack": seen.code.stack, "load": load, "store": store, "iteration": seen.iteration}
    return found


def kept() -> tuple[str, Checked]:
    """The version of triton that the table was written with, and the facts in it."""
    table = json.loads(KEPT.read_text())
    return table["triton"], table["checked"]


def worse(found: Checked, before: Checked, same_compiler: bool) -> list[str]:
    """What is worse than it was. Instructions compare only for the same compiler."""
    said = []
    for kernel, now in found.items():
        if now["stack"]:
            said.append(f"{kernel}: {now['stack']} bytes of registers are spilled")
        was = before.get(kernel)
        if was is None:
            said.append(f"{kernel}: not in the table; python -m benchmarks.gpu_model --write")
            continue
        for access in ("load", "store"):
            if now[access] < was[access]:
                said.append(f"{kernel}: the widest {access} is {now[access]} bits, was {was[access]}")
        if same_compiler and grown(now["iteration"], was["iteration"]):
            said.append(f"{kernel}: {now['iteration']} instructions an iteration, were {was['iteration']}")
    return said


def grown(now: list[float], was: list[float]) -> bool:
    """Whether any loop has more instructions; of other numbers of loops, the largest are compared."""
    pairs = zip(now, was, strict=True) if len(now) == len(was) else [(max(now), max(was))]
    return any(a > GROWTH * b for a, b in pairs)

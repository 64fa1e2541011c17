"""What continuous integration holds still in the compiled kernels: no spills, wide loads, instructions and branches of loops.

A Triton kernel is known by its name, the narrowest floating point type that it reads or writes, and the constants that
choose another loop (CHOICES). float16 is left out: it differs from bfloat16 in one type.
"""

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
CHOICES = "PRECISION", "AXES"
TYPES = "bf16", "fp32", "fp64"  # the narrowest first
Checked = dict[str, dict[str, Any]]


def name(launch: Launch) -> str:
    return f"{launch.function.fn.__module__.rsplit('.', 1)[-1]}.{launch.kernel}"


def key(launch: Launch) -> str | None:
    """What a launch is known by; None for float16."""
    pointers = {x[1:] for x in launch.source[0].values() if x.startswith("*")}
    if "fp16" in pointers:
        return None
    chosen = [f"{word} = {launch.named[word]}" for word in CHOICES if word in launch.named]
    return ", ".join([name(launch), *[x for x in TYPES if x in pointers][:1], *chosen])


def first(launches: Iterable[Launch]) -> dict[str, Launch]:
    """The first launch of each key."""
    found: dict[str, Launch] = {}
    for launch in launches:
        if (known := key(launch)) is not None:
            found.setdefault(known, launch)
    return found


def checked(pairs: Iterable[tuple[Launch, Any]]) -> Checked:
    """Facts of the first launch of each key that has a loop, with what triton has compiled of it."""
    compiled = {launch.key: (launch, made) for launch, made in pairs}
    found = {}
    for kernel, known in first(launch for launch, _ in compiled.values()).items():
        launch, made = compiled[known.key]
        if not sass.parse_ptx(made.asm["ptx"]).loops:
            continue
        seen = examined(launch, made)
        load, store = widths(seen.code)
        found[kernel] = {"stack": seen.code.stack, "load": load, "store": store, "iteration": seen.iteration}
    return found


def checked_cuda(codes: dict[str, sass.Code]) -> Checked:
    """Facts of the kernels of csrc/cuda.

    iteration: instructions of each loop without those within, in the order of the code. branches: in each of them, those
    that may divide a warp (BSSY). The first loop takes the rows.
    """
    found = {}
    for kernel, code in sorted(codes.items()):
        load, store = widths(code)
        loops = [code.own(loop) for loop in code.every_loop()]
        branches = [sum(x.base == "BSSY" for x in loop) for loop in loops]
        iteration = [float(len(loop)) for loop in loops]
        found[kernel] = {
            "stack": code.stack,
            "load": load,
            "store": store,
            "iteration": iteration,
            "branches": branches,
        }
    return found


def kept() -> tuple[str, Checked]:
    """The version of triton that the table was written with, and the facts in it."""
    table = json.loads(KEPT.read_text())
    return table["triton"], table["checked"]


def kept_cuda() -> tuple[str | None, Checked]:
    """The version of nvcc that the table was written with, None where there was none, and the facts in it."""
    table = json.loads(KEPT.read_text())
    return table["nvcc"], table["checked_cuda"]


def worse(found: Checked, before: Checked, same_compiler: bool) -> list[str]:
    """What is worse than it was. Instructions and branches compare only for the same compiler."""
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
        if same_compiler and more(now.get("branches", []), was.get("branches", [])):
            said.append(f"{kernel}: {now['branches']} branches in its loops, were {was['branches']}")
    return said


def grown(now: list[float], was: list[float]) -> bool:
    """Whether any loop has more instructions; of other numbers of loops, the largest are compared."""
    pairs = zip(now, was, strict=True) if len(now) == len(was) else [(max(now), max(was))]
    return any(a > GROWTH * b for a, b in pairs)


def more(now: list[int], was: list[int]) -> bool:
    """Whether any loop has more branches; of other numbers of loops, the sums are compared."""
    return any(a > b for a, b in zip(now, was, strict=True)) if len(now) == len(was) else sum(now) > sum(was)

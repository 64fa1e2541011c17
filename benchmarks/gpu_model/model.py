"""From what is launched to a predicted time.

A launch takes the longest of
    memory   bytes of its tensors, each once, or of its loads and stores if these are fewer, over the bandwidth; of tensors
             for all tokens those of used tokens (`source.TOUCHED`)
    L2       bytes of the loads of all blocks, and of what they store, over the bandwidth of the second cache
    tensor   operations of its matrix instructions over the rate, on 9.0 with mma.sync over what that reaches
    units    the busiest unit of a processor: instructions issued (four a cycle), multiplications and sums, integers,
             float64, special functions, lines of memory (one a cycle) with the conflicts of shared memory
    waits    waves of blocks, times what a warp takes on its own
and OVERHEAD on top. A call of the library takes the longer of bytes over bandwidth and operations over rate, and OVERHEAD.
Not in it: hits in the first cache, warps that wait for each other at barriers, power, branches not taken, and the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.gpu_model import sass, source
from benchmarks.gpu_model.counts import Executed, executed, iterations
from benchmarks.gpu_model.devices import Device, resident
from benchmarks.gpu_model.lanes import Warps
from benchmarks.gpu_model.latency import latency
from benchmarks.gpu_model.launches import Launch
from benchmarks.gpu_model.record import Call, size

OVERHEAD = 2e-6  # seconds from one kernel of a stream to the next


@dataclass
class Compiled:
    """A compiled kernel. shared: bytes of a block."""

    code: sass.Code
    ptx: str
    warps: int
    shared: int
    iteration: list[float]


@dataclass
class Predicted:
    """One launch. of: what sets the time; unknown: the loop whose turns nobody knows, and then there is no time."""

    kernel: str
    blocks: int
    warps: int
    registers: int
    shared: int
    stack: int
    occupancy: float  # of the warps that a processor holds
    waves: float
    instructions: int  # that a warp executes
    iteration: list[float]  # instructions an iteration of the innermost loops, or of a kernel without one
    load: int  # bits a thread, as `widths` says
    store: int
    tensor: bool
    bytes: int
    of: str
    seconds: float | None
    unknown: str = ""


def examined(launch: Launch, made: Any) -> Compiled:
    """made: what triton has compiled."""
    code, ptx = sass.only(made.asm["cubin"]), made.asm["ptx"]
    loops = source.loops(launch.function, launch.kernel, launch.named)
    return Compiled(code, ptx, made.metadata.num_warps, made.metadata.shared, iterations(code, ptx, loops))


def predict(launch: Launch, made: Compiled, device: Device, facts: dict[str, Any]) -> Predicted:
    """A launch of a Triton kernel."""
    facts = launch.named | facts | {"launched": launch.grid}
    loops = source.loops(launch.function, launch.kernel, facts)
    tensors = {
        id(x): round(size(x) * source.touched(launch.kernel, name, facts))
        for name, x in launch.named.items()
        if isinstance(x, Tensor)
    }
    kind = "half" if any("bf16" in x or "fp16" in x for x in launch.source[0].values()) else "tf32"
    warps = Warps(made.ptx, 32 * made.warps, launch.numbers)
    found = executed(made.code, made.ptx, loops, warps)
    return timed(launch.kernel, made, math.prod(launch.grid), sum(tensors.values()), found, kind, device, warps)


def timed(
    kernel: str, made: Compiled, blocks: int, bytes: int, found: Executed | str, kind: str, device: Device,
    lanes: Warps | None = None,
) -> Predicted:  # fmt: skip
    """kind: of the products of matrix instructions, as `Device.rate` names it."""
    code, held = made.code, resident(device, made.code.registers, made.warps, made.shared)
    known, waves = Executed() if isinstance(found, str) else found, blocks / (device.processors * held)
    busiest = math.ceil(blocks / device.processors) * made.warps  # warps of the busiest processor
    idle = max(1.0, 4 / max(1, min(busiest, held * made.warps)))  # fewer warps than schedulers
    cycles = {"issue": idle * known.instructions / 4, "lines": known.lines}  # of a warp
    for unit, count in known.units.items():
        cycles[unit] = count * 32 / device.lanes(unit)
    parts = {unit: busiest * each / device.clock for unit, each in cycles.items()}
    warps = blocks * made.warps
    parts["memory"] = min(bytes, warps * known.moved) / device.bandwidth
    stored = min(bytes, warps * known.stored)  # each number once
    parts["L2"] = (warps * (known.moved - known.stored) + stored) / (device.second_cache * device.clock)
    tensor = known.tensor_operations + known.synchronous * (1 / device.synchronous - 1)
    parts["tensor"] = warps * tensor / device.rate(kind)
    rate = device.rate(kind) / device.processors / device.clock
    alone = 0.0 if isinstance(found, str) else latency(code, known.turns, lanes, rate)
    parts["waits"] = math.ceil(waves) * alone / device.clock
    of, unknown = max(parts, key=parts.__getitem__), found if isinstance(found, str) else ""
    return Predicted(
        kernel, blocks, made.warps, code.registers, made.shared, code.stack, held * made.warps / device.warps, waves,
        round(known.instructions), made.iteration, *widths(code), any(map(sass.on_tensor_cores, code.instructions)), bytes,
        *(("", None, unknown) if unknown else (of, parts[of] + OVERHEAD, "")),
    )  # fmt: skip


def widths(code: sass.Code) -> tuple[int, int]:
    """Bits a thread of the widest load and store in a loop, or of the whole kernel if it has none there."""
    looped = [x for loop in code.loops for x in code.body(loop)]
    every = code.instructions
    load = sass.widest(looped, "LDG", "LDGSTS") or sass.widest(every, "LDG", "LDGSTS")
    return load, sass.widest(looped, "STG") or sass.widest(every, "STG")


def library(call: Call, device: Device) -> float:
    """Seconds of a kernel of the library."""
    return max(call.bytes / device.bandwidth, call.operations / device.rate(call.kind)) + OVERHEAD

"""How long one warp takes on its own: its instructions in their order, each when the registers that it reads are there.

More warps hide this, so it bounds a launch only where a processor holds few of them. Of an `if` both branches are counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from benchmarks.gpu_model import sass
from benchmarks.gpu_model.lanes import Warps
from benchmarks.gpu_model.sass import Code, Instruction, Loop

# Cycles until a result is there. Of arithmetic: Jia et al., arXiv 1804.06826, for 7.0, whose pipeline the later ones keep. Of
# memory and mma.sync: Luo et al., arXiv 2402.13499, for 8.0 and 9.0; its 29 of shared memory stand for everything that
# signals its end: shuffles, special functions, conversions, barriers.
WAIT = 500  # of a load from the cache between processors, or beyond
ARITHMETIC, FLOAT64, SIGNALLED, MATRIX = 4, 8, 29, 33
FIXED = "FFMA FMUL FADD FSETP FSEL FMNMX FFMA2 FMUL2 FADD2 IMAD IADD3 VIADD LOP3 ISETP SEL SHF PRMT LEA MOV PLOP3 IMNMX"
FIXED += (
    " VIMNMX IABS SGXT BMSK HFMA2 HADD2 HMUL2 CS2R UMOV UIADD3 ULEA ULOP3 UISETP USHF UIMAD USEL UPRMT LDC ULDC P2R R2P"
)
CYCLES = dict.fromkeys(FIXED.split(), ARITHMETIC)
CYCLES |= dict.fromkeys(("DFMA", "DMUL", "DADD", "DSETP"), FLOAT64) | dict.fromkeys(("HMMA", "IMMA", "DMMA"), MATRIX)
CYCLES |= dict.fromkeys(("LDG", "ATOMG", "ATOM"), WAIT)
NO_RESULT = (
    "STG STS STSM RED REDG LDGSTS BRA EXIT BAR DEPBAR LDGDEPBAR WARPGROUP FENCE MEMBAR WARPSYNC BSSY BSYNC NOP".split()
)


class _Warp:
    def __init__(self, code: Code, turns: Mapping[int, float], warps: Warps | None, rate: float):
        self.code, self.turns, self.warps, self.rate = code, turns, warps, rate
        self.now = 0.0
        self.ready: dict[str, float] = {}  # when a register holds its result
        self.copies: list[float] = []  # when each group of copies to shared memory has arrived
        self.copied = self.multiplied = 0.0
        self.known: dict[int, tuple] = {}

    def run(self, first: int, last: int, loops: list[Loop]) -> None:
        at, within = first, iter([*loops, None])
        loop = next(within)
        while at <= last:
            if loop is not None and at == loop.first:
                self.loop(loop)
                at, loop = loop.last + 1, next(within)
            else:
                self.step(at)
                at += 1

    def loop(self, loop: Loop) -> None:
        """Once or twice, and then the clock goes on as if it ran as often again: each time as long as the last."""
        turns = self.turns.get(id(loop), 0.0)
        passes = min(2, math.ceil(turns))  # none of a copy that is for other cases
        before = self.now
        for _ in range(passes):
            before = self.now
            self.run(loop.first, loop.last, loop.inner)
        self.shift((turns - passes) * (self.now - before))

    def shift(self, cycles: float) -> None:
        """The clock, and with it what is on its way."""
        self.now += cycles
        self.ready = {name: at + cycles for name, at in self.ready.items()}
        self.copies = [at + cycles for at in self.copies]
        self.copied, self.multiplied = self.copied + cycles, self.multiplied + cycles

    def step(self, at: int) -> None:
        x = self.code.instructions[at]
        if at not in self.known:
            cost = self.warps.of(x) if self.warps is not None else None
            self.known[at] = *registers(x), 0.0 if cost is None else max(0.0, cost[0] - 1)
        results, needed, conflicts = self.known[at]
        self.now = max([self.now + 1, *(self.ready.get(name, 0.0) for name in needed)])
        if x.base == "LDGSTS":
            self.copied = self.now + conflicts + WAIT
        elif x.base == "LDGDEPBAR":
            self.copies.append(self.copied)
        elif x.base == "DEPBAR":
            kept = int((re.findall(r"0x([0-9a-f]+)", x.operands) or ["0"])[-1], 16)
            self.now = max([self.now, *self.copies[: len(self.copies) - kept]])
            self.copies = self.copies[len(self.copies) - kept :]
        elif x.base == "HGMMA":  # runs beside the warp, one after the other
            operations = 4 * sass.tensor_operations(x)
            self.multiplied = max(self.now, self.multiplied) + operations / self.rate
        elif x.base == "WARPGROUP" and "DEPBAR" in x.opcode:
            self.now = max(self.now, self.multiplied)
        elif x.base == "BAR":
            self.now += SIGNALLED
        for name in results:
            self.ready[name] = self.now + conflicts + CYCLES.get(x.base, SIGNALLED)


def latency(code: Code, turns: Mapping[int, float], warps: Warps | None, rate: float) -> float:
    """Cycles of one warp. turns: of each loop, by its id; rate: operations of matrix instructions a cycle and processor."""
    warp = _Warp(code, turns, warps, rate)
    warp.run(0, len(code.instructions) - 1, code.loops)
    return warp.now


def registers(x: Instruction) -> tuple[list[str], list[str]]:
    """Those that an instruction writes, and those that it reads."""
    parts = re.split(r",\s*", x.operands) if x.operands else []
    if x.base in NO_RESULT:
        return [], _names(f"{x.predicate} {x.operands}")
    width = 4 if ".128" in x.opcode or x.base == "HMMA" else 2 if re.search(r"\.(64|WIDE)\b", x.opcode) else 1
    width = max(width, 2 if x.base in ("DFMA", "DMUL", "DADD", "CS2R") else 1)
    count = 2 if x.base.endswith("SETP") or x.base == "PLOP3" else 1  # two predicates come out
    written = [name for part in parts[:count] for name in _names(part, width)]
    return written, _names(" ".join([x.predicate, *parts[count:]]))


def _names(text: str, width: int = 1) -> list[str]:
    found = []
    for prefix, number, wide in re.findall(r"\b(UR|UP|R|P)(\d+)(\.64)?", text):
        found += [f"{prefix}{int(number) + i}" for i in range(max(width, 2 if wide else 1))]
    return found

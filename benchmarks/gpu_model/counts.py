"""What a warp executes: the instructions of the machine code, times how often the loops that hold them run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.gpu_model import sass
from benchmarks.gpu_model.lanes import LINE, WARP, Warps
from benchmarks.gpu_model.sass import Code, Frame, Instruction, Loop
from benchmarks.gpu_model.source import SourceLoop

# kinds of work that the compiler neither adds nor drops when it unrolls, in PTX and in machine code: the first that a
# loop has gives how many iterations one pass through its machine code is
KINDS = (
    ("tensor", r"(wgmma\.mma|mma\.sync|tcgen05\.mma)", ("HMMA", "DMMA", "HGMMA", "UTCHMMA", "UTCQMMA")),
    ("global", r"(ld\.global|st\.global|cp\.async\.c|atom|red\.)", "LDG STG LDGSTS ATOMG ATOM RED REDG".split()),
    ("shared", r"(ld\.shared|st\.shared|ldmatrix)", ("LDS", "STS", "LDSM")),
    ("float", r"(fma|mul|add|sub)\.\w*\.?(f32|f64)", ("FFMA", "FMUL", "FADD", "DFMA", "DMUL", "DADD")),
)
UNITS = {
    "integer": "IADD3 LOP3 ISETP SHF SEL FSEL FSETP FMNMX PRMT LEA VIADD IABS IMNMX PLOP3",
    "multiply": "FFMA FMUL FADD IMAD HFMA2 HADD2 HMUL2 FFMA2 FMUL2 FADD2",
    "float64": "DFMA DMUL DADD DSETP DMNMX",
    "special": "MUFU F2F I2F F2I POPC FLO BREV",
}
UNIT = {opcode: unit for unit, opcodes in UNITS.items() for opcode in opcodes.split()}
MEMORY = "LDG STG LDGSTS ATOMG ATOM RED REDG LDS STS LDSM STSM ATOMS".split()


class PtxLoop(NamedTuple):
    at: Frame  # its source loop
    kinds: Counter  # of its own work
    works: bool  # whether there is any in it
    inner: bool  # whether it has loops within


@dataclass
class Executed:
    """By one warp. units: instructions by the unit that executes them; lines: of 128 bytes that go through a processor's
    memory, conflicts of its banks among them; moved: bytes of global loads and stores, whole sectors, and stored: those of
    stores; synchronous: of the tensor operations those of mma.sync; turns: of each loop when it is entered, by its id."""

    instructions: float = 0.0
    units: Counter = field(default_factory=Counter)
    lines: float = 0.0
    moved: float = 0.0
    tensor_operations: float = 0.0
    synchronous: float = 0.0
    stored: float = 0.0
    turns: dict[int, float] = field(default_factory=dict)


def executed(code: Code, ptx: str, loops: dict[Frame, SourceLoop], warps: Warps | None = None) -> Executed | str:
    """What one warp executes, or what keeps it unknown. Of an `if` both branches are counted. Without `warps` the threads of
    every access are neighbours."""
    if any(x.base.startswith("UTC") for x in code.instructions):  # of 10.0: waits for them make loops of all the code
        return "matrix instructions on shared memory"
    written, total = ptx_loops(ptx, loops), Executed()
    add(total, code.own(None), 1.0, warps)
    unknown = _add_loops(total, code, code.loops, (), 1.0, 1.0, written, loops, warps)
    return total if unknown is None else unknown


def _add_loops(
    total: Executed, code: Code, some: list[Loop], outer: tuple[Frame, ...], times: float, full: float,
    written: list[PtxLoop], known: dict[Frame, SourceLoop], warps: Warps | None,
) -> str | None:  # fmt: skip
    by_source: dict[Frame, list[Loop]] = {}
    for loop in some:
        by_source.setdefault(_source(code, loop, known, outer), []).append(loop)
    for at, copies in by_source.items():
        source = known.get(at)
        if source is None and not any(_works(code, loop) for loop in copies):  # waits for a barrier
            for loop in copies:
                add(total, code.body(loop), times, warps, full)
                total.turns |= {id(x): 1.0 for x in loop.every()}
            continue
        if source is None or source.trips is None:
            return f"{at[0]}:{at[1]}" if source is None else source.text
        own = [x for x in written if x.at == at]
        around = max(1, sum(x.at == outer[-1] for x in written)) if outer else 1
        places = max(1, round(len(own) / around))  # of a loop that the compiler repeats in an unrolled one
        working = _main([(x, _works(code, x), bool(x.inner)) for x in copies])
        turns = _turns(source.trips * places, [_unrolled(code, loop, own) for loop in working])
        for loop, turn in zip(working, turns, strict=True):
            add(total, code.own(loop), times * turn, warps, full * source.full)
            total.turns[id(loop)] = turn
            around_it = (*outer, at), times * turn, full * source.full
            unknown = _add_loops(total, code, loop.inner, *around_it, written, known, warps)
            if unknown is not None:
                return unknown
    return None


def iterations(code: Code, ptx: str, known: Mapping[Frame, SourceLoop]) -> list[float]:
    """Instructions an iteration of each innermost loop of the source, in its order; of the whole kernel if it has none.

    A loop that the compiler has unrolled counts once: its instructions over the iterations that they are.
    """
    written, found = ptx_loops(ptx, known), {}
    for loop in code.innermost():
        at = _source(code, loop, known)
        unrolled = _unrolled(code, loop, [x for x in written if x.at == at])
        if unrolled >= found.get(at, (0, 0.0))[0]:
            found[at] = unrolled, len(code.body(loop)) / unrolled
    return [round(found[at][1], 1) for at in sorted(found)] or [float(len(code.instructions))]


def _source(code: Code, loop: Loop, known: Mapping[Frame, SourceLoop], around: Container[Frame] = ()) -> Frame:
    """The source loop of a loop: that of its branch; or the outermost, but those `around`, that some of its own instructions
    come from, or most of them are in. The branch of an outer loop may bear a line of one within, or of a function there."""
    frames, own = code.instructions[loop.last].frames, [x.frames for x in code.own(loop)]
    left = [at for at in known if at not in around]  # an outer loop comes before those within
    inside = {at: sum(any(known[at].holds(frame) for frame in x) for x in own) for at in left}
    branch, controlled = [frame for frame in frames if frame in left], [at for at in left if any(at in x for x in own)]
    if branch and loop.inner:
        branch = [at for at in controlled if any(map(known[at].holds, frames))] or branch
    ways = branch, controlled, [at for at in left if inside[at] > len(own) / 2]
    return next((found[0] for found in ways if found), frames[0] if frames else ("", 0))


def _unrolled(code: Code, loop: Loop, written: list[PtxLoop]) -> int:
    """Iterations of the source that one pass through the machine code of a loop is; one if there are loops within."""
    if loop.inner:
        return 1
    for kind, _, opcodes in KINDS:
        one = max((x.kinds[kind] for x in written), default=0)
        if one:
            return max(1, round(sum(x.base in opcodes for x in code.own(loop)) / one))
    return 1


def _main(copies: list[tuple[Any, bool, bool]]) -> list[Any]:
    """Of the copies of a loop, each with whether it works and has loops within, those that run: compilers make others for
    when the loop within never runs."""
    working = [x for x in copies if x[1]] or copies
    return [x for x, *_ in [x for x in working if x[2]] or working]


def _works(code: Code, loop: Loop) -> bool:
    return any(x.base in opcodes for x in code.body(loop) for _, _, opcodes in KINDS)


def _turns(iterations: float, unrolled: list[int]) -> list[float]:
    """Passes through each copy of a loop: the most unrolled first, the others take what it leaves over."""
    turns, left, sizes = [0.0] * len(unrolled), iterations, sorted(set(unrolled), reverse=True)
    for size in sizes:
        places = [i for i, x in enumerate(unrolled) if x == size]
        each = left / len(places) / size
        if size != sizes[-1]:
            each = float(int(each))
        for i in places:
            turns[i] = each
        left -= each * size * len(places)
    return turns


def ptx_loops(ptx: str, known: Mapping[Frame, SourceLoop]) -> list[PtxLoop]:
    """The loops of PTX, in their order."""
    code, found = sass.parse_ptx(ptx), []

    def walk(loops: list[Loop], around: tuple[Frame, ...]) -> None:
        for loop in loops:
            at = _source(code, loop, known, around)
            kinds = Counter(_kind(x.opcode) for x in code.own(loop))
            found.append(PtxLoop(at, kinds, any(_kind(x.opcode) for x in code.body(loop)), bool(loop.inner)))
            walk(loop.inner, (*around, at))

    walk(code.loops, ())
    return [x for at in known for x in _main([(x, x.works, x.inner) for x in found if x.at == at])]


def _kind(line: str) -> str:
    return next((kind for kind, pattern, _ in KINDS if re.search(rf"\b{pattern}", line)), "")


def add(total: Executed, some: list[Instruction], times: float, warps: Warps | None = None, full: float = 1.0) -> None:
    """full: the share of the accesses to memory that are not masked off."""
    total.instructions += times * len(some)
    for x in some:
        if x.base in UNIT:
            total.units[UNIT[x.base]] += times
        lines, moved = _memory(x, warps)
        total.lines += times * full * lines
        total.moved += times * full * moved
        total.stored += times * full * moved * (x.base == "STG")
        operations = sass.tensor_operations(x)
        total.tensor_operations += times * operations
        total.synchronous += times * operations * (x.base in ("HMMA", "DMMA", "IMMA"))


def _memory(x: Instruction, warps: Warps | None) -> tuple[float, float]:
    """Lines of 128 bytes that an instruction of a warp moves, and bytes of global memory."""
    if x.base not in MEMORY:
        return sass.operand_bytes(x) / LINE, 0.0
    if warps is not None and (known := warps.of(x)) is not None:
        return known
    width = sass.bits(x) or (128 if ".128" in x.opcode or x.base == "LDSM" else 64 if ".64" in x.opcode else 32)
    return max(1, width // 32), WARP * sass.bits(x) / 8

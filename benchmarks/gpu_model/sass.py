"""Reads compiled kernels: registers, instructions, loops, and the widths of their loads and stores."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton

from probsym_fast._files import write_atomically

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KEPT = Path(__file__).parents[2] / "build" / "gpu_model"
Frame = tuple[str, int]  # file name, line

_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+):")
_SECTION = re.compile(r"^\.text\.(\S+):")


@dataclass
class Instruction:
    address: int
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    predicate: str  # such as @!P0, or nothing
    frames: tuple[Frame, ...]  # the source lines that it comes from, innermost first

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]


@dataclass
class Loop:
    """A range of code that a branch at its end leads back to."""

    first: int  # position of its first instruction
    last: int  # position of the branch
    inner: list[Loop] = field(default_factory=list)

    def every(self) -> Iterable[Loop]:
        yield self
        for loop in self.inner:
            yield from loop.every()


@dataclass
class Code:
    """The machine code of one kernel."""

    name: str
    instructions: list[Instruction]
    loops: list[Loop]  # the outermost ones, in order
    registers: int = 0
    shared: int = 0  # bytes of static shared memory, as ptxas counts them
    stack: int = 0  # bytes of stack and local memory: spilled registers

    def every_loop(self) -> list[Loop]:
        return [inner for loop in self.loops for inner in loop.every()]

    def innermost(self) -> list[Loop]:
        return [loop for loop in self.every_loop() if not loop.inner]

    def own(self, loop: Loop | None) -> list[Instruction]:
        """The instructions of a loop, or of no loop, without those of the loops within."""
        inner = self.loops if loop is None else loop.inner
        first, last = (0, len(self.instructions) - 1) if loop is None else (loop.first, loop.last)
        return [self.instructions[i] for i in range(first, last + 1) if not any(x.first <= i <= x.last for x in inner)]

    def body(self, loop: Loop) -> list[Instruction]:
        return self.instructions[loop.first : loop.last + 1]


def read(cubin: bytes) -> dict[str, Code]:
    """Every kernel in a cubin, by its name."""
    codes = parse(_listing(cubin))
    for name, used in usage(cubin).items():
        code = codes[name]
        code.registers, code.shared, code.stack = used["REG"], used["SHARED"], used["STACK"] + used["LOCAL"]
    return codes


def only(cubin: bytes) -> Code:
    """The kernel of a cubin that has one."""
    (code,) = read(cubin).values()
    return code


def usage(cubin: bytes) -> dict[str, dict[str, int]]:
    """REG, STACK, LOCAL and others of every kernel in a cubin."""
    with _file(cubin) as path:
        text = _run("cuobjdump", "--dump-resource-usage", path)
    found = re.findall(r"Function (\S+):\s+(REG:.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


def _listing(cubin: bytes) -> str:
    """What nvdisasm says, which takes it half a second; kept in build/."""
    kept = KEPT / f"{hashlib.sha256(cubin).hexdigest()[:32]}.gz"
    if kept.exists():
        return gzip.decompress(kept.read_bytes()).decode()
    with _file(cubin) as path:
        text = _run("nvdisasm", "-gi", "-c", path)
    write_atomically(kept, lambda file: file.write(gzip.compress(text.encode(), 1)))
    return text


@contextlib.contextmanager
def _file(cubin: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield file.name


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> dict[str, Code]:
    """The kernels of a listing of nvdisasm -gi -c."""
    codes = {}
    for name, lines in _sections(listing):
        instructions, targets = _instructions(lines)
        codes[name] = Code(name, instructions, _nested(_backward(instructions, targets)))
    return codes


def _sections(listing: str) -> Iterable[tuple[str, list[str]]]:
    name, lines = None, []
    for line in listing.splitlines():
        if (match := _SECTION.match(line)) is not None:
            name, lines = match[1], []
        elif name is not None and line.startswith(("//----", "\t.section")):
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)
    if name is not None:
        yield name, lines


def _instructions(lines: list[str]) -> tuple[list[Instruction], dict[str, int]]:
    """The kernel's own instructions, without subroutines and filling after its end, and where each label points."""
    found: list[Instruction] = []
    targets: dict[str, int] = {}
    frames: list[Frame] = []
    more = False
    for line in lines:
        if (match := _LINE.search(line)) is not None:
            frames = [*(frames if more else ()), (Path(match[1]).name, int(match[2]))]
            more = True
            continue
        if (match := _LABEL.match(line)) is not None:
            targets[match[1]] = len(found)
        elif line.startswith("$"):  # a subroutine, of slow paths that are hardly taken
            break
        elif (match := _INSTRUCTION.match(line)) is not None:
            more = False
            found.append(Instruction(int(match[1], 16), match[3], match[4], match[2] or "", tuple(frames)))
    while found and (found[-1].base == "NOP" or _to_itself(found, targets)):  # after the end
        found.pop()
    return found, targets


def _to_itself(some: list[Instruction], targets: dict[str, int]) -> bool:
    """Whether the last instruction is a branch to itself, as after the end; another may be the way back of a loop."""
    match = re.search(r"\((\.L_\w+)\)", some[-1].operands) if some[-1].base == "BRA" else None
    return match is not None and targets.get(match[1]) == len(some) - 1


def _backward(instructions: list[Instruction], targets: dict[str, int]) -> list[tuple[int, int]]:
    """(first, last) of every loop; branches back to the same place are one loop."""
    ends: dict[int, int] = {}
    for i, x in enumerate(instructions):
        if x.base == "BRA" and (match := re.search(r"\((\.L_\w+)\)", x.operands)) is not None:
            target = targets.get(match[1], i + 1)
            if target < i:
                ends[target] = i
    return sorted(ends.items(), key=lambda loop: (loop[0], -loop[1]))


def _nested(ranges: list[tuple[int, int]]) -> list[Loop]:
    """Loops by what they hold; two that overlap are one with two ways back."""
    outer: list[Loop] = []
    stack: list[Loop] = []
    for first, last in ranges:
        while stack and stack[-1].last < first:
            stack.pop()
        if stack and stack[-1].last < last:
            for loop in stack:
                loop.last = max(loop.last, last)
            continue
        loop = Loop(first, last)
        (stack[-1].inner if stack else outer).append(loop)
        stack.append(loop)
    return outer


def parse_ptx(ptx: str) -> Code:
    """PTX in the same form: the opcode of an instruction is all of its text."""
    files = {int(n): Path(path).name for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M)}
    found: list[Instruction] = []
    targets: dict[str, int] = {}
    frames: tuple[Frame, ...] = ()
    for line in map(str.strip, ptx.splitlines()):
        if line.startswith(".loc"):
            places = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", line)
            frames = tuple((files.get(int(file), ""), int(number)) for file, number in places)
        elif (match := re.match(r"\$(\w+):", line)) is not None:
            targets[f".L_{match[1]}"] = len(found)
        elif (match := re.search(r"\bbra(?:\.uni)?\s+\$(\w+)", line)) is not None:
            found.append(Instruction(len(found), "BRA", f"(.L_{match[1]})", "", frames))
        elif line.endswith(";"):
            found.append(Instruction(len(found), line, "", "", frames))
    return Code("", found, _nested(_backward(found, targets)))


def bits(instruction: Instruction) -> int:
    """Bits a thread of a global load or store; 0 for any other instruction."""
    if instruction.base not in ("LDG", "STG", "LDGSTS"):
        return 0
    parts = instruction.opcode.split(".")
    for width in ("128", "64", "256"):
        if width in parts:
            return int(width)
    return {"U8": 8, "S8": 8, "U16": 16, "S16": 16}.get(
        next((x for x in parts if x in ("U8", "S8", "U16", "S16")), ""), 32
    )


def widest(instructions: Iterable[Instruction], *bases: str) -> int:
    return max((bits(x) for x in instructions if x.base in bases), default=0)


def tensor_operations(instruction: Instruction) -> int:
    """Operations of a warp's matrix instruction, from its shape; 0 for those of 10.0, whose size is data."""
    if instruction.base in ("HMMA", "DMMA", "IMMA"):
        match = re.search(r"\.(\d+)\.", instruction.opcode + ".")
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4), "884": (8, 8, 4)}.get(
            match[1] if match else "", (0, 0, 0)
        )
        return 2 * m * n * k
    if instruction.base in ("HGMMA", "QGMMA"):
        match = re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.opcode)
        return 2 * int(match[1]) * int(match[2]) * int(match[3]) // 4 if match else 0  # of a group of four warps
    return 0


def on_tensor_cores(instruction: Instruction) -> bool:
    return instruction.base in (
        "HMMA",
        "DMMA",
        "IMMA",
        "HGMMA",
        "QGMMA",
        "UTCHMMA",
        "UTCQMMA",
        "UTCOMMA",
        "OMMA",
        "QMMA",
    )

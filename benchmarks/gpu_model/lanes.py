"""What the threads of a warp access together: the addresses in PTX, evaluated for every thread of the first block.

Address arithmetic is a few integer operations on the thread's number and the launch's arguments, so it can be computed. Of
each access this gives the passes through the banks of shared memory (conflicts), or the lines and sectors of global memory
(coalescing). Loops are entered once. A list in memory is taken to hold 0, 1, 2, ..., so neighbours look up rows that are
neighbours, and a condition on its numbers holds. Where an address does not follow from all this, the access counts as one of
neighbours.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu_model import sass
from benchmarks.gpu_model.sass import Code, Frame, Instruction, Loop

WARP, BANKS, LINE, SECTOR = 32, 32, 128, 32
# what PTX calls the accesses, and machine code
ACCESSES = {
    "ld.shared": ("LDS",),
    "st.shared": ("STS",),
    "ldmatrix": ("LDSM",),
    "stmatrix": ("STSM",),
    "ld.global": ("LDG",),
    "st.global": ("STG",),
    "cp.async": ("LDGSTS",),
}
KIND = {opcode: kind for kind, opcodes in ACCESSES.items() for opcode in opcodes}

_STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s+(.*);$")
_ADDRESS = re.compile(r"\[\s*(%?[\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_COMPARE = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


@dataclass(frozen=True, eq=False)
class Access:
    """One access in PTX. shared, device: the addresses of the threads, None where it does not touch that memory."""

    kind: str
    frames: tuple[Frame, ...]
    bits: int  # a thread
    shared: np.ndarray | None
    device: np.ndarray | None
    active: np.ndarray  # threads that take part
    pointer: str = ""  # the parameter that the address in global memory comes from
    wrapped: bool = (
        False  # whether a number of 32 bits on the way to it was too large for them, in a thread that takes part
    )

    def cost(self, bits: int) -> tuple[float, float]:
        """Passes of 128 bytes through a processor's memory, and bytes of the sectors of global memory that are touched: means
        over the warps. bits: a thread's in machine code, where several accesses in PTX may have become one."""
        if self.kind.endswith("matrix"):  # rows of 16 bytes
            return _mean(_passes(self.shared, 128, self.active)), 0.0
        shared, device = (None if x is None else x - x % max(1, bits // 8) for x in (self.shared, self.device))
        passes = 0.0 if shared is None else _mean(_passes(shared, bits, self.active))
        if device is None:
            return passes, 0.0
        lines, sectors = (_mean(_touched(device, bits, self.active, size)) for size in (LINE, SECTOR))
        return max(passes, lines), SECTOR * sectors


class Value(NamedTuple):
    """Of a register, in every thread. loaded: whether it depends on a number in memory; pointer, wrapped: as in `Access`."""

    each: np.ndarray
    loaded: bool = False
    pointer: str = ""
    wrapped: np.ndarray | bool = False


class Warps:
    """The accesses of a kernel's PTX.

    threads: of a block; arguments: numbers by parameter in their order, None for pointers. block, grid: which one of how
    many. held: the number that the memory of a pointer holds; None: 0, 1, 2, ... turns: of each loop; then the loops are
    entered again, as in their last turn, where what a turn adds is always the same.
    """

    def __init__(
        self, ptx: str, threads: int, arguments: Mapping[str, Any], block: Sequence[int] = (0, 0, 0),
        grid: Sequence[int] = (1, 1, 1), held: Callable[[str], int] | None = None,
        turns: Callable[[Code, Loop], float] | None = None,
    ):  # fmt: skip
        self.threads, self.arguments, self.held = np.arange(threads, dtype=np.int64), list(arguments.items()), held
        sizes = (("ctaid", (*block, 0, 0)), ("nctaid", (*grid, 1, 1)))
        self.special = {f"%{name}.{axis}": of[i] for name, of in sizes for i, axis in enumerate("xyz")}
        self.registers: dict[str, Value | None] = {}
        self.accesses: list[Access] = []
        self.code = sass.parse_ptx(ptx)
        self._run(0, len(self.code.instructions) - 1, self.code.loops, turns)
        self._known: dict[tuple, tuple[float, float] | None] = {}
        self._found: dict[Any, list[Access]] = {}
        for one in self.accesses:
            for key in ((one.kind, one.frames[:2]), (one.kind, one.frames[:1]), one.kind):
                self._found.setdefault(key, []).append(one)

    def of(self, x: Instruction) -> tuple[float, float] | None:
        """`Access.cost` of a warp's instruction: the mean of the accesses of its line; None where nothing is known."""
        key = KIND.get(x.base), x.frames[:2], width(x)
        if key not in self._known:
            self._known[key] = self._mean(*key)
        return self._known[key]

    def _mean(self, kind: str | None, frames: tuple[Frame, ...], bits: int) -> tuple[float, float] | None:
        for key in ((kind, frames), (kind, frames[:1]), kind):
            if (some := self._found.get(key)) is not None:
                passes, bytes = zip(*(one.cost(bits) for one in some), strict=True)
                return _mean(passes), _mean(bytes)
        return None

    def _run(self, first: int, last: int, loops: list[Loop], turns: Callable[[Code, Loop], float] | None) -> None:
        at = first
        for loop in [*loops, None] if turns is not None else [None]:
            while at <= (last if loop is None else loop.first - 1):
                match = _STATEMENT.match(self.code.instructions[at].opcode)
                if match is not None:
                    self._step(*match.groups(), self.code.instructions[at].frames)
                at += 1
            if loop is not None and turns is not None:
                before = dict(self.registers)
                self._run(loop.first, loop.last, loop.inner, turns)
                self._go_on(before, turns(self.code, loop) - 1)
                self._run(loop.first, loop.last, loop.inner, turns)
                at = loop.last + 1

    def _go_on(self, before: dict[str, Value | None], turns: float) -> None:
        """What each register that a turn has changed holds after as many more."""
        for name, x in self.registers.items():
            was = before.get(name)
            if turns > 0 and x is not None and was is not None and name[1] == "r":
                exact = was.each + int(turns) * (x.each - was.each)
                each = exact if name.startswith("%rd") else _as(exact, "b32")
                self.registers[name] = x._replace(each=each, wrapped=x.wrapped | (each != exact))

    def _step(self, negated: str, predicate: str | None, opcode: str, operands: str, frames: tuple[Frame, ...]) -> None:
        parts = opcode.replace("::cta", "").split(".")
        kind = ".".join(parts[:2])
        if kind in ("ldmatrix.sync", "stmatrix.sync"):
            kind = parts[0]
        if kind in ACCESSES and "[" in operands:  # not cp.async.wait_group
            self._access(kind, parts, operands, self._active(negated, predicate), frames)
        names = re.findall(r"%\w+", operands.split(",")[0]) if not operands.startswith("{") else _group(operands)
        if kind.startswith(("ld.", "atom.")):
            for i, name in enumerate(names):
                self.registers[name] = self._load(opcode, operands, i)
        elif names and not kind.startswith(("st.", "cp.", "red.")):
            value = self._value(parts, _split(operands)[1:])
            if predicate is not None and value is not None:
                value = None if self.registers.get(names[0]) is None else value
            self.registers[names[0]] = value
            for name in names[1:]:
                self.registers[name] = None

    def _active(self, negated: str, predicate: str | None) -> np.ndarray:
        """Threads that take part. A condition that holds in none, here at the first turn, says nothing."""
        value = None if predicate is None else self.registers.get(predicate)
        if value is None or value.loaded:
            return np.ones(len(self.threads), bool)
        each = (value.each == 0) if negated else (value.each != 0)
        return each if each.any() else ~each

    def _address(self, text: str) -> Value | None:
        name, offset = text.removeprefix("%"), 0
        match = _ADDRESS.search(text)
        if match is None:
            return None
        name, offset = match[1], int(match[2] or 0)
        base = self._operand(name) if name.startswith("%") else Value(np.zeros_like(self.threads))
        return None if base is None else base._replace(each=base.each + offset)

    def _load(self, kind: str, operands: str, place: int) -> Value | None:
        if kind.startswith("ld.param"):
            number = int(re.findall(r"_param_(\d+)", operands)[0])
            name, given = self.arguments[number] if number < len(self.arguments) else ("", 0)  # others are triton's own
            if isinstance(given, float):
                return None
            each = np.full_like(self.threads, 0 if given is None else int(given))
            return Value(each, pointer=name if given is None else "")
        address = None if "shared" in kind else self._address(operands)
        if address is None or (self.held is not None and not address.pointer):
            return None
        if self.held is not None:
            return Value(np.full_like(self.threads, self.held(address.pointer)), True)
        return Value(address.each // max(1, _bits(kind.split(".")[-1]) // 8) + place, True)

    def _access(
        self, kind: str, parts: list[str], operands: str, active: np.ndarray, frames: tuple[Frame, ...]
    ) -> None:
        found = [self._address(x) for x in re.findall(r"\[[^\]]*\]", operands)]
        addresses = [None if x is None else x.each for x in found]
        shared, device = (addresses[0], None) if "global" not in kind else (None, addresses[0])
        if kind == "cp.async":
            shared, device = addresses[:2]
            bits = 8 * int(re.findall(r"0x([0-9a-f]+)", operands)[0], 16)
        elif kind.endswith("matrix"):
            count = int(next(x for x in parts if re.fullmatch(r"x[124]", x))[1:])
            active, bits = active & (self.threads % WARP < 8 * count), 32 * count
        else:
            number = int(next((x[1:] for x in parts if re.fullmatch(r"v[248]", x)), 1))
            bits = number * _bits(parts[-1])
        if shared is not None or device is not None:
            far = next(
                (x for x, each in zip(found, addresses, strict=True) if each is not None and each is device), None
            )
            wrapped = far is not None and bool((far.wrapped & active).any())
            self.accesses.append(
                Access(kind, frames, bits, shared, device, active, far.pointer if far is not None else "", wrapped)
            )

    def _operand(self, text: str) -> Value | None:
        text = text.strip()
        if text in self.registers:
            return self.registers[text]
        if text == "%tid.x":
            return Value(self.threads)
        if text in self.special:
            return Value(np.full_like(self.threads, self.special[text]))
        if text.startswith("%"):
            return Value(np.zeros_like(self.threads)) if re.match(r"%n?(cta|t)id|%laneid", text) else None
        if re.fullmatch(r"-?\d+", text):
            return Value(np.full_like(self.threads, _wrapped(int(text), 64)))
        return Value(np.zeros_like(self.threads)) if text == "global_smem" else None

    def _value(self, parts: list[str], operands: list[str]) -> Value | None:
        """The result of an operation on integers or conditions; None for others."""
        name, kind = parts[0], parts[-1]
        if kind[0] == "f" and name not in ("mov", "selp"):
            return None
        if name == "cvt":
            if "f" in (parts[-1][0], parts[-2][0]):
                return None
            given = self._operand(operands[0])
            if given is None:
                return None
            exact = _as(given.each, parts[-1])
            each = _as(exact, parts[-2])
            return given._replace(each=each, wrapped=given.wrapped | (each != exact))
        given = [self._operand(x) for x in operands]
        if name == "selp":
            return self._select(*given)
        if name == "and" and kind == "pred":  # what is not known holds
            known = [x.each != 0 for x in given if x is not None and not x.loaded]
            return Value(np.logical_and.reduce(known).astype(np.int64)) if known else None
        if name == "shfl":
            if given[0] is None or "idx" not in parts or not re.fullmatch(r"\d+", operands[1].strip()):
                return None
            lane = self.threads // WARP * WARP + int(operands[1])
            return given[0]._replace(each=given[0].each[lane])
        if not given or any(x is None for x in given):
            return None
        known = [x for x in given if x is not None]
        loaded, each = any(x.loaded for x in known), [x.each for x in known]
        if name in ("min", "max") and known[0].loaded != known[1].loaded and self.held is None:
            return known[0] if known[0].loaded else known[1]
        found = _computed(name, parts, each)
        if found is None:
            return None
        wrapped = functools.reduce(np.logical_or, [x.wrapped for x in known], False)
        if kind[1:] == "32" and name in ("add", "sub", "mul", "mad", "shl") and not {"wide", "hi"} & set(parts):
            wrapped = wrapped | (_computed(name, [*parts[:-1], "s64"], each) != _as(found, "s32"))
        return Value(found, loaded, next((x.pointer for x in known if x.pointer), ""), wrapped)

    def _select(self, yes: Value | None, no: Value | None, condition: Value | None) -> Value | None:
        if condition is None or condition.loaded or yes is None or no is None:
            return yes
        taken = condition.each != 0
        each, wrapped = (np.where(taken, a, b) for a, b in ((yes.each, no.each), (yes.wrapped, no.wrapped)))
        return Value(each, yes.loaded or no.loaded, yes.pointer or no.pointer, wrapped)


def _computed(name: str, parts: list[str], x: list[np.ndarray]) -> np.ndarray | None:
    kind = parts[-1]
    size, wide = _bits(kind), "wide" in parts
    out = f"{kind[0]}{2 * size}" if wide else kind
    a = [_as(y, kind) for y in x]
    if wide and len(a) == 3:
        a[2] = _as(x[2], out)
    with np.errstate(all="ignore"):
        if name in ("mov", "mul", "mad", "add", "sub", "and", "or", "xor", "not", "neg", "abs", "min", "max", "shl"):
            if name in ("mul", "mad") and "hi" in parts:
                if size > 32 or name == "mad":
                    return None
                wider = a[0].astype(np.uint64) * a[1].astype(np.uint64) if kind[0] == "u" else a[0] * a[1]
                return _as((wider >> wider.dtype.type(32)).astype(np.int64), kind)
            found = {
                "mov": lambda: a[0], "mul": lambda: a[0] * a[1], "mad": lambda: a[0] * a[1] + a[2],
                "add": lambda: a[0] + a[1], "sub": lambda: a[0] - a[1], "and": lambda: a[0] & a[1],
                "or": lambda: a[0] | a[1], "xor": lambda: a[0] ^ a[1], "neg": lambda: -a[0], "abs": lambda: np.abs(a[0]),
                "not": lambda: 1 - a[0] if kind == "pred" else ~a[0], "min": lambda: np.minimum(*a),
                "max": lambda: np.maximum(*a), "shl": lambda: a[0] << np.minimum(a[1] & 0xFFFFFFFF, 63),
            }[name]()  # fmt: skip
            return _as(found, out)
        if name == "shr":
            return _as(a[0] >> np.minimum(a[1] & 0xFFFFFFFF, 63), kind)
        if name in ("div", "rem"):
            if not (a[1] != 0).all():
                return None
            whole = np.abs(a[0]) // np.abs(a[1]) * np.sign(a[0]) * np.sign(a[1])
            return _as(whole if name == "div" else a[0] - whole * a[1], kind)
        if name == "bfe":
            found = (a[0] >> a[1]) & ((1 << a[2]) - 1)
            return _as(np.where((found >> (a[2] - 1)) & (kind[0] == "s"), found - (1 << a[2]), found), kind)
        if name == "setp" and parts[1] in _COMPARE:
            return _COMPARE[parts[1]](*a).astype(np.int64)
    return None


def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind) or 64)


def _as(x: np.ndarray, kind: str) -> np.ndarray:
    """Wrapped to a type of PTX: u32, s16, ...; b as s."""
    size = _bits(kind)
    if size >= 64:
        return x
    low = x & ((1 << size) - 1)
    return low if kind[0] == "u" else np.where(low >> (size - 1), low - (1 << size), low)


def _wrapped(x: int, size: int) -> int:
    return (x + (1 << (size - 1))) % (1 << size) - (1 << (size - 1))


def _group(operands: str) -> list[str]:
    return re.findall(r"%\w+", operands[: operands.index("}")])


def _split(operands: str) -> list[str]:
    return [x.strip() for x in re.split(r",(?![^{\[]*[}\]])", operands)]


def _mean(some: Iterable[float]) -> float:
    found = list(some)
    return sum(found) / len(found)


def _touched(addresses: np.ndarray, bits: int, active: np.ndarray, size: int) -> Iterable[int]:
    """Pieces of `size` bytes that each warp touches."""
    for first in range(0, len(addresses), WARP):
        own = addresses[first : first + WARP][active[first : first + WARP]]
        last = own + max(1, bits // 8) - 1
        yield len({piece for a, b in zip(own // size, last // size, strict=True) for piece in range(a, b + 1)})


def _passes(addresses: np.ndarray, bits: int, active: np.ndarray) -> Iterable[int]:
    """Passes of each warp through the banks, one word of a bank in each: half warps of 8 bytes a thread, quarters of 16."""
    words = max(1, bits // 32)
    group = WARP // words
    for first in range(0, len(addresses), WARP):
        total = 0
        for at in range(first, first + WARP, group):
            own = np.unique(addresses[at : at + group][active[at : at + group]] // 4)
            each = np.unique((own[:, None] + np.arange(words)).ravel())
            total += int(np.bincount(each % BANKS, minlength=1).max()) if len(each) else 0
        yield total


def width(x: Instruction) -> int:
    """Bits a thread of an access in machine code."""
    if x.base in ("LDSM", "STSM"):
        return 32 * int(x.opcode.rsplit(".", 1)[-1]) if x.opcode[-1] in "124" else 32
    parts = x.opcode.split(".")
    found = [int(y) for y in parts if y in ("64", "128", "256")]
    return found[-1] if found else next((int(y[1:]) for y in parts if y in ("U8", "S8", "U16", "S16")), 32)

"""Runs the PTX of compiled Triton kernels without a GPU: what the interpreter, which has no compiler, cannot show.

Kernels of scalar arithmetic, shuffles and shared memory. A block's warps run in turn and in random order, each up to the next
barrier; memory that nothing has written holds NaN.
"""

import random
import re

import numpy
import torch

LANES, END = 32, 10**9
TYPES = {
    kind + bits: getattr(numpy, name + bits)
    for kind, name in (("b", "uint"), ("u", "uint"), ("s", "int"), ("f", "float"))
    for bits in ("32", "64")
}
RAW = {4: numpy.uint32, 8: numpy.uint64}
WIDE = {numpy.uint32: numpy.uint64, numpy.int32: numpy.int64}
COMPARE = {"eq": numpy.equal, "ne": numpy.not_equal, "lt": numpy.less, "le": numpy.less_equal}
COMPARE |= {"gt": numpy.greater, "ge": numpy.greater_equal}
BINARY = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply, "max": numpy.fmax, "min": numpy.fmin}
BINARY |= {"and": numpy.bitwise_and, "or": numpy.bitwise_or, "xor": numpy.bitwise_xor}
UNARY = {"neg": numpy.negative, "abs": numpy.abs, "sqrt": numpy.sqrt, "ex2": numpy.exp2, "rcp": numpy.reciprocal}


def parse(text: str) -> tuple[list, dict[str, int]]:
    """The instructions (predicate, negated, name in parts, operands), and where the labels are among them."""
    found, labels = [], {}
    for line in text[text.index("\n{\n") + 3 : text.index("\n}\n")].splitlines():
        line = line.split("//")[0].strip()
        if label := re.match(r"([\w$]+):\s*", line):
            labels[label[1]], line = len(found), line[label.end() :]
        for statement in line.replace("{ .reg", ".reg").split(";"):
            statement = statement.strip()
            if statement and statement[0] != "." and statement not in "{}":
                negated, predicate, name, rest = re.match(r"(?:@(!?)(%p\d+)\s+)?(\S+)\s*(.*)", statement).groups()
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
                found.append((predicate, negated == "!", name.replace("::cta", "").split("."), operands))
    return found, labels


class Warp:
    """The registers of 32 threads, and the instruction that each is at. Those that have run least go first."""

    def __init__(self, code, first, block, blocks, parameters, memory, shared):
        (self.code, self.labels), self.parameters, self.memory, self.shared = code, parameters, memory, shared
        lanes = numpy.arange(LANES, dtype=numpy.uint32)
        self.registers = {"%tid.x": first + lanes}
        for axis, i, count in zip("xyz", block, blocks, strict=False):
            self.registers |= {f"%ctaid.{axis}": lanes * 0 + i, f"%nctaid.{axis}": lanes * 0 + count}
        self.at = numpy.zeros(LANES, numpy.int64)

    def run(self) -> bool:
        """Up to the next barrier, or to the end: whether it is the end."""
        while (now := self.at.min()) < len(self.code):
            active = self.at == now
            predicate, negated, name, operands = self.code[now]
            mask = active if predicate is None else active & (self.value(predicate, bool) ^ negated)
            self.at[active] += 1
            if name[0] == "bra":
                self.at[mask] = self.labels[operands[0]]
            elif name[0] == "ret":
                self.at[mask] = END
            elif name[0] == "bar":
                assert active.all()
                return False
            elif name[0] in ("ld", "st"):
                self.move(name, operands, mask)
            else:
                self.write(operands[0], self.result(name, operands[1:], mask), mask)
        return True

    def value(self, operand: str, kind) -> numpy.ndarray:
        if operand.startswith("%"):
            x = self.registers[operand]
            return x if kind is bool else x.view(kind)
        if operand == "global_smem":
            return numpy.zeros(LANES, kind)
        if kind is bool:
            return numpy.full(LANES, operand != "0")
        raw = RAW[numpy.dtype(kind).itemsize]
        number = int(operand[2:], 16) if re.match("0[fd]", operand) else int(operand, 0)
        return numpy.full(LANES, number % 2 ** (8 * numpy.dtype(raw).itemsize), raw).view(kind)

    def write(self, register: str, x, mask) -> None:
        x = x if x.dtype == bool else x.view(RAW[x.dtype.itemsize])
        if register.startswith("{"):  # halves
            for part, half in zip(register.strip("{} ").split(","), (x & 0xFFFFFFFF, x >> 32), strict=True):
                self.write(part.strip(), half.astype(numpy.uint32), mask)
            return
        before = self.registers.get(
            register, numpy.full(LANES, x.dtype.type(-1) if x.dtype == bool else ~x.dtype.type(0))
        )
        self.registers[register] = numpy.where(mask, x, before)

    def move(self, name, operands, mask) -> None:
        """ld and st, of one register or several."""
        (register, place) = operands if name[0] == "ld" else operands[::-1]
        raw, place = RAW[TYPES[name[-1]](0).itemsize], place.strip("[] ")
        if name[1] == "param":
            x = numpy.array([self.parameters[int(place.rsplit("_", 1)[1])]])
            x = x.view(raw) if x.dtype.itemsize == raw(0).itemsize else x.astype(numpy.int64).astype(TYPES[name[-1]])
            x = x.astype(numpy.int64) if register.startswith("%rd") else x  # widened
            return self.write(register, numpy.repeat(x, LANES), mask)
        base, _, offset = place.partition("+")
        kind = numpy.int64 if base.startswith("%rd") else numpy.int32
        address = self.value(base.strip(), kind).astype(numpy.int64) + int(offset or 0)
        memory = (self.shared if name[1] == "shared" else self.memory).view(raw)
        for k, part in enumerate(register.strip("{} ").split(",")):
            place, rest = numpy.divmod(address[mask] + k * raw(0).itemsize, raw(0).itemsize)
            assert not rest.any() and (place >= 0).all() and (place < len(memory)).all(), (name, operands)
            if name[0] == "ld":
                x = numpy.zeros(LANES, raw)
                x[mask] = memory[place]
                self.write(part.strip(), x, mask)
            else:
                memory[place] = self.value(part.strip(), raw)[mask]

    def result(self, name, operands, mask) -> numpy.ndarray:
        op, kind = name[0], bool if name[-1] == "pred" else TYPES[name[-1]]
        if op == "shfl":
            assert mask.all()
            lane, by = numpy.arange(LANES), self.value(operands[1], numpy.int32)
            source = {"bfly": lane ^ by, "up": numpy.where(lane >= by, lane - by, lane), "idx": by}[name[2]]
            return self.value(operands[0], numpy.uint32)[source]
        if op == "mov" and operands[0].startswith("{"):
            low, high = (self.value(x.strip(), numpy.uint32) for x in operands[0].strip("{} ").split(","))
            return low.astype(numpy.uint64) | high.astype(numpy.uint64) << 32
        if op == "selp":
            return numpy.where(self.value(operands[2], bool), *(self.value(x, kind) for x in operands[:2]))
        if op in ("shl", "shr"):
            by = self.value(operands[1], numpy.uint32).astype(kind)
            return (numpy.left_shift if op == "shl" else numpy.right_shift)(self.value(operands[0], kind), by)
        x, *rest = (self.value(operand, kind) for operand in operands)
        if op == "mov":
            return x
        if op == "cvt":
            return x.astype(TYPES[name[-2]])
        if op == "setp":
            unordered = numpy.isnan(x) | numpy.isnan(rest[0]) if name[-1][0] == "f" else numpy.zeros(LANES, bool)
            if name[1] in ("num", "nan"):
                return unordered == (name[1] == "nan")
            return COMPARE[name[1][:2]](x, *rest) | (unordered & (len(name[1]) == 3))
        if op == "bfe":
            return x >> rest[0] & (1 << rest[1]) - 1
        if op in ("mad", "fma") or name[1] == "wide":
            wide = WIDE.get(kind, numpy.longdouble) if op == "fma" or name[1] == "wide" else kind
            product = x.astype(wide) * rest[0].astype(wide)
            if len(operands) == 3:
                product = product + (self.value(operands[2], wide) if name[1] == "wide" else rest[1].astype(wide))
            return product.astype(kind) if op == "fma" else product
        if op == "div":
            return x / rest[0] if name[-1][0] == "f" else x // numpy.where(rest[0] == 0, 1, rest[0])  # of counts
        return UNARY[op](x) if op in UNARY else BINARY[op](x, *rest)


def run(text: str, warps: int, shared: int, grid: tuple[int, ...], arguments: list) -> None:
    """Runs a kernel for all blocks of a grid; arguments: contiguous tensors, which it changes, and numbers."""
    code, size, places = parse(text), 256, []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            places.append(size)
            size += -(-x.nbytes // 256) * 256 + 256
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    memory = numpy.full(size, 0xFF, numpy.uint8)
    for x, place in zip(tensors, places, strict=True):
        memory[place : place + x.nbytes] = x.view(-1).numpy().view(numpy.uint8)
    left = iter(places)
    parameters = [next(left) if isinstance(x, torch.Tensor) else x for x in arguments]
    with numpy.errstate(all="ignore"):
        for block in numpy.ndindex(*grid):
            own = numpy.full(shared + 16, 0xFF, numpy.uint8)
            going = [Warp(code, LANES * w, block, grid, parameters, memory, own) for w in range(warps)]
            while going:
                going = [warp for warp in random.sample(going, len(going)) if not warp.run()]
    for x, place in zip(tensors, places, strict=True):
        x.view(-1).numpy().view(numpy.uint8)[:] = memory[place : place + x.nbytes]

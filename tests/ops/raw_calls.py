"""Random calls of every operator in `torch.ops.probsym_fast`, most of them invalid: each must work or raise.

    python -m tests.ops.raw_calls SEED FIRST COUNT

runs calls FIRST to FIRST + COUNT - 1 of a seed in this process; a count of 1 prints the call first. A call depends only on
the seed and its own number. It starts from one that an op's Python function makes, breaks up to three of its arguments, and
may run a backward pass after. Tensors end where a page of memory does, and the next page cannot be read: to read past an
argument's end is a segmentation fault, whatever the allocator has put there.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import os
import random
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from probsym_fast.ops import (
    _extension,
    act_orthogonal,
    embed_edges,
    noise,
    orthogonal_frame,
    permutation_entropy,
    readout,
    soft_permutation,
)
from probsym_fast.ops._op import NAMESPACE
from tests.helpers.items import batch, weights
from tests.ops.test_backends import CALLS

SECONDS = 20  # that one call may take
MEMORY = 4 << 30  # bytes that the calls may add to what the process has mapped
EXTREMES = [-1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63)]
FLOATS = [math.nan, math.inf, -math.inf, 0.0, -1.0, 5e-324, 1e-30, 1e-9, 1e38, 1e300]
DTYPES = [
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]

Call = tuple[str, tuple]  # operator, arguments


# --- valid calls ---


class Recorder(TorchDispatchMode):
    """Keeps every call of the namespace that reaches a kernel, gradients included."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == NAMESPACE:
            kept = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in arguments)
            self.calls.append((function._schema.name.split("::")[1], kept))
        return function(*arguments, **(keywords or {}))


def valid_calls() -> list[Call]:
    """At least one call of every operator; float32 and float64, ragged graphs, one and several patches, dense and sparse."""
    torch.manual_seed(3)
    recorder = Recorder()
    for dtype in (torch.float32, torch.float64):
        for shape in ((2, 4, 3, 3), (1, 1, 3, 3)):
            for call in CALLS.values():
                x = torch.randn(shape if shape[0] > 1 else (2, *shape[1:]), dtype=dtype, requires_grad=True)
                with recorder:
                    call(x, "cpu").sum().backward()
        data = batch([5, 0, 3, 7], 7, C=2, S=3, edges=9)
        leaves = [data.scores, data.attr, weights(20, 2, 3, 3), weights(20, 2, 7, 7), torch.randn(4, 3, 9, 20)]
        scores, attr, patched, whole, tokens = (y.to(dtype).requires_grad_() for y in leaves)
        num_nodes = data.ptr.diff().clamp(min=1)
        ptr = torch.cat([data.ptr[:1], num_nodes.cumsum(0)])
        edges = data.edges + (data.edges >= 5)  # the empty graph has got a node
        matrices, vectors = (torch.randn(2, 3, *y, dtype=dtype, requires_grad=True) for y in ((2, 2), (4, 2, 5)))
        with recorder:
            p = soft_permutation(scores, num_nodes, tau=0.1, iterations=3)
            symmetric = torch.cat([edges, edges.flip(0)], 1), torch.cat([attr, attr])
            outs = [
                permutation_entropy(p),
                embed_edges(edges, attr, ptr, p, patched, grid=3, pad_mode="replicate"),
                embed_edges(*symmetric, ptr, p, whole, grid=1),
                readout(tokens, ptr, p, patched, at=edges),
                readout(tokens[:, :, :3], ptr, p, patched[..., 0], at="nodes"),
                act_orthogonal(vectors, orthogonal_frame(matrices), inverse=True),
            ]
            sum(out.sum() for out in outs).backward()
    with recorder:
        noise(torch.tensor(3), (4, 3, 5), "x", rows=torch.arange(4), first=2, forks=(1,), block=2, backend="cpu")
        noise(torch.tensor(3), (2, 3), "x", normal=True, mirrored=True, backend="cpu")
    return recorder.calls


# --- memory that ends where it says ---


class Fence:
    """Places for tensors, each right before a page that cannot be touched."""

    PLACES, PAGES = 64, 8

    def __init__(self):
        self.step = (self.PAGES + 1) * mmap.PAGESIZE
        self.memory, self.next = mmap.mmap(-1, self.PLACES * self.step), 0
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for place in range(self.PLACES):
            end = begin + (place + 1) * self.step - mmap.PAGESIZE
            if protect(end, mmap.PAGESIZE, 0):  # no access
                raise OSError(ctypes.get_errno(), "mprotect")

    def __call__(self, x: Tensor) -> Tensor:
        """A contiguous copy of x; x itself where it is empty or too large."""
        bytes_ = x.numel() * x.itemsize
        if not 0 < bytes_ <= self.PAGES * mmap.PAGESIZE:
            return x
        self.next = (self.next + 1) % self.PLACES
        offset = (self.next + 1) * self.step - mmap.PAGESIZE - bytes_
        place = torch.frombuffer(self.memory, dtype=x.dtype, count=x.numel(), offset=offset)
        return place.view(x.shape).copy_(x)


# --- invalid ones ---


def other_rank(rng: random.Random, x: Tensor) -> Tensor:
    if x.ndim == 0:
        return x.expand(rng.choice([1, 2]))
    axis = rng.randrange(x.ndim)
    ways = [lambda: x.unsqueeze(axis), lambda: x.flatten(), lambda: x.flatten()[:1].sum(), lambda: x[None, None]]
    return rng.choice([*ways, lambda: x.select(axis, 0)] if x.shape[axis] else ways)()


def other_size(rng: random.Random, x: Tensor) -> Tensor:
    if x.ndim == 0:
        return x
    axis = rng.randrange(x.ndim)
    size = rng.choice([0, 1, max(0, x.shape[axis] - 1), x.shape[axis] + 1, 2 * x.shape[axis]])
    whole = torch.cat([x, x, x[:1] if axis == 0 else x.narrow(axis, 0, min(1, x.shape[axis]))], axis)
    return whole.narrow(axis, 0, min(size, whole.shape[axis])).contiguous()


def empty(rng: random.Random, x: Tensor) -> Tensor:
    if x.ndim == 0:
        return x
    shape = [0, *(rng.choice([0, n, 2**40]) for n in x.shape[1:])]
    return x.new_empty(shape).permute(rng.sample(range(x.ndim), x.ndim))


def other_strides(rng: random.Random, x: Tensor) -> Tensor:
    if x.ndim == 0:
        return x
    axis = rng.randrange(x.ndim)
    ways = [
        lambda: x.repeat_interleave(2, axis).narrow(axis, 0, 2 * x.shape[axis])[
            (slice(None),) * axis + (slice(None, None, 2),)
        ],
        lambda: x.narrow(axis, 0, min(1, x.shape[axis])).expand(x.shape),
        lambda: x.mT.contiguous().mT if x.ndim > 1 else x,
        lambda: x.flatten()[:1].as_strided(x.shape, (0,) * x.ndim),
        lambda: x.transpose(0, axis),
        lambda: torch.cat([x.flatten(), x.flatten()])[1 : 1 + x.numel()].view(x.shape),
    ]
    return rng.choice(ways)()


def gigantic(rng: random.Random, x: Tensor) -> Tensor:
    if not x.numel() or not x.ndim:
        return x
    axis = rng.randrange(x.ndim)
    shape = list(x.shape)
    shape[axis] = rng.choice([2**40, 2**50, 2**61])
    return x.flatten()[:1].as_strided(shape, (0,) * x.ndim)


def other_values(rng: random.Random, x: Tensor) -> Tensor:
    if not x.numel() or x.dtype == torch.bool:
        return x
    y = x.clone().contiguous()
    flat, pool = y.view(-1), FLOATS if y.is_floating_point() else [*EXTREMES, *x.shape, x.numel()]
    for _ in range(rng.choice([1, 1, 3, x.numel()])):
        flat[rng.randrange(x.numel())] = rng.choice(pool)
    return y


def shortened(rng: random.Random, x: Tensor) -> Tensor:
    y = x.clone()
    y.untyped_storage().resize_(rng.choice([0, y.untyped_storage().nbytes() // 2]))
    return y


def other_kind(rng: random.Random, x: Tensor) -> Tensor:
    ways = [
        lambda: x.to("meta"),
        lambda: x.to_sparse(),
        lambda: x.to_mkldnn(),
        lambda: torch._neg_view(x),
        lambda: torch._efficientzerotensor(x.shape, dtype=x.dtype),
        lambda: torch.nested.nested_tensor([x, x]),
        lambda: x.to(torch.complex64).conj(),
    ]
    return rng.choice(ways)()


def other_dtype(rng: random.Random, x: Tensor) -> Tensor:
    return x.to(rng.choice(DTYPES))


# weights: what reaches deepest comes most often
TENSORS: dict[Callable, int] = {
    other_rank: 2,
    other_size: 6,
    empty: 2,
    other_strides: 5,
    gigantic: 1,
    other_values: 8,
    shortened: 1,
    other_kind: 2,
    other_dtype: 2,
}


def broken(rng: random.Random, value, others: list, alone: bool):
    """Another value for an argument. alone: it is the only one that is broken.

    torch prints all arguments where one is of another type, and reads past the end of a shortened one: that breaks alone.
    """
    if rng.random() < 0.08:
        return rng.choice([None, *others])
    if isinstance(value, Tensor):
        (way,) = rng.choices(list(TENSORS), TENSORS.values())
        return way(rng, value) if alone or way is not shortened else value
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return rng.choice(FLOATS)
    if isinstance(value, int):
        return rng.choice([*EXTREMES, value + 1, 2 * value, 10_000, 10_001])
    return rng.choice([x for x in others if isinstance(x, Tensor)])  # an optional tensor that was not given


def plain(x: Tensor) -> bool:
    """Whether x is dense, contiguous and whole, on the CPU."""
    special = x.is_nested or x.layout != torch.strided or x.device.type != "cpu" or x.is_neg() or x.is_conj()
    if special or x._is_zerotensor() or not x.is_contiguous():
        return False
    return x.untyped_storage().nbytes() >= (x.storage_offset() + x.numel()) * x.itemsize


class Calls:
    """The random calls of a seed."""

    def __init__(self, seed: int):
        self.seed, self.valid, self.fence = seed, valid_calls(), Fence()
        self.names = sorted({name for name, _ in self.valid})
        module = _extension.module()
        self.sets, self.use = module.instruction_sets(), module.use_instruction_set

    def made(self, number: int) -> tuple[random.Random, str, list]:
        rng = random.Random(self.seed * 1_000_003 + number)
        torch.manual_seed(number)
        name = self.names[number % len(self.names)]
        arguments = list(rng.choice([x for other, x in self.valid if other == name]))
        count = min(len(arguments), rng.choice([0, 1, 1, 1, 2, 3]))
        for i in rng.sample(range(len(arguments)), count):
            try:
                arguments[i] = broken(rng, arguments[i], arguments, count == 1)
            except (RuntimeError, IndexError):  # torch cannot make it
                continue
        self.use(rng.choice(self.sets))
        return rng, name, arguments

    def run(self, number: int, show: Callable[[str], None] | None = None) -> str:
        """The operator, and whether the call worked or what it raised."""
        rng, name, arguments = self.made(number)
        differentiable = rng.random() < (0.1 if name.endswith("_backward") else 0.5)
        for i, x in enumerate(arguments):
            if isinstance(x, Tensor):
                x = (self.fence(x) if plain(x) else x).detach()
                if differentiable and (x.is_floating_point() or x.is_complex()) and rng.random() < 0.8:
                    x.requires_grad_()
                arguments[i] = x
        if show:
            show(f"torch.ops.{NAMESPACE}.{name}")
            for x in arguments:
                show(f"  {described(x)}")
        try:
            out = getattr(getattr(torch.ops, NAMESPACE), name)(*arguments)
            out = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
            if any(x.requires_grad for x in out):
                if rng.random() < 0.3:
                    behind_autograd(rng, [*arguments, *out])
                sum(x.sum() for x in out if x.requires_grad).backward()
            read(out)
        except Exception as error:  # whatever it is, the process lives
            return f"{name} {type(error).__name__}"
        return f"{name} worked"


def behind_autograd(rng: random.Random, tensors: list) -> None:
    """Changes the values of some integers through NumPy, which no version counter sees."""
    for x in tensors:
        if (
            isinstance(x, Tensor)
            and x.dtype == torch.int64
            and x.device.type == "cpu"
            and x.numel()
            and rng.random() < 0.5
        ):
            values = x.numpy()
            values[tuple(rng.randrange(n) for n in x.shape)] = rng.choice([-1, 3, 10**9, -(2**63)])


def read(tensors: list[Tensor]) -> None:
    """All memory of results on the CPU."""
    for x in tensors:
        if x.device.type == "cpu" and x.layout == torch.strided:
            x.detach().sum()


def described(x) -> str:
    if not isinstance(x, Tensor):
        return repr(x)
    if x.is_nested or x.layout != torch.strided:
        return f"{x.dtype}, {'nested' if x.is_nested else x.layout}"
    values = x.flatten()[:12].tolist() if plain(x) and x.numel() < 1000 else ""
    return f"{x.dtype} {tuple(x.shape)}, strides {x.stride()}, on {x.device} {values}"


def run(seed: int, first: int, count: int, progress: Path | None = None) -> Counter:
    """Runs the calls; the number of the one that runs is in `progress`."""
    warnings.simplefilter("ignore")
    faulthandler.enable()
    torch.set_num_threads(2)
    calls = Calls(seed)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
    kept = os.open(progress, os.O_WRONLY | os.O_CREAT) if progress else None
    found = Counter()
    for number in range(first, first + count):
        if kept is not None:
            os.pwrite(kept, b"%12d" % number, 0)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        found[calls.run(number, print if count == 1 else None)] += 1
    faulthandler.cancel_dump_traceback_later()
    return found


if __name__ == "__main__":
    seed, first, count = map(int, sys.argv[1:4])
    found = run(seed, first, count, Path(sys.argv[4]) if len(sys.argv) > 4 else None)
    print(*(f"{number:8d} {what}" for what, number in sorted(found.items())), sep="\n")

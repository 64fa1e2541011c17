"""Runs calls of the package on tensors without data, as if on a GPU, and keeps what they would launch on one.

The calls see CUDA tensors, so modules and ops choose as they do there. Each op of theirs that has Triton kernels is handed to
these kernels, forward and then backward, which record their launches and the library's calls between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.gpu_model.launches import Launch, Launches
from probsym_fast.ops._op import NAMESPACE, OPS
from probsym_fast.ops.triton import KERNELS, _launch, _lazy


@dataclass
class Call:
    """A kernel of the library. kind: of its products, as `Device.rate` names it."""

    name: str
    bytes: int
    operations: int
    kind: str


@dataclass
class Part:
    """One direction of one op: what it launches, in its order."""

    op: str
    direction: str
    steps: list[Launch | Call] = field(default_factory=list)


def recorded(run: Callable[[], object]) -> list[Part]:
    """The parts of the ops with Triton kernels that run() calls, with tensors of torch.device("cuda")."""
    ops = _Ops()
    with FakeTensorMode(), torch.device("cuda"), ops:
        run()
    return ops.parts


def everything(run: Callable[[], object]) -> list[Launch | Call]:
    """What run() launches in its order, of our kernels and of the library. Its tensors may be on the CPU."""
    every = _Everything()
    with every:
        run()
    return every.steps


@contextlib.contextmanager
def kept_steps(steps: list[Launch | Call]) -> Iterator[None]:
    """Kernels that are called are kept with their first configuration, which deterministic mode takes."""
    recorder = Launches()

    def call(kernel: _launch.Kernel, grid: Any, *arguments: Any, sizes: tuple = (), **constants: Any) -> None:
        before = len(recorder.every)
        recorder(kernel, grid, arguments, constants)
        if 0 not in (first := recorder.every[before]).grid:
            steps.append(first)

    with mock.patch.object(_launch.Kernel, "__call__", call), _Library(steps):
        yield


class _Library(TorchDispatchMode):
    """Keeps torch's own calls that launch a kernel."""

    def __init__(self, steps: list):
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return NotImplemented
        count = flop_registry.get(getattr(torch.ops.aten, func._schema.name.removeprefix("aten::").rstrip("_"), None))
        if func._can_decompose() and count is None:
            with self:
                found = func.decompose(*args, **kwargs)
                if found is not NotImplemented:
                    return found
        out = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        if made and not view and "empty" not in func.__name__ and not all(x.numel() == 0 for x in made):
            operations = count(*args, **kwargs, out_val=out) if count else 0
            seen = {id(x): size(x) for x in (*given, *made)}
            name = func._schema.name.removeprefix("aten::")
            self.steps.append(Call(name, sum(seen.values()), operations, kind_of(given)))
        return out


class _Everything(_Library):
    """Hands the ops of the package to their Triton kernels, too."""

    def __init__(self) -> None:
        super().__init__([])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = func._schema.name.split("::")[-1]
        name = op.removesuffix("_backward")
        if func.namespace != NAMESPACE or name not in KERNELS:
            return super().__torch_dispatch__(func, types, args, kwargs)
        out = func(*args, **(kwargs or {}))
        with kept_steps(self.steps):
            _lazy(name, "forward" if op == name else "backward")(*arguments(func, args, kwargs))
        return out


def arguments(func: Any, args: tuple, kwargs: dict | None) -> list:
    """Those of a call in the order of its schema, with what it leaves out."""
    given, named = func._schema.arguments, kwargs or {}
    return [*args, *(named.get(x.name, x.default_value) for x in given[len(args) :])]


def kind_of(tensors: list[Tensor]) -> str:
    if any(x.dtype in (torch.bfloat16, torch.float16) for x in tensors):
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"


def size(x: Tensor) -> int:
    """Bytes of a tensor; an expanded axis is in memory once."""
    count = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        count *= length if stride or not length else 1
    return count * x.element_size()


class _Ops(TorchDispatchMode):
    """Hands the ops of the package to their Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Part] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix(f"{NAMESPACE}::")
        if func.namespace == NAMESPACE and name in KERNELS:
            self._forward(name, func._schema, args, out if isinstance(out, tuple) else (out,))
        return out

    def _forward(self, name: str, schema: Any, args: tuple, results: tuple) -> None:
        known = {x.name: x.default_value for x in schema.arguments} | dict(
            zip((x.name for x in schema.arguments), args, strict=False)
        )
        self._record(name, "forward", list(known.values()))
        backward = OPS[name].backward
        needed = {x: isinstance(y, Tensor) and y.requires_grad for x, y in known.items()}
        if backward is None or not any(needed.values()):
            return
        known |= {f"needs_{x}": needs for x, needs in needed.items()}
        for x, result in zip(schema.returns, results, strict=True):
            known |= {x.name: result, f"d_{x.name}": torch.empty_like(result)}
        self._record(name, "backward", [known[x.name] for x in backward._schema.arguments])

    def _record(self, name: str, direction: str, arguments: list) -> None:
        part = Part(name, direction)
        with kept_steps(part.steps):
            _lazy(name, direction)(*arguments)
        self.parts.append(part)

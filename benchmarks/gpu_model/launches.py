"""Launches of the Triton kernels without a GPU: what would be launched, specialised as triton does it, and compiled."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from probsym_fast.ops.triton import _launch

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def specialised(function: Any, arguments: tuple, settings: dict) -> tuple[dict, dict, dict]:
    """signature, constants and attributes of a launch, as triton's own dispatch makes them.

    Memory is aligned to 16 bytes and more where it begins, so a tensor's offset in it decides; tensors may be fake.
    """
    named = dict(zip(function.arg_names, arguments, strict=False)) | settings
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        x, specialises = named[name], not function.params[i].do_not_specialize
        if function.params[i].is_constexpr or x is None or (isinstance(x, int) and x == 1 and specialises):
            signature[name], constants[i,] = "constexpr", x
            continue
        if isinstance(x, Tensor):
            signature[name] = TYPES[x.dtype]
            aligned = x.storage_offset() * x.element_size() % 16 == 0 and specialises
        elif isinstance(x, float):
            signature[name], aligned = function.params[i].annotation_type or "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
            aligned = x % 16 == 0 and specialises
        if aligned:
            attributes[i,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


class Launch(NamedTuple):
    """One launch with one configuration."""

    function: Any
    source: tuple[dict, dict, dict]
    options: dict
    kernel: str
    grid: tuple[int, ...]
    named: dict[str, Any]  # every argument of the kernel

    @property
    def key(self) -> tuple[str, str]:
        """Equal for launches of the same compiled kernel."""
        return self.kernel, repr((self.source, self.options))

    @property
    def numbers(self) -> dict[str, Any]:
        """The parameters that the compiled kernel has, in their order: numbers, and None for tensors."""
        given = [x for x, kind in self.source[0].items() if kind != "constexpr"]
        return {x: None if isinstance(self.named[x], Tensor) else self.named[x] for x in given}


class Launches:
    """Takes the place of `_launch.launch`: keeps what would be launched, with every configuration that can be chosen."""

    def __init__(self) -> None:
        self.every: list[Launch] = []

    def __call__(self, kernel: _launch.Kernel, grid: Any, arguments: tuple, settings: dict) -> None:
        assert not any(x.is_constexpr for x in kernel.function.params[: len(arguments)])  # as `Ready` needs it
        for configuration in kernel.among(settings):
            every = settings | configuration
            named = dict(zip(kernel.function.arg_names, arguments, strict=False)) | every
            size = grid(every)
            assert all(isinstance(x, int) and x >= 0 for x in size)
            chosen = {k: every.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in every}
            source = specialised(kernel.function, arguments, every)
            options = _launch.OPTIONS | chosen
            self.every.append(Launch(kernel.function, source, options, kernel.name, size, named))

    @property
    def kept(self) -> dict[tuple[str, str], Launch]:
        """Once for each compiled kernel."""
        return {launch.key: launch for launch in self.every}


class Source(ASTSource):
    """A kernel that one thread at a time parses: CPython 3.11 cannot make syntax trees in two threads at once (ast.parse
    raises "AST constructor recursion depth mismatch"). LLVM and ptxas, most of a compilation, run beside each other."""

    parsing = threading.Lock()

    def hash(self):
        with self.parsing:
            return super().hash()

    def make_ir(self, *arguments, **settings):
        with self.parsing:
            return super().make_ir(*arguments, **settings)


def compiled(launch: Launch, architecture: int) -> Any:
    """triton's compiled kernel, with asm["ptx"] and asm["cubin"]; architecture: 80, 90, ..."""
    source = Source(launch.function, *launch.source)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def all_compiled(launches: Iterable[Launch], architecture: int, threads: int | None = None) -> list:
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return list(pool.map(lambda launch: compiled(launch, architecture), launches))

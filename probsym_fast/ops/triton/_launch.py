"""How every kernel is launched: the device, and which of a short list of configurations."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.cache import get_cache_manager

from probsym_fast._checks import debugging
from probsym_fast.ops.triton import KernelFailure, Refused
from probsym_fast.ops.triton._device_time import device_times

MOST = 2**31 - 1024  # that 32 bits count, blocks among them
# Of every compilation: triton's default for fusion changes; without a bound on registers ptxas aims at a rounder number of
# them and spills a register or two to reach it. A configuration may have its own bound (maxnreg).
OPTIONS = {"enable_fp_fusion": True, "maxnreg": 128}
# Parameters of any kernel that depend on how many nodes, items and graphs a batch has. Triton would compile a kernel again
# where one is 1 or a multiple of 16, batch after batch. No wide load's stride is among them.
RAGGED = {"E", "M", "nodes", "graphs", "STEPS", "samples", "first", "last", "tokens", "none", "total", "keys", "rows"}
RAGGED |= {"parts", "part", "splits", "p_key", "p_from"}  # the last two point into edge_index, at E numbers of 8 bytes


class Kernel:
    """A jitted kernel with its configurations: constexpr arguments, and num_warps.

    The first one is taken where the choice must not vary or nothing can be measured: in deterministic mode, in a CUDA graph
    capture, without a GPU. Else the fastest for the bucket of the sizes, measured once and kept in triton's cache.
    ieee: in place of the others where PRECISION is "ieee", which has no tensor cores and unrolls products into single ones.
    """

    def __init__(self, function: Any, configurations: tuple[dict, ...], ieee: tuple[dict, ...] = ()):
        self.function, self.configurations, self.ieee = function, configurations, ieee
        self.name = function.__name__.strip("_")
        self.chosen: dict[str, dict] = {}

    def __call__(self, grid: Callable[[dict], tuple], *arguments, sizes: tuple[int, ...] = (), **constants) -> None:
        """grid: from the constexpr arguments. sizes: what the best configuration depends on.

        Outputs must not be read: the kernel runs several times where configurations are measured.
        """
        device = next(x for x in arguments if isinstance(x, Tensor)).device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            try:
                configuration = self._choose(device, grid, arguments, sizes, constants)
                launch(self, grid, arguments, constants | configuration)
                if debugging() and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                    torch.cuda.synchronize(device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in arguments]
                message = f"the kernel {self.name} failed on {device} for {shapes}: {error}"
                raise KernelFailure(message) from error

    def among(self, constants: dict) -> tuple[dict, ...]:
        """The configurations for these constexpr arguments."""
        return self.ieee if self.ieee and constants["PRECISION"] == "ieee" else self.configurations

    def _choose(self, device, grid, arguments, sizes, constants) -> dict:
        configurations = self.among(constants)
        fixed = len(configurations) == 1 or device.type != "cuda" or torch.are_deterministic_algorithms_enabled()
        if fixed:
            return configurations[0]
        dtypes = [str(x.dtype) for x in arguments if isinstance(x, Tensor)]
        key = repr((torch.cuda.get_device_name(device), dtypes, constants, [bucket(x) for x in sizes]))
        if key not in self.chosen:
            if torch.cuda.is_current_stream_capturing():
                return configurations[0]
            self.chosen[key] = self._read(key, configurations) or self._measure(key, grid, arguments, constants)
        return self.chosen[key]

    def _measure(self, key, grid, arguments, constants) -> dict:
        times = [seconds_of(partial(launch, self, grid, arguments, constants | c)) for c in self.among(constants)]
        best = self.among(constants)[times.index(min(times))]
        with not_kept():
            self._cache(key).put(json.dumps(best), "configuration.json", binary=False)
        return best

    def _read(self, key, configurations) -> dict | None:
        """The choice that was kept; None where there is none, or none that can be read or taken."""
        kept = None
        with not_kept():
            path = self._cache(key).get_file("configuration.json")
            if path is not None:
                with open(path, encoding="utf-8") as file:
                    kept = json.load(file)
        return kept if kept in configurations else None

    def _cache(self, key):
        whole = f"probsym_fast {triton.__version__} {self.function.cache_key} {key}"
        return get_cache_manager(hashlib.sha256(whole.encode()).hexdigest())


def seconds_of(run: Callable[[], None]) -> float:
    """The median time of about 20 ms of runs on the current GPU.

    A configuration is measured within a step, whose peak of memory `chunk="auto"` may be measuring: nothing is allocated.
    """
    run()  # compiles
    (first, *_), _ = device_times(run, 3)
    return statistics.median(device_times(run, max(5, min(100, int(0.02 / (first + 1e-9)))))[0])


_told = False


@contextlib.contextmanager
def not_kept() -> Iterator[None]:
    """Goes on without the kept choices where they cannot be read or written; says so once."""
    global _told
    try:
        yield
    except (OSError, ValueError) as error:
        if not _told:
            _told = True
            warnings.warn(
                f"probsym_fast: triton's cache cannot keep the kernel configurations; they are measured again: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def launch(kernel: Kernel, grid: Callable, arguments: tuple, settings: dict) -> None:
    """The one place that launches; an empty grid launches nothing."""
    size = grid(settings)
    if 0 not in size:
        kernel.function[size](*arguments, **(OPTIONS | settings))


def kernel(*configurations: dict, ieee: tuple[dict, ...] = ()) -> Callable:
    """Decorates a function for triton.jit."""

    def decorate(function: Callable) -> Kernel:
        ragged = [name for name in inspect.signature(function).parameters if name in RAGGED]
        return Kernel(triton.jit(do_not_specialize=ragged)(function), configurations or ({"num_warps": 4},), ieee)

    return decorate


def bucket(size: int) -> int:
    """The next power of two."""
    return triton.next_power_of_2(max(1, size))


def width_block(width: int, most: int) -> int:
    """A power of two from 16 to `most` that cuts the width into blocks, the largest of those that waste least."""
    if width <= most:
        return max(16, bucket(width))
    return min((most, most // 2, most // 4), key=lambda block: (-(-width // block) * block, -block))


def check_counts(**counts: int) -> None:
    """ValueError for what is counted in 32 bits, with room for a block, and is too many."""
    for name, count in counts.items():
        if count > MOST:
            raise Refused(ValueError, f"{name.replace('_', ' ')} must be at most {MOST} on a GPU, got {count}")


def check_tensors(device: torch.device, **given: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Refuses tensors that are not of the shape which the kernels will read, or not on the device; None passes.

    The op's Python function checks this in its own words; this is for calls through `torch.ops`.
    """
    for name, (x, shape) in given.items():
        if x is None:
            continue
        if x.shape != shape:
            raise Refused(ValueError, f"{name} must be {tuple(shape)}, got {tuple(x.shape)}")
        if x.device != device:
            raise Refused(RuntimeError, f"{name} must be on {device}, got {x.device}")


def check_axes(name: str, x: Tensor, *counts: int) -> torch.Size:
    """The shape of x; refused where the number of its axes is none of `counts`."""
    if x.ndim not in counts:
        raise Refused(ValueError, f"{name} must have {' or '.join(map(str, counts))} axes, got {tuple(x.shape)}")
    return x.shape


def fresh_like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape, its strides those of a fresh one whatever x's axes of length 1 have."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def precision(dtype: torch.dtype) -> str:
    """Of products of float32 on the tensor cores: "tf32", which holds the digits of bfloat16 and float16, where an op's
    dtype is one of these or torch has it so (torch.backends.cuda.matmul), else "ieee".
    """
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

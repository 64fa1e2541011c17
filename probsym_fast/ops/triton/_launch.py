"""Launching kernels: the device, and the choice among a few configurations."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from probsym_fast._checks import debugging
from probsym_fast.ops.triton import KernelFailure, Refused
from probsym_fast.ops.triton._device_time import device_times

MOST = 2**31 - 1024  # largest count in 32 bits, with room for a block
# For every compilation. Triton's default for fusion varies between versions. Without a bound on registers ptxas aims at a
# rounder number and spills a register or two to reach it. A configuration may set its own bound (maxnreg).
OPTIONS = {"enable_fp_fusion": True, "maxnreg": 128}
# Parameters, of any kernel, that depend on the numbers of nodes, items and graphs in a batch. Triton would recompile a
# kernel whenever one is 1 or a multiple of 16. None of them is the stride of a wide load.
RAGGED = {"E", "M", "nodes", "graphs", "STEPS", "samples", "first", "last", "tokens", "none", "total", "keys", "rows"}
RAGGED |= {"ends", "pairs", "programs", "rounds"}
RAGGED |= {"top", "left"}  # where a part of an image begins
RAGGED |= {
    "parts",
    "part",
    "room",
    "splits",
    "p_key",
    "p_from",
}  # the last two point into edge_index, at E numbers of 8 bytes
RAGGED |= {"p_begin"}  # lists of some keys may begin anywhere among those of all
RAGGED |= {"p_lengths", "p_own"}  # point to those of any sequence, of any layer


class Ready(NamedTuple):
    """A kernel that is compiled: launched without triton's own binding of arguments, several times as long."""

    compiled: Any
    settings: dict
    constants: tuple  # the constexpr arguments, which follow the others

    def __call__(self, device: torch.device, grid: Callable[[dict], tuple], given: list) -> None:
        """given: the arguments, tensors as addresses, which the launcher need not look up."""
        size = grid(self.settings)
        if 0 in size:
            return
        x, y, z = (*size, 1, 1)[:3]
        compiled, hooks = self.compiled, knobs.runtime
        if listens(hooks.launch_enter_hook) or listens(hooks.launch_exit_hook):
            compiled[x, y, z](*given, *self.constants)
        else:  # no dictionary for hooks, and none is called
            stream = driver.active.get_current_stream(device.index)
            fixed = stream, compiled.function, compiled.packed_metadata, None, None, None
            compiled.run(x, y, z, *fixed, *given, *self.constants)


def listens(hook: Any) -> bool:
    """Whether a hook of triton, or any of its chain, is set."""
    return bool(getattr(hook, "calls", hook))


class Kernel:
    """A jitted kernel with its configurations: constexpr arguments, and num_warps.

    Uses the first configuration if the choice must not vary or nothing can be measured: in deterministic mode, in a
    CUDA graph capture, without a GPU. Otherwise the fastest for the bucket of the sizes, measured once and kept in
    triton's cache. precisions: the configurations for some values of PRECISION. "ieee" has no tensor cores and unrolls
    products into scalar ones. "tf32x3" keeps both halves of every factor.
    """

    def __init__(self, function: Any, configurations: tuple[dict, ...], precisions: dict | None = None):
        self.function, self.configurations, self.precisions = function, configurations, precisions or {}
        self.name = function.__name__.strip("_")
        self.parameters = tuple(inspect.signature(function.fn).parameters)
        self.ragged = tuple(name in RAGGED for name in self.parameters)
        self.chosen: dict[str, dict] = {}
        self.ready: dict[tuple, Ready] = {}

    def __call__(self, grid: Callable[[dict], tuple], *arguments, sizes: tuple[int, ...] = (), **constants) -> None:
        """grid: a function of the constexpr arguments. arguments: all others. sizes: what the best configuration depends on.

        The kernel must not read its outputs: it runs several times while configurations are measured.
        """
        device = next(x for x in arguments if isinstance(x, Tensor)).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(grid, *arguments, sizes=sizes, **constants)
            return
        try:
            key, given = self._key(device, arguments, sizes, constants)
            ready = self.ready.get(key)
            if ready is not None:
                ready(device, grid, given)
            else:
                settings = constants | self._choose(device, grid, arguments, sizes, constants)
                self._keep(key, len(arguments), settings, launch(self, grid, arguments, settings))
            if debugging() and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in arguments]
            message = f"the kernel {self.name} failed on {device} for {shapes}: {error}"
            raise KernelFailure(message) from error

    def _key(self, device, arguments, sizes, constants) -> tuple[tuple, list]:
        """All that the configuration and the compiled kernel depend on; and the arguments, tensors as addresses.

        Of an argument: its type and, unless it is ragged, what divides it. A tensor that is not on this GPU has a key of
        its own, so triton sees it and refuses it.
        """
        key: list[Any] = [device.index, torch.are_deterministic_algorithms_enabled()]
        given: list[Any] = []
        for x, ragged in zip(arguments, self.ragged, strict=False):
            if isinstance(x, Tensor):
                address = x.data_ptr()
                key += x.dtype, x.get_device(), ragged or address % 16 == 0
                given.append(address)
                continue
            if type(x) is int:
                narrow = -(2**31) <= x < 2**31
                key.append(narrow if ragged else 2 + narrow + 2 * (x == 1) + 4 * (x % 16 == 0))
            else:
                key.append(type(x))
            given.append(x)
        key += *constants, *constants.values(), *map(bucket, sizes)
        return tuple(key), given

    def _keep(self, key, count, settings, compiled) -> None:
        """compiled: None where nothing was, by an empty grid or under the interpreter."""
        if compiled is not None and not torch.cuda.is_current_stream_capturing():  # a choice of then is not final
            constants = tuple(settings[name] for name in self.parameters[count:])
            self.ready[key] = Ready(compiled, settings, constants)

    def among(self, constants: dict) -> tuple[dict, ...]:
        """The configurations for these constexpr arguments."""
        return self.precisions.get(constants.get("PRECISION", ""), self.configurations)

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
        """The stored choice; None if there is none, or none that is readable and valid."""
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

    Allocates nothing: it runs within a step whose peak memory `chunk="auto"` may be measuring.
    """
    run()  # compiles
    (first, *_), _ = device_times(run, 3)
    return statistics.median(device_times(run, max(5, min(100, int(0.02 / (first + 1e-9)))))[0])


_told = False


@contextlib.contextmanager
def not_kept() -> Iterator[None]:
    """Continues without the stored choices if they cannot be read or written; warns once."""
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


def launch(kernel: Kernel, grid: Callable, arguments: tuple, settings: dict) -> Any:
    """Compiles a kernel where it is new, launches and returns it; an empty grid launches nothing."""
    size = grid(settings)
    return None if 0 in size else kernel.function[size](*arguments, **(OPTIONS | settings))


def kernel(*configurations: dict, **precisions: tuple[dict, ...]) -> Callable:
    """Decorator: triton.jit with configurations; precisions: others for some values of PRECISION."""

    def decorate(function: Callable) -> Kernel:
        ragged = [name for name in inspect.signature(function).parameters if name in RAGGED]
        return Kernel(triton.jit(do_not_specialize=ragged)(function), configurations or ({"num_warps": 4},), precisions)

    return decorate


def bucket(size: int) -> int:
    """The next power of two."""
    return 1 << (max(1, size) - 1).bit_length()


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up; triton's own takes several times as long on the host."""
    return -(-x // y)


def width_block(width: int, most: int) -> int:
    """A power of two from 16 to `most` as block of the width: the largest of those that waste least."""
    if width <= most:
        return max(16, bucket(width))
    return min((most, most // 2, most // 4), key=lambda block: (-(-width // block) * block, -block))


def check_counts(**counts: int) -> None:
    """ValueError for counts too large for 32 bits, with room for a block."""
    for name, count in counts.items():
        if count > MOST:
            raise Refused(ValueError, f"{name.replace('_', ' ')} must be at most {MOST} on a GPU, got {count}")


def check_tensors(device: torch.device, **given: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Refuses tensors that lack the shape the kernels will read, or are not on the device; None passes.

    The op's Python function has its own checks; these serve calls through `torch.ops`.
    """
    for name, (x, shape) in given.items():
        if x is None:
            continue
        if x.shape != shape:
            raise Refused(ValueError, f"{name} must be {tuple(shape)}, got {tuple(x.shape)}")
        if x.device != device:
            raise Refused(RuntimeError, f"{name} must be on {device}, got {x.device}")


def check_axes(name: str, x: Tensor, *counts: int) -> torch.Size:
    """The shape of x; refused unless x has one of `counts` axes."""
    if x.ndim not in counts:
        raise Refused(ValueError, f"{name} must have {' or '.join(map(str, counts))} axes, got {tuple(x.shape)}")
    return x.shape


def fresh_like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape with the strides of a fresh one, whatever x's axes of length 1 have."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def precision(dtype: torch.dtype, full: str = "ieee") -> str:
    """The precision of float32 products.

    "tf32", which holds the digits of bfloat16 and float16, if the op's dtype is one of these or torch allows it
    (torch.backends.cuda.matmul). Else `full`: "ieee", in float32 without tensor cores, or "tf32x3". That splits a number into
    two of tf32, which hold 22 of its 24 bits, and leaves out the product of the two lower ones: 2^-21 of a product.
    """
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32" else full

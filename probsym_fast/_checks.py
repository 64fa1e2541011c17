"""Argument checks that all modules share, and debug mode.

A check reads values only where that needs no synchronisation. In debug mode it also reads values on a GPU, and waits for
every kernel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from types import UnionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from probsym_fast._autocast import autocasts
from probsym_fast._compilers import is_fake, traced

MOST_KEYS = 2**43  # of inputs for fixed noise

_on = os.environ.get("PROBSYM_DEBUG", "0") not in ("", "0")


def debugging() -> bool:
    return _on


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Within it, or in a process with PROBSYM_DEBUG=1, bad values on a GPU raise as they do on the CPU.

    Outside it no check reads values on a GPU, since that waits for the GPU: a node number out of range counts as no
    node, and NaN propagates. Within it every op checks node numbers, offsets, permutations, counts and that scores and
    matrices are finite, before it launches a kernel, with the CPU's messages. It also waits for every Triton kernel,
    and an error names the op and its shapes. Slow. Code traced by torch.compile and CUDA graphs during capture are not
    checked. Applies to all threads.
    """
    global _on
    before, _on = _on, bool(enabled)
    try:
        yield
    finally:
        _on = before


def transformed() -> bool:
    """Whether a torch.func transform (grad, vjp, jvp, vmap, ...) or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def under_vmap() -> bool:
    """Whether torch.vmap is active, also around or inside another transform."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(layer.key() == torch._C._functorch.TransformType.Vmap for layer in stack)


def check_float(op: str, **tensors: Tensor) -> None:
    """TypeError unless every tensor is floating point."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")


def check_dtype(owner: str, dtype: torch.dtype, **tensors: Tensor) -> None:
    """TypeError unless every tensor has the dtype of the weights; under autocast any floating dtype passes."""
    for name, x in tensors.items():
        if x.dtype != dtype and not (x.is_floating_point() and autocasts(x.device)):
            raise TypeError(f"{owner}: {name} must be {dtype} as the weights are, got {x.dtype}")


def as_int(value: Any) -> int | None:
    """value as a Python int if it is an int, Python's or NumPy's; None for bools, floats, tensors and arrays."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]  # a SymInt stands for an int in a traced program
    return int(value) if isinstance(value, Integral) else None


def as_number(value: Any) -> float | int | None:
    """value as a Python number if it is a real number, Python's or NumPy's; None for bools, tensors and arrays."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]  # as in `as_int`
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else None


def check_bool(owner: str, name: str, value: Any) -> bool:
    """value as a Python bool. TypeError unless it is a bool, Python's or NumPy's: the string "no" would be true."""
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool", "bool_") and type(value).__module__ == "numpy":
        return bool(value)
    raise TypeError(f"{owner}: {name} must be a bool, got {type(value).__name__} {value!r}")


def check_int(owner: str, name: str, value: Any) -> int:
    """value as a Python int; TypeError unless it is an int, Python's or NumPy's."""
    if (found := as_int(value)) is None:
        raise TypeError(f"{owner}: {name} must be an int, got {type(value).__name__} {value!r}")
    return found


def check_count(owner: str, name: str, value: Any, least: int = 1) -> int:
    """value as a Python int. TypeError as `check_int`, ValueError below `least`."""
    count = check_int(owner, name, value)
    if count < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {count}")
    return count


def check_counts(owner: str, **counts: Any) -> tuple[int, ...]:
    """The values as Python ints >= 1, in order; raises as `check_count`."""
    return tuple(check_count(owner, name, value) for name, value in counts.items())


def check_share(owner: str, name: str, value: Any) -> float:
    """value as a Python number in 0..1. TypeError unless it is a number, ValueError out of range."""
    if (share := as_number(value)) is None:
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__} {value!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"{owner}: {name} must be in 0..1, got {share}")
    return share


def check_type(owner: str, name: str, value: Any, kind: type | UnionType, words: str) -> None:
    """TypeError unless value is an instance of `kind`, which the message calls `words`."""
    if not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{owner}: {name} must be {words}, got {got}")


def check_key(owner: str, key: Tensor) -> None:
    """ValueError unless keys (B,) are in 0..2^43 - 1, where values are read."""
    if looks_at_values(key) and key.shape[0] and not (0 <= int(key.min()) and int(key.max()) < MOST_KEYS):
        bad = next(one for one in key.tolist() if not 0 <= one < MOST_KEYS)
        raise ValueError(f"{owner}: key must be in 0..2^43 - 1, got {bad}")


def check_num_nodes(op: str, num_nodes: Tensor | None, B: int, N: int, device: torch.device) -> Tensor | None:
    """num_nodes as int64, checked to be (B,) integers in 1..N on `device`. None passes."""
    if num_nodes is None:
        return None
    if not isinstance(num_nodes, Tensor) or num_nodes.is_floating_point() or num_nodes.dtype == torch.bool:
        got = num_nodes.dtype if isinstance(num_nodes, Tensor) else type(num_nodes).__name__
        raise TypeError(f"{op}: num_nodes must be an integer Tensor, got {got}")
    if tuple(num_nodes.shape) != (B,):
        raise ValueError(f"{op}: num_nodes must be (B,) = ({B},), got {tuple(num_nodes.shape)}")
    if num_nodes.device != device:
        raise RuntimeError(f"{op}: num_nodes must be on {device}, got {num_nodes.device}")
    if looks_at_values(num_nodes) and B and (int(num_nodes.min()) < 1 or int(num_nodes.max()) > N):
        bad = next(i for i, n in enumerate(num_nodes.tolist()) if not 1 <= n <= N)
        raise ValueError(f"{op}: num_nodes must be between 1 and N = {N}, got {int(num_nodes[bad])} for graph {bad}")
    return num_nodes.to(torch.int64).contiguous()


def looks_at_values(x: Tensor, *others: Tensor | None) -> bool:
    """Whether checks may read the values: on the CPU, or on a GPU in debug mode; never in tracing, capture or vmap."""
    if torch.compiler.is_compiling() or is_fake(x) or traced() or any(map(batched, (x, *others))):
        return False
    if x.device.type != "cuda":
        return x.device.type == "cpu"
    return debugging() and not torch.cuda.is_current_stream_capturing()


def vmapped(*d_outputs: Tensor) -> bool:
    """In a backward pass: whether vmap runs over it, torch.func's or that of autograd.grad(is_grads_batched=True)."""
    return transformed() or any(map(torch._C._functorch.is_legacy_batchedtensor, d_outputs))


def batched(x: Tensor | None) -> bool:
    """Whether vmap runs over x, which then holds several tensors and has no single value."""
    while x is not None and torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False

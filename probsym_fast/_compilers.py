"""Marks for torch's compilers, set without importing them, which takes a second."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable)


def constant_in_programs(function: F) -> F:
    """`torch.compiler.assume_constant_result`: called once while a program is traced, and not part of it."""
    cast(Any, function)._dynamo_marked_constant = True  # functions accept any attribute
    return function


def left_alone(function: F, reason: str) -> F:
    """`torch.compiler.disable`. It imports the compiler, so call it only while one is at work."""
    return torch.compiler.disable(function, reason=reason)


def is_fake(x: Tensor) -> bool:
    """Whether x is a FakeTensor, which has a shape but no values."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # without it there is none
    return fake is not None and isinstance(x, fake.FakeTensor)


def traced() -> bool:
    """Whether operations are recorded on tensors with values that must not be read (make_fx, torch.func.linearize)."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def as_recorded(x: Tensor) -> Tensor:
    """A constant tensor as operations on tensors without values take it: faked where a FakeTensorMode refuses real ones."""
    if torch.compiler.is_compiling():
        return x
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return x if mode is None or mode.allow_non_fake_inputs or is_fake(x) else mode.from_tensor(x)

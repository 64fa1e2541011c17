"""Activation checkpointing: the backward pass computes again what the forward pass did not keep."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probsym_fast._checks import transformed
from probsym_fast._compilers import left_alone

_checkpoints_layers = False
Modules = Sequence[nn.Module] | nn.ModuleList | nn.Sequential


def checkpointed(function: Callable[..., Any], *arguments: Any, device: torch.device, modules: Modules) -> Any:
    """function(*arguments). With gradients on, the backward pass computes it again, and nothing is kept until then.

    Both times draw the same random numbers, and buffers of the modules (running statistics) change only once. Under a
    torch.func transform, where torch's checkpoints do not work, the function simply runs.
    """
    if transformed() or not torch.is_grad_enabled():
        return function(*arguments)
    run = _checkpointed if not torch.compiler.is_dynamo_compiling() else sys.modules[__name__].uncompiled
    return run(function, arguments, device, modules)


def __getattr__(name: str) -> Any:
    """`uncompiled`: `_checkpointed`, excluded from torch.compile; made on first use."""
    if name != "uncompiled":
        raise AttributeError(name)
    reason = "checkpointed code is not compiled; compile the backbone instead"
    globals()[name] = left_alone(_checkpointed, reason)
    return globals()[name]


def _checkpointed(function: Callable[..., Any], arguments: tuple, device: torch.device, modules: Modules) -> Any:
    _free_before_the_end()
    here = torch.empty(0, device=device)  # the checkpoint saves the random state of its arguments' devices
    again = False

    def run(_: Tensor, *some: Any) -> Any:  # once in the forward pass, then in every backward pass
        nonlocal again
        context, again = restored_buffers(*modules) if again else nullcontext(), True
        with context:
            return function(*some)

    return checkpoint(run, here, *arguments, use_reentrant=False)


@cache
def _free_before_the_end() -> None:
    """At interpreter exit, frees what is left of a backward pass that raised.

    torch keeps the rest of it in the thread's queue until the thread's next pass or its end. The main thread ends after the
    interpreter, where the hooks of a checkpoint, which are Python objects, crash.
    """
    process = os.getpid()

    def empty_the_queue() -> None:
        if os.getpid() == process:  # a fork cannot run a backward pass
            torch.ones((), requires_grad=True).backward()

    atexit.register(empty_the_queue)


@contextmanager
def checkpointing_layers() -> Iterator[None]:
    """Within it, networks keep only the inputs of their layers (`checkpoint_layer`)."""
    global _checkpoints_layers
    before, _checkpoints_layers = _checkpoints_layers, True
    try:
        yield
    finally:
        _checkpoints_layers = before


def checkpoint_layer(function: Callable[..., Tensor], *inputs: Tensor, modules: Modules) -> Tensor:
    """function(*inputs), a layer of a network with these modules.

    Within `checkpointing_layers` the backward pass computes it again, and the layers inside it too.
    """
    if not _checkpoints_layers:
        return function(*inputs)
    return checkpointed(checkpointing_layers()(function), *inputs, device=inputs[0].device, modules=modules)


@contextmanager
def restored_buffers(*modules: nn.Module, after_errors_only: bool = False) -> Iterator[None]:
    """Restores the buffers of modules in training on exit, or only after an error."""
    buffers = [(x, x.clone()) for m in modules if m.training for x in m.buffers()]
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed or not after_errors_only:
            for x, before in buffers:
                x.data.copy_(before)  # bypasses autograd: what it saved of x stays valid

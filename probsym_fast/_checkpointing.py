"""Memory for time: what is computed again in the backward pass instead of kept."""

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
    """function(*arguments); with gradients on it is computed again in the backward pass and keeps nothing until then.

    Random numbers are the same both times, and buffers of the modules (running statistics) change once. Under a torch.func
    transform nothing is computed again, since checkpoints do not work there.
    """
    if transformed() or not torch.is_grad_enabled():
        return function(*arguments)
    run = _checkpointed if not torch.compiler.is_dynamo_compiling() else sys.modules[__name__].uncompiled
    return run(function, arguments, device, modules)


def __getattr__(name: str) -> Any:
    """`uncompiled`: `_checkpointed`, which torch.compile leaves alone; made when it is first met."""
    if name != "uncompiled":
        raise AttributeError(name)
    reason = "what is computed again in the backward pass runs as it is: compile the backbone instead"
    globals()[name] = left_alone(_checkpointed, reason)
    return globals()[name]


def _checkpointed(function: Callable[..., Any], arguments: tuple, device: torch.device, modules: Modules) -> Any:
    _free_before_the_end()
    here = torch.empty(0, device=device)  # the checkpoint keeps the random state of its arguments' devices
    again = False

    def run(_: Tensor, *some: Any) -> Any:  # before the backward pass, and in every one
        nonlocal again
        context, again = restored_buffers(*modules) if again else nullcontext(), True
        with context:
            return function(*some)

    return checkpoint(run, here, *arguments, use_reentrant=False)


@cache
def _free_before_the_end() -> None:
    """At the interpreter's exit frees what a backward pass that raised has left behind.

    torch keeps the rest of such a pass in its thread's queue, which the thread's next pass empties, or else its end: for the
    main thread that is after the interpreter, where a checkpoint's hooks, which are Python objects, crash.
    """
    process = os.getpid()

    def empty_the_queue() -> None:
        if os.getpid() == process:  # a fork cannot run a backward pass
            torch.ones((), requires_grad=True).backward()

    atexit.register(empty_the_queue)


@contextmanager
def checkpointing_layers() -> Iterator[None]:
    """Within it, networks keep only what enters their layers (`checkpoint_layer`)."""
    global _checkpoints_layers
    before, _checkpoints_layers = _checkpoints_layers, True
    try:
        yield
    finally:
        _checkpoints_layers = before


def checkpoint_layer(function: Callable[..., Tensor], *inputs: Tensor, modules: Modules) -> Tensor:
    """function(*inputs), a layer of a network with these modules.

    Within `checkpointing_layers` it is computed again in the backward pass, and so are the layers within it.
    """
    if not _checkpoints_layers:
        return function(*inputs)
    return checkpointed(checkpointing_layers()(function), *inputs, device=inputs[0].device, modules=modules)


@contextmanager
def restored_buffers(*modules: nn.Module, after_errors_only: bool = False) -> Iterator[None]:
    """Restores the buffers of modules in training on exit, or only where an error leaves."""
    buffers = [(x, x.clone()) for m in modules if m.training for x in m.buffers()]
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed or not after_errors_only:
            for x, before in buffers:
                x.data.copy_(before)  # past autograd: what the backward pass has kept of x stays good

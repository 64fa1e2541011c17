"""Names in recorded traces: the model's parts and the ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.profiler import record_function

from probsym_fast.models import Symmetrized
from probsym_fast.ops import OPS


@contextmanager
def named(model: Symmetrized) -> Iterator[None]:
    """Within it, a recorded trace names the model's parts and the ops that run as plain torch (kernels have names)."""
    with ExitStack() as stack:
        for name in ("distribution", "embed", "backbone", "readout"):
            part, open_ranges = getattr(model, name), []
            for hook in hooks(f"Symmetrized.{name}", open_ranges):
                handle = getattr(part, hook.__name__)(hook, **({} if "pre" in hook.__name__ else {"always_call": True}))
                stack.callback(handle.remove)
        for name, op in OPS.items():
            stack.callback(setattr, op, "reference", op.reference)
            op.reference = under_name(f"probsym_fast::{name} (reference)", op.reference)
        yield


def hooks(name: str, open_ranges: list) -> tuple[Callable, Callable]:
    """Forward hooks of a module, called as the methods that register them, that open and close a range of the trace."""

    def register_forward_pre_hook(module: nn.Module, _: Any) -> None:
        open_ranges.append(record_function(name))
        open_ranges[-1].__enter__()

    def register_forward_hook(module: nn.Module, *_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return register_forward_pre_hook, register_forward_hook


def under_name(name: str, function: Callable) -> Callable:
    def run(*arguments: Any) -> Any:
        with record_function(name):
            return function(*arguments)

    return run

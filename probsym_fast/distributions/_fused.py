"""Autograd functions with hand-written gradients, and their definitions in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from probsym_fast._autocast import without_autocast
from probsym_fast._checks import transformed, vmapped


class Fused(Function):
    """A step with its own gradient, which saves less memory and runs faster than that of its `definition` in plain torch.

    The definition runs under torch.func transforms, and in a backward pass whose result may itself be differentiated.
    """

    @staticmethod
    def definition(*inputs: Any, **named: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def of(cls, *inputs: Any) -> Any:
        """The step: a Tensor or a tuple of them, as `definition` returns."""
        return cls.definition(*inputs) if transformed() else cls.apply(*inputs)


def needs_definition(*d_outputs: Tensor) -> bool:
    """In a backward pass: whether its result may be differentiated (create_graph) or vmap runs over it."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or vmapped(*d_outputs))


def gradient(definition: Callable, inputs: Sequence[Tensor], *d_outputs: Tensor) -> list[Tensor | None]:
    """The gradients of definition(*inputs), None for inputs without one; differentiable if gradients are on."""
    with without_autocast(inputs[-1].device):  # may be on in the backward pass
        with torch.enable_grad():
            own = [x.view_as(x) for x in inputs]  # an input that depends on another gets its gradient at the view
            outputs = definition(*own)
        needed = [x for x in own if x.requires_grad]
        found = iter(torch.autograd.grad(outputs, needed, d_outputs, create_graph=torch.is_grad_enabled()))
    return [next(found) if x.requires_grad else None for x in own]

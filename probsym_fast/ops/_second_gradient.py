"""The gradient of a gradient: autograd through that of an op's definition, computed only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from probsym_fast._autocast import without_autocast

if TYPE_CHECKING:
    from probsym_fast.ops._op import Op

Known = dict[str, Any]


class SecondGradient:
    """Of a call of `<op>_backward`: (its arguments, the gradients of its results) -> the gradients of its arguments.

    The backward is defined as the gradient of the op's reference, which autograd differentiates to any order. The names in
    the schemas say how its arguments are those of the reference (`_op.differentiate`). shapes: of the backward's results.
    others: the op's arguments that the backward neither takes nor gives a gradient for, each computed from those that it
    takes. Where one is missing there, the op has no second derivative, and the call raises RuntimeError. results: a
    definition from all that the backward takes, such as choices of the forward pass; None: the reference.
    """

    def __init__(
        self,
        op: Op,
        schema: Any,
        shapes: Callable,
        others: Mapping[str, Callable[[Known], Any]],
        results: Callable[[Known], Any] | None,
    ):
        self.op, self.shapes, self.others, self.of_known = op, shapes, others, results
        self.arguments = [x.name for x in op.kernel._schema.arguments]
        self.results = [x.name for x in op.kernel._schema.returns]
        self.takes = [x.name for x in schema.arguments]
        self.gives = [x.name.removeprefix("d_") for x in schema.returns]
        self.defined = set(self.arguments) <= {*self.takes, *self.gives, *others}

    def __call__(self, values: Sequence[Any], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        if not self.defined:
            raise RuntimeError(f'{self.op.name}: the kernels have no second derivative; use backend="reference" for it')
        further = torch.is_grad_enabled()
        device = next(x for x in values if isinstance(x, Tensor)).device
        with torch.enable_grad(), without_autocast(device):
            own = [x.view_as(x) if _needs_gradient(x) else x for x in values]  # one may depend on another
            inputs = [x for x in own if _needs_gradient(x)]
            found = iter(_gradients(self._definition(own), gradients, inputs, further))
        return [next(found) if _needs_gradient(x) else None for x in own]

    def _definition(self, values: Sequence[Any]) -> list[Tensor | None]:
        """The backward in plain torch; None where it gives None. Inputs below float32 are computed in float32."""
        known = dict(zip(self.takes, values, strict=True))
        shapes = self.shapes(*values)
        given = dict(zip(self.gives, shapes if isinstance(shapes, tuple) else (shapes,), strict=True))
        given = {name: like for name, like in given.items() if like is not None}
        for name, like in given.items():
            if name not in known:  # then no gradient depends on its value, only on its shape
                known[name] = like.new_zeros(like.shape)
            known[name] = known[name] if known[name].requires_grad else known[name].detach().requires_grad_()
        known |= {name: of_known(known) for name, of_known in self.others.items()}
        arguments = {name: _wide(known.get(name)) for name in self.arguments}
        y = self.op.reference(*arguments.values()) if self.of_known is None else self.of_known(known | arguments)
        incoming = [known.get(f"d_{name}") for name in self.results]
        outputs, wanted = y if isinstance(y, tuple) else (y,), [arguments[name] for name in given]
        found = dict(zip(given, _gradients(outputs, incoming, wanted, True), strict=True))
        return [None if (x := found.get(name)) is None else x.to(given[name].dtype) for name in self.gives]


def _gradients(
    outputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None], inputs: list[Tensor], further: bool
) -> Sequence[Tensor | None]:
    """Of the inputs, from those of the outputs (None: there is none); None where no such output depends on an input."""
    pairs = [
        (y, d.to(y.dtype)) for y, d in zip(outputs, gradients, strict=True) if _needs_gradient(y) and d is not None
    ]
    if not pairs:
        return [None] * len(inputs)
    outputs, gradients = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, gradients, create_graph=further, allow_unused=True)


def _needs_gradient(x: Any) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.requires_grad


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x

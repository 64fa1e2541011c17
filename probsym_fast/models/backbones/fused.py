"""Backbones whose layers run as one op, in one pass."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._autocast import autocasts
from probsym_fast._checks import check_bool
from probsym_fast.ops._op import Op

PLAIN = nn.Linear, nn.LayerNorm, nn.modules.linear.NonDynamicallyQuantizableLinear  # the last is attention's, a Linear


class OnePass(nn.Module):
    """A backbone whose layers run as one op where it has a kernel and nothing has to happen between them.

    recompute: the backward pass of the op computes the layers again instead of keeping their inputs: a quarter slower, and
    memory does not grow with the layers. `chunk="auto"` sets it before it splits the samples. one_pass: set it to False to
    run the modules one by one.
    """

    def __init__(self, owner: str, recompute: bool):
        super().__init__()
        self.recompute, self.one_pass = check_bool(owner, "recompute", recompute), True

    def why_modules(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why inputs like these go through the modules one by one; None: all layers run as one op."""
        return self._why_modules(device, dtype) if self.one_pass else "one_pass is False"

    def _why_modules(self, device: torch.device, dtype: torch.dtype) -> str | None:
        raise NotImplementedError

    def bare(self) -> OnePass:
        """The same weights by modules: what benchmarks call the bare backbone."""
        plain = copy.copy(self)
        plain.one_pass = False
        return plain

    def extra_repr(self) -> str:
        weight = next(self.parameters())
        reason = self.why_modules(weight.device, weight.dtype)
        return "one pass" if reason is None else f"by modules: {reason}"


def row(parts: Iterable[nn.Module | Tensor]) -> Tensor:
    """(P,) the weight and bias of every module, and tensors as they are, one after the other."""
    return torch.cat([x.flatten() for part in parts for x in _tensors(part)])


def why_not(
    op: Op,
    parts: Sequence[nn.Module | Tensor],
    activations: Mapping[nn.Module, type],
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """Why the op does not take the place of these parts, which have all weights, and activations; None if it does.

    It has a kernel for the device and dtype, no autocast is on, and every part is a plain Linear or LayerNorm, all norms
    with the same eps, every activation of its type: a subclass, an adapter, a hook or a sharded weight would be passed over.
    """
    if not op.has_kernel_for(device, dtype):
        return f"no kernel for {device.type}, {str(dtype).removeprefix('torch.')}"
    if autocasts(device):
        return "autocast is on"
    modules = [part for part in parts if isinstance(part, nn.Module)]
    for part in (*modules, *activations):
        if type(part) not in PLAIN if part not in activations else type(part) is not activations[part]:
            return f"a part is {type(part).__name__}"
        if hooked(part):
            return f"a {type(part).__name__} has a hook"
    if len({part.eps for part in modules if isinstance(part, nn.LayerNorm)}) > 1:
        return "norms differ in eps"
    tensors = [x for part in parts for x in _tensors(part)]
    if any(x is None for x in tensors):
        return "a part has no bias"
    if tensors[0].dtype != dtype or tensors[0].device != device:
        return f"the weights are {str(tensors[0].dtype).removeprefix('torch.')} on {tensors[0].device.type}"
    if any(kind.__name__ == "DTensor" for kind in set(map(type, tensors))):
        return "a weight is sharded"
    return None


def hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _tensors(part: nn.Module | Tensor) -> tuple[Any, ...]:
    """Of a module: its weight and bias, in this order."""
    return (part,) if isinstance(part, Tensor) else tuple(part._parameters.values())

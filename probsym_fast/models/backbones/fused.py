"""When a backbone runs as one op, all layers in one pass, and the row of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from probsym_fast._autocast import autocasts
from probsym_fast.ops._op import Op

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def row(parts: Iterable[nn.Module | Tensor]) -> Tensor:
    """(P,) the weight and bias of every module, and tensors as they are, one after the other."""
    return torch.cat([x.flatten() for part in parts for x in ([part] if isinstance(part, Tensor) else _tensors(part))])


def why_not(op: Op, parts: Sequence[nn.Module | Tensor], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these parts run as modules, one by one, and not as the op; None if the op takes their place.

    The op has a kernel for the device and dtype, no autocast or torch.func transform is on, and every part is a plain
    Linear or LayerNorm, as a subclass, an adapter, a hook or a sharded weight would be passed over.
    """
    if not op.has_kernel_for(device, dtype):
        return f"no kernel for {device.type}, {str(dtype).removeprefix('torch.')}"
    if autocasts(device):
        return "autocast is on"
    for part in parts:
        if isinstance(part, nn.Module):
            if type(part) not in (nn.Linear, nn.LayerNorm):
                return f"a part is {type(part).__name__}"
            if any(getattr(part, hooks) for hooks in HOOKS):
                return f"a {type(part).__name__} has a hook"
        for x in [part] if isinstance(part, Tensor) else _tensors(part):
            if x is None:
                return f"a {type(part).__name__} has no bias"
            if x.dtype != dtype or x.device != device:
                return f"a weight is {str(x.dtype).removeprefix('torch.')} on {x.device.type}"
            if type(x).__name__ == "DTensor":
                return "a weight is sharded"
    return None


def described(backbone: nn.Module, weight: Tensor) -> str:
    """Which path inputs like the weights take, for print(model)."""
    reason = backbone.why_modules(weight.device, weight.dtype)
    return "one pass" if reason is None else f"by modules: {reason}"


def _tensors(part: nn.Module) -> tuple[Tensor, Tensor]:
    return part.weight, part.bias  # type: ignore[return-value]  # of Linear and LayerNorm

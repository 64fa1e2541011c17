"""Networks of other libraries on given tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probsym_fast._autocast import autocasts, promoted
from probsym_fast._checks import transformed
from probsym_fast._compilers import is_fake


class OnTokens(nn.Module):
    """A network on tokens (..., L, D), any leading axes, which a model of another library takes as (M, L, D).

    tokens: L. width: D. out_width: that of the outputs, here D. read: what of them is returned. checkpointing: keep only
    what `run` is given for the backward pass, which computes the rest again.
    """

    def __init__(self, tokens: int, width: int, read: str, checkpointing: bool = False):
        super().__init__()
        self.tokens, self.width, self.read, self.checkpointing = tokens, width, read, checkpointing
        self.out_width = width
        self.register_load_state_dict_post_hook(_after_loading)

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, width={self.width}, read={self.read!r}"

    def restore(self, module: nn.Module) -> None:
        """Computes the constants of a part again, which `to_empty` has left undefined."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OnTokens:
        before = [(module, constants(module)) for module in self.modules()]
        super()._apply(fn, recurse)
        for module, old in before:
            new = constants(module)
            if any(not _same(old[name], new[name]) for name in old):
                self.restore(module)
        return self

    def run(self, function: Any, *arguments: Any, **named: Any) -> Tensor:
        """function(*arguments, **named), with a checkpoint if the network has them."""
        # torch.func takes no checkpoints
        if self.checkpointing and torch.is_grad_enabled() and not transformed():
            return checkpoint(function, *arguments, use_reentrant=False, **named)
        return function(*arguments, **named)

    def folded(self, function: Callable[..., Tensor], x: Tensor, dtype: torch.dtype, *rows: Tensor) -> Tensor:
        """function((M, L, D), *rows) of x (..., L, D), the leading axes as one and back, for weights of this dtype.

        rows (M, ...): one per sequence, not given where there are no sequences.

        Raises ValueError for another shape, TypeError for integers and for a wider dtype than that of the weights
        (under autocast only for float64, which autocast does not cast).
        """
        name = type(self).__name__
        if x.ndim < 2 or x.shape[-2:] != (self.tokens, self.width):
            raise ValueError(f"{name}: x must be (..., {self.tokens}, {self.width}), got {tuple(x.shape)}")
        cast = autocasts(x.device) and x.dtype != torch.float64
        if not x.is_floating_point() or not (cast or promoted(x.dtype, dtype) == dtype):
            raise TypeError(f"{name}: x must be {dtype} as the weights are, got {x.dtype}")
        lead, M = x.shape[:-2], math.prod(x.shape[:-2])
        h = x.reshape(M, self.tokens, self.width)
        if not M:  # BEiT and BERT fail on 0 sequences
            h, rows = x.new_zeros(1, self.tokens, self.width), ()
        y = function(h, *rows)[:M]
        return y.reshape(*lead, *y.shape[1:])


def constants(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that no state dict holds, such as tables of rotary positions."""
    return {
        name: x for name, x in module._buffers.items() if x is not None and name in module._non_persistent_buffers_set
    }


def _after_loading(net: OnTokens, _: Any) -> None:
    """A network built on the meta device whose weights were assigned still has its constants there."""
    device = next(net.parameters()).device
    for module in net.modules():
        missing = {name: x for name, x in constants(module).items() if x.is_meta and device.type != "meta"}
        for name, x in missing.items():
            module._buffers[name] = torch.empty_like(x, device=device)
        if missing:
            net.restore(module)


def _same(old: Tensor, new: Tensor) -> bool:
    known = not (old.is_meta or new.is_meta or is_fake(old) or is_fake(new))
    return known and torch.equal(old.to(new), new)

"""Networks of other libraries on given tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probsym_fast._checks import transformed


class OnTokens(nn.Module):
    """A network on tokens (..., L, D), any leading axes, which `sequences` takes as (M, L, D).

    tokens: L. width: D. read: what of the outputs is returned. checkpointing: keep only what `run` is given for the
    backward pass, which computes the rest again.
    """

    def __init__(self, tokens: int, width: int, read: str, checkpointing: bool = False):
        super().__init__()
        self.tokens, self.width, self.read, self.checkpointing = tokens, width, read, checkpointing

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, width={self.width}, read={self.read!r}"

    def sequences(self, x: Tensor, **inputs: Any) -> Tensor:
        """(M, L, D) -> (M, ...), M at least 1."""
        raise NotImplementedError

    def run(self, function: Any, *arguments: Any, **named: Any) -> Tensor:
        """function(*arguments, **named), with a checkpoint if the network has them."""
        # torch.func takes no checkpoints
        if self.checkpointing and torch.is_grad_enabled() and not transformed():
            return checkpoint(function, *arguments, use_reentrant=False, **named)
        return function(*arguments, **named)

    def folded(self, x: Tensor, dtype: torch.dtype, **inputs: Any) -> Tensor:
        """`sequences` of x (..., L, D) with the leading axes as one and back, for weights of this dtype.

        Raises ValueError for another shape, TypeError for integers and for a wider dtype than that of the weights
        (under autocast only for float64, which autocast does not cast).
        """
        name = type(self).__name__
        if x.ndim < 2 or x.shape[-2:] != (self.tokens, self.width):
            raise ValueError(f"{name}: x must be (..., {self.tokens}, {self.width}), got {tuple(x.shape)}")
        cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        if not x.is_floating_point() or not (cast or torch.promote_types(x.dtype, dtype) == dtype):
            raise TypeError(f"{name}: x must be {dtype} as the weights are, got {x.dtype}")
        lead, M = x.shape[:-2], math.prod(x.shape[:-2])
        h = x.reshape(M, self.tokens, self.width)
        if not M:  # BEiT and BERT fail on 0 sequences
            h, inputs = x.new_zeros(1, self.tokens, self.width), {}
        y = self.sequences(h, **inputs)[:M]
        return y.reshape(*lead, *y.shape[1:])

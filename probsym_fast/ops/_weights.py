"""Ops that run a network whose weights are one row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PADDING = 16  # what is kept of each layer is for sequences in multiples of it, as in csrc/cpu/network.h


def kept_rows(M: int) -> int:
    """And one more, which says what the others are laid out for."""
    return (M + PADDING - 1) // PADDING * PADDING + 1


def kept_memory(rows: int, width: int, used: int, x: Tensor) -> Tensor:
    """(rows, width) like x, of which the caller sets the first `used` numbers: the others are zero."""
    kept = x.new_empty(rows, width)
    kept.view(-1)[used:].zero_()
    return kept


def needs_kept(recompute: bool, *inputs: Tensor) -> bool:
    """Whether a backward pass follows that reads the layers' inputs."""
    return not recompute and torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def beyond(found: Mapping[str, int], most: Mapping[str, int]) -> str | None:
    """The first size that kernels do not take; None: they take all."""
    reasons = (f"its kernels take at most {most[x]} {x}, got {n}" for x, n in found.items() if n > most[x])
    return next(reasons, None)


def check_weights(op: str, weights: Tensor, x: Tensor, count: int) -> None:
    """ValueError unless weights is (count,); TypeError and RuntimeError unless of x's dtype and device."""
    if tuple(weights.shape) != (count,):
        raise ValueError(f"{op}: weights must be (P,) = ({count},), got {tuple(weights.shape)}")
    if weights.dtype != x.dtype:
        raise TypeError(f"{op}: weights must be {x.dtype} as x is, got {weights.dtype}")
    if weights.device != x.device:
        raise RuntimeError(f"{op}: weights must be on {x.device}, got {weights.device}")

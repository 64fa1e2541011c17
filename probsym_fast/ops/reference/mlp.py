"""mlp in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from probsym_fast.ops.reference._parts import FUNCTIONS, Parts

ROWS = 5  # of x that are kept together, as in csrc/cpu/mlp.h


def mlp(
    x: Tensor,
    weights: Tensor,
    widths: Sequence[int],
    activation: int,
    first: bool,
    last: bool,
    keep: bool,
    allow_bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """x (M, widths[0]) -> y (M, widths[-1]); nothing is kept."""
    act, part = list(FUNCTIONS.values())[activation], Parts(weights)
    y = act(x) if first else x
    for k, (into, out) in enumerate(pairwise(widths)):
        y = part.linear(into, out)(act(y) if k else y)
    return act(y) if last else y, x.new_empty(0, values_kept(widths, last))


def values_kept(widths: Sequence[int], last: bool) -> int:
    """How many values go into activations after the layers, of the rows that are kept together."""
    return ROWS * (sum(widths[1:-1]) + (widths[-1] if last else 0))

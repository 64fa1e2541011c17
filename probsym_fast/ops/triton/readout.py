"""readout and its gradient: the sums of items.py with the roles of `embed` swapped, averaging over samples inside."""

from __future__ import annotations

from torch import Tensor

from probsym_fast.ops.triton.items import Items, weight_like, weight_rows
from probsym_fast.ops.triton.soft_rows import permutation_gradient


def forward(tokens, items, ptr, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight, bias) -> Tensor:
    x = Items(items, ptr, rank, slots, most_places, grid)
    x.check(weight, tokens, None, bias, order, t, log_r, log_c)
    return x.gather(tokens, 1 / x.S, weight_rows(weight), bias)


def backward(
    d_values, tokens, items, ptr, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight,
    needs_tokens, needs_t, needs_weight, needs_bias,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    x = Items(items, ptr, rank, slots, most_places, grid)
    x.check(weight, tokens, d_values, None, order, t, log_r, log_c)
    W, tokens, scale = weight_rows(weight), tokens.contiguous(), 1 / x.S
    lists = x.pairs(d_values, scale, by_token=needs_tokens, by_row=needs_weight) if needs_tokens or needs_weight else []
    d_tokens = x.scatter(lists[0], W, None) if needs_tokens else None
    d_weight = weight_like(x.weight_gradient(lists[-1], tokens, W), weight) if needs_weight else None
    soft = order, t, log_r, log_c, tau
    d_soft = permutation_gradient(x, d_values, scale, tokens, W, *soft) if needs_t else (None,) * 3
    d_bias = d_values.sum(0) if needs_bias else None
    return d_tokens, *d_soft, d_weight, d_bias

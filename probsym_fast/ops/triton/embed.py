"""embed and its gradient: the sums of items.py."""

from __future__ import annotations

from torch import Tensor

from probsym_fast.ops.triton.items import Items, weight_like, weight_rows
from probsym_fast.ops.triton.soft_rows import permutation_gradient


def forward(items, values, ptr, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight, bias) -> Tensor:
    x = Items(items, ptr, rank, slots, most_places, grid)
    x.check(weight, None, values, bias, order, t, log_r, log_c)
    (lists,) = x.pairs(values, 1.0, by_token=True)
    return x.scatter(lists, weight_rows(weight), bias)


def backward(
    d_tokens, items, values, ptr, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight,
    needs_values, needs_t, needs_weight, needs_bias,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    x = Items(items, ptr, rank, slots, most_places, grid)
    x.check(weight, d_tokens, values, None, order, t, log_r, log_c)
    W, d_tokens = weight_rows(weight), d_tokens.contiguous()
    d_weight = None
    if needs_weight:
        (lists,) = x.pairs(values, 1.0, by_row=True)
        d_weight = weight_like(x.weight_gradient(lists, d_tokens, W), weight)
    d_values = x.gather(d_tokens, 1.0, W, None) if needs_values else None
    soft = order, t, log_r, log_c, tau
    d_soft = permutation_gradient(x, values, 1.0, d_tokens, W, *soft) if needs_t else (None,) * 3
    d_bias = d_tokens.sum((0, 1, 2)) if needs_bias else None
    return d_values, *d_soft, d_weight, d_bias

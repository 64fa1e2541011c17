"""embed_matrix and its gradient: the matrix products of patches.py, and the reductions of matrix_gradient.py."""

from __future__ import annotations

from torch import Tensor

from probsym_fast.ops.triton.items import weight_like, weight_rows
from probsym_fast.ops.triton.matrix_gradient import MatrixGradient
from probsym_fast.ops.triton.patches import Patches


def forward(matrix, num_nodes, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight, bias) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    x = Patches(matrix, num_nodes, order, slots, grid)
    x.check(weight, None, bias, rank, t, log_r, log_c)
    return x.times(weight_rows(weight), bias)


def backward(
    d_tokens, matrix, num_nodes, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight,
    needs_matrix, needs_t, needs_weight, needs_bias,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    x = Patches(matrix, num_nodes, order, slots, grid)
    x.check(weight, d_tokens, None, rank, t, log_r, log_c)
    W, d_tokens = weight_rows(weight), d_tokens.contiguous()
    d_matrix = d_t = d_log_r = d_log_c = None
    if needs_matrix or needs_t:
        found = MatrixGradient(x, most_places)(
            d_tokens, W, rank.contiguous() if needs_matrix else None, (t, log_r, log_c) if needs_t else None, tau
        )
        d_matrix, d_t, d_log_r, d_log_c = found
    d_weight = weight_like(x.weight_gradient(d_tokens, W), weight) if needs_weight else None
    d_bias = d_tokens.sum((0, 1, 2)) if needs_bias else None
    return d_matrix, d_t, d_log_r, d_log_c, d_weight, d_bias

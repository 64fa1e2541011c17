"""embed, dense: permutation matrices, padding, a strided convolution. N^3 C operations per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast.ops._patches import check_items, pad_axis
from probsym_fast.ops.reference._dense import dense_items, permutation_matrix


def check_values(items: Tensor, values: Tensor, ptr: Tensor, *_) -> None:
    check_items(*(("embed_edges", "edge_index") if len(items) == 2 else ("embed_nodes", "x")), items, ptr)


def embed(items, values, ptr, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight, bias) -> Tensor:
    """items (k, M) nodes or pairs, values (M, C), weight (D, C, P[, P]) -> tokens (B, S, grid^k, D)."""
    check_values(items, values, ptr)
    x = dense_items(items, values, ptr, rank.shape[-1])
    p = permutation_matrix(rank, order, ptr.diff(), t, log_r, log_c, tau, x.dtype)
    return tokens_of(act(p, x), slots, weight, bias)


def act(p: Tensor, x: Tensor) -> Tensor:
    """P^T x (P): (B, S, N, N) on (B, N[, N], C) -> (B, S, N[, N], C)."""
    if x.ndim == 3:
        return torch.einsum("bsui,buc->bsic", p, x)
    return torch.einsum("bsivc,bsvj->bsijc", torch.einsum("bsui,buvc->bsivc", p, x), p)


def tokens_of(x: Tensor, slots: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Pads x (B, S, N[, N], C), convolves with weight (D, C, P[, P]) at stride P -> (B, S, grid^k, D)."""
    B, S, k = *x.shape[:2], weight.ndim - 2
    for axis in range(k):
        x = pad_axis(x, slots, 2 + axis)
    convolve = torch.nn.functional.conv2d if k == 2 else torch.nn.functional.conv1d
    x = x.flatten(0, 1).movedim(-1, 1).contiguous()  # torch cannot differentiate its convolutions in every layout
    y = convolve(x, weight.contiguous(), bias, stride=weight.shape[-1])  # (B S, D, grid[, grid])
    return y.flatten(2).mT.unflatten(0, (B, S))

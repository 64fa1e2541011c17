"""Shared by the dense references: the permutation matrix that acts, and ragged data as dense arrays."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast.ops.permutation import Permutation, SoftPermutation


def permutation_matrix(
    rank: Tensor,
    order: Tensor,
    num_nodes: Tensor | None,
    t: Tensor | None,
    log_r: Tensor | None,
    log_c: Tensor | None,
    tau: float,
    dtype: torch.dtype,
) -> Tensor:
    """(B, S, N, N), rows nodes, columns slots: hard values, with the soft permutation's gradient if there is one."""
    if t is None or log_r is None or log_c is None:
        return Permutation(order, num_nodes, rank, checked=True).hard(dtype)
    return SoftPermutation(order, num_nodes, rank, t, log_r, log_c, tau, checked=True).dense().to(dtype)


def local_nodes(items: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor]:
    """The graph (M,) and the node numbers within it (k, M) of items with global node numbers."""
    first = items[0].clone(memory_format=torch.contiguous_format)  # under vmap contiguous() leaves it as it is
    graph = torch.searchsorted(ptr.contiguous(), first, right=True) - 1
    return graph, items - ptr[graph]


def dense_items(items: Tensor, values: Tensor, ptr: Tensor, N: int) -> Tensor:
    """values (M, C) of nodes or pairs, summed into (B, N[, N], C)."""
    graph, local = local_nodes(items, ptr)
    out = values.new_zeros(ptr.shape[0] - 1, *[N] * items.shape[0], values.shape[-1])
    return out.index_put((graph, *local), values, accumulate=True)

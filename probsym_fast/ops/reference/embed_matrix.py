"""embed_matrix, dense: permutation matrices, padding, a strided convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast.ops.permutation import valid_slots
from probsym_fast.ops.reference._dense import permutation_matrix
from probsym_fast.ops.reference.embed import act, tokens_of


def embed_matrix(
    matrix, num_nodes, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight, bias
) -> Tensor:
    """matrix (B, N, N, C), weight (D, C, P, P) -> tokens (B, S, grid^2, D)."""
    if num_nodes is not None:
        valid = valid_slots(num_nodes, matrix.shape[1])[:, 0]
        matrix = torch.where((valid[:, :, None] & valid[:, None])[..., None], matrix, 0)
    p = permutation_matrix(rank, order, num_nodes, t, log_r, log_c, tau, matrix.dtype)
    return tokens_of(act(p, matrix), slots, weight, bias)

"""node_identifiers, dense: the permutation matrix times the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast.ops._patches import count_nodes
from probsym_fast.ops.reference._dense import local_nodes, permutation_matrix


def node_identifiers(ptr, rank, order, t, log_r, log_c, tau, weight, nodes) -> Tensor:
    """weight (N, D) -> features (nodes, S, D)."""
    count_nodes("node_identifiers", ptr, nodes)
    p = permutation_matrix(rank, order, ptr.diff(), t, log_r, log_c, tau, weight.dtype)
    graph, local = local_nodes(torch.arange(nodes, device=ptr.device)[None], ptr)
    return (p @ weight)[graph, :, local[0]]

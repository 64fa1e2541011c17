"""aggregate: gather and index_add."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast.ops._op import looks_at_values


def aggregate(x: Tensor, edge_index: Tensor) -> Tensor:
    """x (nodes, ...) -> sums of the neighbours' rows (nodes, ...)."""
    if looks_at_values(edge_index):
        bad = ((edge_index < 0) | (edge_index >= x.shape[0])).any(0).nonzero()
        if len(bad):
            column = int(bad[0])
            u, v = edge_index[:, column].tolist()
            raise ValueError(
                f"aggregate: edge_index must hold node numbers 0 to {x.shape[0] - 1}, got {u} and {v} in column {column}"
            )
    return torch.zeros_like(x).index_add(0, edge_index[1], x.index_select(0, edge_index[0]))

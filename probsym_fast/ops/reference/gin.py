"""gin in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from probsym_fast._checks import looks_at_values
from probsym_fast.ops.reference._parts import FUNCTIONS, Parts
from probsym_fast.ops.reference.aggregate import aggregate


def gin(
    x: Tensor,
    edge_index: Tensor,
    ptr: Tensor,
    weights: Tensor,
    layers: int,
    out_features: int,
    activation: int,
    final: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """x (nodes, S, width) -> y (B, S, out); nothing is kept."""
    check_values(x, edge_index, ptr)
    nodes, S, width = x.shape
    act, part = list(FUNCTIONS.values())[activation], Parts(weights)
    eps, first = part(layers), part(width)
    h = x
    for k in range(layers):
        h = aggregate(h, edge_index, None, 1 + eps[k])
        h = act(part.linear(width, width)(h) if k else h + first)
    graph = torch.arange(ptr.shape[0] - 1, device=x.device).repeat_interleave(ptr.diff(), output_size=nodes)
    y = part.linear(width, out_features)(x.new_zeros(ptr.shape[0] - 1, S, width).index_add(0, graph, h))
    return act(y) if final else y, x.new_empty(0, nodes, S, width)


def check_values(x: Tensor, edge_index: Tensor, ptr: Tensor, *_) -> None:
    """ValueError unless ptr rises from 0 to the nodes and edges join nodes of one graph, where checks may read values."""
    if not looks_at_values(edge_index, ptr):
        return
    nodes, begin = x.shape[0], ptr.tolist()
    if begin[0] != 0 or begin[-1] != nodes:
        raise ValueError(f"gin: ptr must rise from 0 to the {nodes} nodes, got {begin[0]} to {begin[-1]}")
    for one, two in pairwise(begin):
        if two < one:
            raise ValueError(f"gin: ptr must rise, got {two} after {one}")
    for column in ((edge_index < 0) | (edge_index >= nodes)).any(0).nonzero().flatten().tolist():
        u, v = edge_index[:, column].tolist()
        raise ValueError(f"gin: edge_index must hold node numbers 0 to {nodes - 1}, got {u} and {v} in column {column}")
    graph = torch.searchsorted(ptr.contiguous(), edge_index.contiguous(), right=True) - 1
    for column in (graph[0] != graph[1]).nonzero().flatten().tolist():
        b, c = graph[:, column].tolist()
        raise ValueError(
            f"gin: edge_index must join nodes of one graph, got column {column} from graph {b} to graph {c}"
        )

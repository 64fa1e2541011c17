"""aggregate: gather and index_add."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._checks import looks_at_values


def aggregate(x: Tensor, edge_index: Tensor, ptr: Tensor | None, own: Tensor | None) -> Tensor:
    """x (nodes [+ B], ...) -> sums of the neighbours' rows, of the same shape."""
    graphs = 0 if ptr is None else ptr.shape[0] - 1
    nodes = x.shape[0] - graphs
    check_values(x, edge_index, ptr)
    out = torch.zeros_like(x) if own is None else own * x
    out = out.index_add(0, edge_index[1], x.index_select(0, edge_index[0]))
    if ptr is None:
        return out
    graph = torch.arange(graphs, device=x.device).repeat_interleave(ptr.diff(), output_size=nodes)
    everyone = torch.arange(nodes, device=x.device)
    virtual = torch.arange(nodes, nodes + graphs, device=x.device)
    source, target = torch.cat([everyone, nodes + graph, virtual]), torch.cat([nodes + graph, everyone, virtual])
    return out.index_add(0, target, x.index_select(0, source))


def check_values(x: Tensor, edge_index: Tensor, ptr: Tensor | None, *_) -> None:
    """ValueError unless each edge joins nodes of one graph, where checks may read values."""
    if not looks_at_values(edge_index, ptr):
        return
    nodes = x.shape[0] - (0 if ptr is None else ptr.shape[0] - 1)
    bad = ((edge_index < 0) | (edge_index >= nodes)).any(0).nonzero()
    if len(bad):
        column = int(bad[0])
        u, v = edge_index[:, column].tolist()
        raise ValueError(
            f"aggregate: edge_index must hold node numbers 0 to {nodes - 1}, got {u} and {v} in column {column}"
        )
    if ptr is None:
        return
    if int(ptr[0]) != 0 or int(ptr[-1]) != nodes:
        raise ValueError(f"aggregate: ptr must rise from 0 to the {nodes} nodes, got {int(ptr[0])} to {int(ptr[-1])}")
    if (ptr.diff() < 0).any():
        k = int((ptr.diff() < 0).nonzero()[0])
        raise ValueError(f"aggregate: ptr must rise, got {int(ptr[k + 1])} after {int(ptr[k])}")
    graph = torch.searchsorted(ptr, edge_index, right=True) - 1
    bad = (graph[0] != graph[1]).nonzero()
    if len(bad):
        column = int(bad[0])
        b, c = graph[:, column].tolist()
        raise ValueError(
            f"aggregate: edge_index must join nodes of one graph, got column {column} from graph {b} to graph {c}"
        )

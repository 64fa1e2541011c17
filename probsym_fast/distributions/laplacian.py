"""The predefined frame of graphs: nodes sorted by the Laplacian's eigenspaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad

SAME_EIGENVALUE = 1e-6  # of the graph's largest eigenvalue
MARGIN = 1e-8
CHUNK = 2**21  # matrix entries at a time


def laplacian_keys(edge_index: Tensor, ptr: Tensor) -> Tensor:
    """Position class of every node in its graph: (nodes,) int64, 0..c-1 without gaps. Equal classes are ties.

    With L = D - A, not normalised, and V_k an orthonormal basis of its k-th eigenspace, eigenvalues ascending,
        row[u] = (r(|V_1^T e_u|), r(|V_2^T e_u|), ...),   r(p) = floor(100 p + 1/2) / 100,
    and class[u] is the number of distinct rows of the graph before row[u] in lexicographic order. The norm does not depend
    on the basis; in one dimension it is the absolute value of the eigenvector's entry.

    Permuting the nodes permutes the classes despite rounding errors. Neighbouring eigenvalues share an eigenspace if they
    differ by at most 1e-6 lambda_max, which bounds the error of p by about 1e-9. r rounds up from 1e-8 below the half, so
    values at the half, such as 1/8 in a graph of 64 nodes, all go up. It can fail only if some p lies within its error
    (median 1e-15) of half - 1e-8, or a gap within its error of the tolerance.

    edge_index: (2, E) int64, global node numbers. A is 0 or 1: an edge counts in both directions, duplicates count once,
    and loops do not count. ptr: (B + 1,) int64, graph b has the nodes ptr[b]..ptr[b + 1] - 1, at least one.
    Cost: O(n^3) per graph in float64, on one CPU thread: about 0.16 ms for n = 44, 1.2 ms for 117, 3.3 ms for 188.
    The result is on the device of ptr.
    Raises TypeError for other dtypes; ValueError for other shapes, for a ptr that does not start at 0 and increase, and
    for edges out of range or between two graphs.
    Source: Puny et al. 2022 (arXiv 2110.03336).
    """
    edges, starts, graph = _check(edge_index, ptr)
    with _one_thread():
        return _by_size(edges, starts, graph).to(ptr.device)


def _by_size(edges: Tensor, starts: Tensor, graph: Tensor) -> Tensor:
    """Graphs of one size together. edges: (2, E). starts: (B + 1,). graph: (E,), the graph of each edge. -> (nodes,)."""
    sizes, by_size = starts.diff().sort(stable=True)
    slot = torch.empty_like(by_size).scatter_(0, by_size, torch.arange(len(by_size)))[graph]
    slot, by_slot = slot.sort()
    edges = (edges - starts[graph])[:, by_slot]
    classes = torch.empty(int(starts[-1]), dtype=torch.int64)
    first = 0
    for n, count in zip(*(x.tolist() for x in sizes.unique_consecutive(return_counts=True)), strict=True):
        for chunk in torch.arange(first, first + count).split(max(1, CHUNK // n**2)):
            a, G = int(chunk[0]), len(chunk)
            begin, end = torch.searchsorted(slot, torch.tensor([a, a + G])).tolist()
            adjacency = torch.zeros(G, n, n, dtype=torch.float64)
            u, v = edges[:, begin:end]
            adjacency[slot[begin:end] - a, u, v] = 1
            nodes = starts[by_size[chunk], None] + torch.arange(n)
            classes[nodes] = _classes(_rows(torch.maximum(adjacency, adjacency.mT)))
        first += count
    return classes


def _rows(adjacency: Tensor) -> Tensor:
    """Symmetric (G, n, n) -> 100 row[u]: (G, n, n) int64 in 0..100; columns beyond the number of eigenspaces are 0."""
    values, vectors = torch.linalg.eigh(torch.diag_embed(adjacency.sum(-1)) - adjacency)  # loops cancel
    new = values.diff(dim=-1) > SAME_EIGENVALUE * values[:, -1:]
    space = pad(new.cumsum(-1), (1, 0))[:, None].expand(vectors.shape)
    norms = torch.zeros_like(vectors).scatter_add_(-1, space, vectors.square()).sqrt()
    return (100 * (norms + MARGIN) + 0.5).long()


@contextmanager
def _one_thread() -> Iterator[None]:
    """For eigh of small matrices: on two threads 44 x 44 took 300 times as long while other processes used the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _classes(rows: Tensor) -> Tensor:
    """Dense rank of each row among those of its graph: (G, n, K) integers in 0..127 -> (G, n)."""
    classes = torch.zeros(rows.shape[:2], dtype=torch.int64)
    for columns in rows.split(6, dim=-1):  # 6 x 7 bits, which leaves 21 for the class
        key = classes
        for column in columns.unbind(-1):
            key = key * 128 + column
        key, order = key.sort(dim=-1)
        rank = pad((key.diff(dim=-1) != 0).cumsum(-1), (1, 0))
        classes = torch.empty_like(classes).scatter_(-1, order, rank)
        if (rank[:, -1] == rank.shape[-1] - 1).all():  # no ties left
            break
    return classes


def _check(edge_index: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both on the CPU, and the graph of each edge (E,)."""
    for name, x in (("edge_index", edge_index), ("ptr", ptr)):
        if not isinstance(x, Tensor) or x.dtype != torch.int64:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"laplacian_keys: {name} must be an int64 Tensor, got {got}")
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"laplacian_keys: edge_index must be (2, E), got {tuple(edge_index.shape)}")
    if ptr.ndim != 1 or len(ptr) == 0:
        raise ValueError(f"laplacian_keys: ptr must be (B + 1,), got {tuple(ptr.shape)}")
    edge_index, ptr = edge_index.cpu(), ptr.cpu()
    if ptr[0] != 0:
        raise ValueError(f"laplacian_keys: ptr must start at 0, got {int(ptr[0])}")
    wrong = (ptr.diff() <= 0).nonzero()
    if len(wrong):
        b = int(wrong[0])
        raise ValueError(f"laplacian_keys: ptr must increase, got ptr[{b}] = {ptr[b]} and ptr[{b + 1}] = {ptr[b + 1]}")
    nodes = int(ptr[-1])
    wrong = ((edge_index < 0) | (edge_index >= nodes)).any(0).nonzero()
    if len(wrong):
        e = int(wrong[0])
        raise ValueError(
            f"laplacian_keys: edge_index must be in 0..ptr[-1] - 1 = {nodes - 1}, "
            f"got edge_index[:, {e}] = {edge_index[:, e].tolist()}"
        )
    graph = torch.searchsorted(ptr, edge_index.contiguous(), right=True) - 1
    wrong = (graph[0] != graph[1]).nonzero()
    if len(wrong):
        e = int(wrong[0])
        raise ValueError(
            f"laplacian_keys: edges must stay in one graph, got edge_index[:, {e}] = {edge_index[:, e].tolist()} "
            f"in graphs {graph[:, e].tolist()}"
        )
    return edge_index, ptr, graph[0]

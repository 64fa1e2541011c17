"""Random ragged batches of graphs, and the same graphs with their nodes numbered anew."""

from collections.abc import Sequence

import torch
from torch import Tensor

from probsym_fast.groups import Graphs
from probsym_fast.ops import Permutation


def random_graphs(
    sizes: Sequence[int], features: int = 2, dtype: torch.dtype = torch.float64, edge_features: int = 0, seed: int = 0
) -> Graphs:
    """Undirected graphs of these sizes, half of the pairs joined; no loops."""
    generator = torch.Generator().manual_seed(seed)
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    edges = []
    for n, start in zip(sizes, ptr, strict=False):
        upper = torch.rand(n, n, generator=generator).triu(1) > 0.5
        u, v = upper.nonzero().T + start
        edges.append(torch.stack([torch.cat([u, v]), torch.cat([v, u])]))
    edge_index = torch.cat(edges, 1)
    x = torch.randn(int(ptr[-1]), features, generator=generator, dtype=dtype)
    attributes = torch.randn(edge_index.shape[1], edge_features, generator=generator, dtype=dtype)
    return Graphs(x, edge_index, ptr, attributes if edge_features else None)


def relabelled(batch: Graphs, seed: int = 0) -> tuple[Graphs, Tensor]:
    """The same graphs, and the new number (nodes,) of each node."""
    generator = torch.Generator().manual_seed(seed)
    new = torch.cat([torch.randperm(int(n), generator=generator) for n in batch.num_nodes]) + batch.ptr[batch.graph]
    frame = None if batch.frame is None else torch.empty_like(batch.frame).index_put((new,), batch.frame)
    x = torch.empty_like(batch.x).index_put((new,), batch.x)
    return batch.replace(x=x, edge_index=new[batch.edge_index], frame=frame), new


def as_permutation(batch: Graphs, new: Tensor, samples: int, N: int) -> Permutation:
    """The element of Symmetric(N) that numbers the nodes anew, for every sample."""
    order = torch.arange(N).repeat(batch.size, samples, 1)
    order[batch.graph, :, batch.local] = (new - batch.ptr[batch.graph])[:, None]
    return Permutation(order, batch.num_nodes)


def adjacency(batch: Graphs, N: int) -> Tensor:
    """(B, N, N, C): the sum of the attributes of the edges (u, v)."""
    u, v = batch.edge_index
    dense = batch.attributes.new_zeros(batch.size, N, N, batch.attributes.shape[1])
    index = batch.graph[u], batch.local[u], batch.local[v]
    return dense.index_put(index, batch.attributes, accumulate=True)


def features(batch: Graphs, N: int) -> Tensor:
    """(B, N, C): x, zero beyond each graph's nodes."""
    return batch.x.new_zeros(batch.size, N, batch.x.shape[1]).index_put((batch.graph, batch.local), batch.x)


def one_graph(batch: Graphs, number: int) -> Graphs:
    """Graph `number` alone."""
    start, end = batch.ptr[number : number + 2].tolist()
    mine = (batch.edge_index[0] >= start) & (batch.edge_index[0] < end)
    return Graphs(
        batch.x[start:end],
        batch.edge_index[:, mine] - start,
        torch.tensor([0, end - start]),
        None if batch.edge_attr is None else batch.edge_attr[mine],
        None if batch.key is None else batch.key[number : number + 1],
        None if batch.frame is None else batch.frame[start:end],
    )

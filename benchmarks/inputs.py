"""Random graphs with the shapes of the experiments, for benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def molecule(nodes: int, extra: int = 5) -> Tensor:
    """(2, E) edges, in both directions, of a random tree with a few rings: as sparse as a peptide."""
    u = torch.arange(1, nodes)
    v = (torch.rand(nodes - 1) * u).long()
    edges = torch.cat([torch.stack([u, v]), torch.randint(0, nodes, (2, extra))], 1)
    return torch.cat([edges, edges.flip(0)], 1)


def molecules(sizes: list[int], extra: int = 5) -> tuple[Tensor, Tensor]:
    """edge_index and ptr of a ragged batch."""
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    return torch.cat([molecule(n, extra) + offset for n, offset in zip(sizes, ptr, strict=False)], 1), ptr


def one_hot(count: int, classes: int) -> Tensor:
    """(count, classes) float32, a random class per row."""
    return torch.nn.functional.one_hot(torch.randint(0, classes, (count,)), classes).float()


def dense_graphs(sizes: list[int], N: int, channels: int, density: float) -> Tensor:
    """(B, N, N, C) symmetric 0/1 matrices of this density on the first `size` nodes, 0 elsewhere."""
    out = torch.zeros(len(sizes), N, N, channels)
    for matrix, n in zip(out, sizes, strict=True):
        ones = (torch.rand(n, n, channels) < density).float() * torch.ones(n, n).triu()[..., None]
        matrix[:n, :n] = torch.maximum(ones, ones.transpose(0, 1))
    return out

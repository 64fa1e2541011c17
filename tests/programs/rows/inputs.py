"""Random inputs of the rows, made for a size."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast import ops
from probsym_fast.groups import Graphs, Images, PointClouds
from tests.programs.rows.base import Size

S, N, C, D, GRID = 3, 8, 2, 6, 2  # samples, slots, channels, width, patches along an axis
P = N // GRID
COUNTS = 5, 7, 6, 8, 4, 3, 2  # nodes of the graphs


def nodes(size: Size) -> int:
    return sum(COUNTS[: size.batch])


def graphs(size: Size, attributes: bool = False, **fields: Tensor) -> Graphs:
    """Ragged graphs with random edges; with `attributes` they have edge_attr and key."""
    counts = torch.tensor([0, *COUNTS[: size.batch]])
    ptr, graph = counts.cumsum(0), torch.arange(size.edges) % size.batch
    edges = (torch.rand(2, size.edges) * counts[1:][graph]).long() + ptr[graph]
    if attributes:
        fields |= {"edge_attr": torch.randn(size.edges, 2), "key": torch.arange(size.batch) * 7 + 1}
    return Graphs(torch.randn(int(ptr[-1]), C), edges, ptr, **fields)


def framed(size: Size) -> Graphs:
    batch = graphs(size)
    return batch.replace(frame=batch.local % 3)


def paired(size: Size, attributes: bool = False) -> Graphs:
    """With a pair of nodes to predict for every edge: from its end to its beginning."""
    batch = graphs(size, attributes)
    return batch.replace(pairs=batch.edge_index.flip(0))


def clouds(size: Size) -> PointClouds:
    lead = size.batch, size.nodes
    return PointClouds(torch.randn(*lead, 3), torch.randn(*lead, 3), torch.randn(*lead, size.nodes, 2))


def images(size: Size) -> Images:
    return Images(torch.randn(size.batch, C, N, N), torch.arange(size.batch * N * N).view(size.batch, N, N) % 3)


def scores(size: Size) -> Tensor:
    return torch.randn(size.batch, S, N)


def seed() -> Tensor:
    return torch.tensor(2**61 + 5)


def frames(size: Size) -> Tensor:
    return torch.linalg.qr(torch.randn(size.batch, S, 3, 3)).Q


def soft(batch: Graphs, given: Tensor) -> ops.SoftPermutation:
    return ops.soft_permutation(given, batch.num_nodes, tau=0.1)

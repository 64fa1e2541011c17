"""What groups and distributions read of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from probsym_fast.ops._op import looks_at_values


class Batch(Protocol):
    """size: number of graphs B; num_nodes: (B,) valid nodes or None (all); center: (B, d) centroid or None."""

    size: int
    num_nodes: Tensor | None
    center: Tensor | None
    dtype: torch.dtype
    device: torch.device


class PointClouds(NamedTuple):
    """B clouds of n points in d dimensions with velocities and pair features.

    positions, velocities: (B, n, d). edges: (B, n, n, C), invariant under rotations and translations.
    """

    positions: Tensor
    velocities: Tensor
    edges: Tensor

    @property
    def size(self) -> int:
        return self.positions.shape[0]

    @property
    def num_nodes(self) -> Tensor | None:
        return None

    @property
    def center(self) -> Tensor:
        return self.positions.mean(1)

    @property
    def dtype(self) -> torch.dtype:
        return self.positions.dtype

    @property
    def device(self) -> torch.device:
        return self.positions.device


class Graphs(NamedTuple):
    """B graphs as PyTorch Geometric batches them: all nodes in one list.

    x: (nodes, C) node features. edge_index: (2, E) int64, global node numbers, an undirected edge in both directions.
    ptr: (B + 1,) int64, where each graph's nodes begin. edge_attr: (E, Ce) or None: every edge is a 1. key: (B,) int64 that
    names the graphs (noise may be fixed to it), or None. frame: (nodes,) int64, classes of a predefined order of the nodes
    (`distributions.Frame`), or None.
    """

    x: Tensor
    edge_index: Tensor
    ptr: Tensor
    edge_attr: Tensor | None = None
    key: Tensor | None = None
    frame: Tensor | None = None

    @classmethod
    def from_data(cls, batch: Any) -> Graphs:
        """From a PyTorch Geometric `Batch`, or one `Data`; key and frame are taken where the data have them.

        Raises ValueError where x, edge_index or edge_attr have other shapes, or are missing.
        """
        x, edge_index, ptr, edge_attr, key, frame = (
            getattr(batch, name, None) for name in ("x", "edge_index", "ptr", "edge_attr", "key", "frame")
        )
        for name, value, axes in (("x", x, "(nodes, C)"), ("edge_index", edge_index, "(2, E)")):
            if value is None or value.ndim != 2 or (name == "edge_index" and value.shape[0] != 2):
                got = None if value is None else tuple(value.shape)
                raise ValueError(f"Graphs.from_data: {name} must be {axes}, got {got}")
        if edge_attr is not None and (edge_attr.ndim != 2 or edge_attr.shape[0] != edge_index.shape[1]):
            wanted = f"(E, Ce) = ({edge_index.shape[1]}, *)"
            raise ValueError(f"Graphs.from_data: edge_attr must be {wanted}, got {tuple(edge_attr.shape)}")
        if ptr is None:
            ptr = torch.tensor([0, x.shape[0]], device=x.device)
        if key is not None:  # of one Data it may be a number
            key = torch.as_tensor(key, device=x.device).reshape(-1)
        return cls(x, edge_index, ptr, edge_attr, key, frame)

    @property
    def size(self) -> int:
        return self.ptr.shape[0] - 1

    @property
    def num_nodes(self) -> Tensor:
        return self.ptr.diff()

    @property
    def graph(self) -> Tensor:
        """(nodes,) the graph of each node."""
        graphs = torch.arange(self.size, device=self.ptr.device)
        return graphs.repeat_interleave(self.num_nodes, output_size=self.x.shape[0])

    @property
    def local(self) -> Tensor:
        """(nodes,) number of each node in its graph."""
        return torch.arange(self.x.shape[0], device=self.ptr.device) - self.ptr[self.graph]

    @property
    def center(self) -> None:
        return None

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def attributes(self) -> Tensor:
        """(E, Ce): edge_attr, or ones (E, 1)."""
        return self.x.new_ones(self.edge_index.shape[1], 1) if self.edge_attr is None else self.edge_attr

    def padded(self, values: Tensor, N: int) -> Tensor:
        """values (nodes, S) as (B, S, N), 0 beyond each graph's nodes. ValueError for a graph of more than N nodes."""
        if looks_at_values(self.ptr) and self.size and (most := int(self.num_nodes.max())) > N:
            graph = int(self.num_nodes.argmax())
            raise ValueError(f"Graphs: a graph must have at most N = {N} nodes, got {most} in graph {graph}")
        out = values.new_zeros(self.size, N, values.shape[1])
        return out.index_put((self.graph, self.local), values).mT

    def pooled(self, values: Tensor) -> Tensor:
        """Sums over the nodes of each graph: (nodes, ...) -> (B, ...)."""
        return values.new_zeros(self.size, *values.shape[1:]).index_add(0, self.graph, values)

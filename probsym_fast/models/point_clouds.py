"""Embeddings and readouts of point clouds: positions, velocities and pair features in, points or vectors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._checks import check_bool
from probsym_fast.batches import check_all_valid, check_batch
from probsym_fast.groups import Group, PointClouds


class NodeVectors(nn.Module):
    """Nodes with their coordinates as features, and pair features: (B, S, n, 2 d) and (B, S or 1, n, n, C).

    Pair features have one sample where the group leaves them unchanged (`Group.keeps`). Raises ValueError for a batch with
    num_nodes, which the backbone would ignore.
    """

    def forward(self, batch: PointClouds, group: Group, g: Any) -> tuple[Tensor, Tensor]:
        check_batch("NodeVectors", batch, "positions", "edges")
        x = _coordinates("NodeVectors", batch, group, g)
        edges = batch.edges[:, None] if group.keeps("nnc") else group.act(g, batch.edges, "nnc", inverse=True)
        return x, edges


class PairTokens(nn.Module):
    """One token per pair of nodes: pair features, plus coordinates on the diagonal: (B, S, n n, 2 d + C).

    Raises ValueError for a batch with num_nodes, which the backbone would ignore.
    """

    def forward(self, batch: PointClouds, group: Group, g: Any) -> tuple[Tensor]:
        check_batch("PairTokens", batch, "positions", "edges")
        x = _coordinates("PairTokens", batch, group, g)  # (B, S, n, 2 d)
        B, S, n, width = x.shape
        edges = group.act(g, batch.edges, "nnc", inverse=True)
        diagonal = torch.diag_embed(x.movedim(-1, 2)).movedim(2, -1)  # (B, S, n, n, 2 d)
        return (torch.cat([diagonal, edges], dim=-1).view(B, S, n * n, width + edges.shape[-1]),)


class NodeReadout(nn.Module):
    """One point per node, averaged over samples: (B, S, n, d) -> (B, n, d).

    displacement=False: the output is a position in the element's frame (layout "np": the translation is restored).
    displacement=True: it is a vector (layout "nv"), added to the node's position.
    In a batch with num_nodes, rows of invalid nodes are 0.
    """

    layout = "np"  # of the prediction, for `equivariance_error`

    def __init__(self, displacement: bool):
        super().__init__()
        self.displacement = check_bool("NodeReadout", "displacement", displacement)

    def forward(self, outputs: Tensor, batch: PointClouds, group: Group, g: Any) -> Tensor:
        y = group.act(g, outputs, "nv" if self.displacement else "np", mean=True)
        y = batch.positions + y if self.displacement else y
        if batch.num_nodes is None:
            return y
        valid = torch.arange(y.shape[1], device=y.device) < batch.num_nodes[:, None]
        return torch.where(valid[..., None], y, 0)


def _coordinates(owner: str, batch: PointClouds, group: Group, g: Any) -> Tensor:
    """g^-1 applied to positions and velocities: (B, S, n, 2 d)."""
    check_all_valid(owner, batch)
    positions = group.act(g, batch.positions, "np", inverse=True)
    return torch.cat([positions, group.act(g, batch.velocities, "nv", inverse=True)], dim=-1)

"""What groups and distributions read of a batch."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


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

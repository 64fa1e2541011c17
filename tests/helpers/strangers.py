"""Parts that other people write: a group and batches that this package does not know."""

from typing import NamedTuple

import torch
from torch import Tensor

from probsym_fast.groups import Group


class Shifts(Group):
    """Cyclic shifts of n nodes; elements (B, S) int64: how far."""

    moves = "n"

    def __init__(self, n: int):
        self.n = n

    def __repr__(self) -> str:
        return f"Shifts({self.n})"

    def identity(self, batch, samples):
        return torch.zeros(batch.size, samples, dtype=torch.int64)

    def uniform(self, batch, samples, draws=None):
        return torch.arange(samples).remainder(self.n).expand(batch.size, -1)  # every shift in turn

    def compose(self, g, h):
        return (g + h) % self.n

    def inverse(self, g):
        return -g % self.n

    def project(self, outputs, batch, **settings):
        raise NotImplementedError

    def act(self, g, x, layout, *, inverse=False, mean=False):
        x = x[:, None].expand(-1, g.shape[1], *x.shape[1:]) if x.ndim == len(layout) + 1 else x
        for axis, letter in enumerate(layout, start=2):
            if letter in (self.moves or "n"):
                place = (torch.arange(self.n) - (-g if inverse else g)[..., None]) % self.n
                shape = [*g.shape, *[1] * (x.ndim - 2)]
                shape[axis] = self.n
                x = x.take_along_dim(place.view(shape), axis)
        return x.mean(1) if mean else x


class Molecules(NamedTuple):
    """Clouds of positions, padded: num_nodes (B,) of them are atoms."""

    positions: Tensor
    num_nodes: Tensor | None = None

    def check(self) -> None: ...

    @property
    def velocities(self) -> Tensor:
        return torch.zeros_like(self.positions)

    @property
    def edges(self) -> Tensor:
        return self.positions.new_ones(*self.positions.shape[:2], self.positions.shape[1], 1)

    @property
    def valid(self) -> Tensor:
        nodes = torch.arange(self.positions.shape[1])
        return nodes < (len(nodes) if self.num_nodes is None else self.num_nodes[:, None])

    @property
    def center(self) -> Tensor:
        weights = self.valid.expand(self.positions.shape[:2])[..., None].to(self.dtype)
        return (self.positions * weights).sum(1) / weights.sum(1)

    @property
    def size(self) -> int:
        return self.positions.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.positions.dtype

    @property
    def device(self) -> torch.device:
        return self.positions.device

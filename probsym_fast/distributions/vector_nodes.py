"""The nodes of clouds of different sizes in Vector Neurons: which of them are valid, and sums and maxima over them.

Vector features are (channels, d, n, M), as in `vector_steps`. Steps on nodes take the last two axes in the form that
`Nodes.of` gives them; values of clouds are (..., 1, M).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from probsym_fast.distributions.vector_steps import LargestInvariant, some_clouds
from probsym_fast.ops.reference.vector_edge_convolution import dot, linear, valid


class Nodes:
    """All n nodes of every cloud."""

    num_nodes: Tensor | None = None  # (M,), for the edge convolutions
    inside: Tensor | None = None  # (n, M), where not all values of nodes count

    def of(self, x: Tensor) -> Tensor:
        """Values (..., n, M) in the form of the steps."""
        return x

    def spread(self, x: Tensor) -> Tensor:
        """Values of clouds as values of their nodes, or as what broadcasts to them; others as they are."""
        return x

    def padded(self, x: Tensor) -> Tensor:
        """(..., n, M), 0 at nodes that are not valid."""
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Over the nodes of each cloud: (w, d, 1, M)."""
        return x.mean(2, keepdim=True)

    def largest(self, x: Tensor, z: Tensor) -> Tensor:
        """max over the nodes of <x_c, z_v>: x (c, d, ...) or of clouds, z (v, d, ...) -> (c, v, M)."""
        return LargestInvariant.of(x, z)

    def farthest(self, x: Tensor, direction: Tensor) -> Tensor:
        """VN max pooling: the node where <x, direction x> is largest, x (w, d, n, M) -> (w, M)."""
        x = x.detach()
        parts = (x[..., m] for m in some_clouds(x.shape[-1], 3 * math.prod(x.shape[:-1]), x.device))
        return torch.cat([dot(some, linear(direction, some)).max(1).indices for some in parts], -1)


class ValidNodes(Nodes):
    """The first num_nodes (M,) of n nodes, marked: for any device, program and transform. Empty clouds give 0."""

    def __init__(self, num_nodes: Tensor, n: int):
        self.num_nodes, self.n, self._counts = num_nodes, n, num_nodes
        self.inside = self._valid = valid(num_nodes, n)

    def padded(self, x: Tensor) -> Tensor:
        return torch.where(self._valid, x, 0)

    def mean(self, x: Tensor) -> Tensor:
        return self._total(x) / self._counts.clamp(min=1).to(x.dtype)

    def largest(self, x: Tensor, z: Tensor) -> Tensor:
        heights = dot(self.spread(x).unsqueeze(2), z.transpose(0, 1).unsqueeze(0))
        return torch.where(self._counts > 0, self._lowest_outside(heights).max(2).values, 0)

    def farthest(self, x: Tensor, direction: Tensor) -> Tensor:
        x = self.of(x.detach())
        return self._lowest_outside(dot(x, linear(direction, x))).max(1).indices

    def _total(self, x: Tensor) -> Tensor:
        return self.padded(x).sum(2, keepdim=True)

    def _lowest_outside(self, x: Tensor) -> Tensor:
        """(..., n, M), below all numbers at nodes that are not valid."""
        return x.masked_fill(~self._valid, -math.inf)


class ListedNodes(ValidNodes):
    """The same in one list (..., nodes) of all valid nodes: no step computes on others. This reads num_nodes."""

    def __init__(self, num_nodes: Tensor, n: int):
        super().__init__(num_nodes, n)
        self.inside = None
        self.place = self._valid.flatten().nonzero().flatten()  # of a node in (n M)
        self.cloud = self.place % len(num_nodes)

    def of(self, x: Tensor) -> Tensor:
        return _Selected.apply(x.flatten(-2), self.place)

    def spread(self, x: Tensor) -> Tensor:
        return _Spread.apply(x, self) if x.ndim == 4 else x

    def padded(self, x: Tensor) -> Tensor:
        return self._with(x, 0.0)

    def _total(self, x: Tensor) -> Tensor:
        return _Total.apply(x, self)

    def _lowest_outside(self, x: Tensor) -> Tensor:
        return self._with(x, -math.inf)

    def _with(self, x: Tensor, fill: float) -> Tensor:
        size = self.n * len(self._counts)
        return _Placed.apply(x, self.place, size, fill).unflatten(-1, (self.n, -1))


class _Selected(Function):
    """x (..., size) at different places. torch's own gradient adds them one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.size = x.shape[-1]
        return x.index_select(-1, place)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Placed.apply(g, ctx.saved_tensors[0], ctx.size, 0.0), None


class _Placed(Function):
    """(..., size), x at these places and `fill` elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, size: int, fill: float) -> Tensor:
        ctx.save_for_backward(place)
        return x.new_full((*x.shape[:-1], size), fill).index_copy(-1, place, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Selected.apply(g, ctx.saved_tensors[0]), None, None, None


class _Total(Function):
    """x (w, d, nodes) -> the sum over each cloud, (w, d, 1, M)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, nodes: ListedNodes) -> Tensor:
        ctx.nodes = nodes
        return nodes.padded(x).sum(2, keepdim=True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Spread.apply(g, ctx.nodes), None


class _Spread(Function):
    """x (w, d, 1, M) -> each node's own, (w, d, nodes)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, nodes: ListedNodes) -> Tensor:
        ctx.nodes = nodes
        return x.squeeze(2).index_select(-1, nodes.cloud)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Total.apply(g, ctx.nodes), None

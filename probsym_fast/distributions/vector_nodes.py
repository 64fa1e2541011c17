"""The nodes of clouds of different sizes in Vector Neurons: which of them are valid, and sums and maxima over them.

Vector features are (channels, d, n, M), as in `vector_steps`. Steps on nodes take the last two axes in the form that
`Nodes.of` gives them; values of clouds are (..., 1, M).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from probsym_fast.distributions._fused import Fused, gradient, needs_definition, vmapped
from probsym_fast.distributions.vector_steps import LargestInvariant, some_clouds
from probsym_fast.ops.reference.vector_edge_convolution import dot, index_dtype, linear, valid


class Nodes:
    """All n nodes of every cloud."""

    num_nodes: Tensor | None = None  # (M,), for the edge convolutions
    inside: Tensor | None = None  # (n, M), where not all values of nodes count

    def of(self, x: Tensor) -> Tensor:
        """Values (..., n, M) in the form of the steps."""
        return x

    def spread(self, x: Tensor) -> Tensor:
        """Values of clouds as values of their nodes, or as what broadcasts to them."""
        return x

    def padded(self, x: Tensor) -> Tensor:
        """(..., n, M), 0 at nodes that are not valid."""
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Over the nodes of each cloud, (w, d, 1, M), spread."""
        return x.mean(2, keepdim=True)

    def largest(self, x: Tensor, z: Tensor) -> Tensor:
        """max over the nodes of <x_c, z_v>: x (c, d, ...), z (v, d, ...) -> (c, v, M)."""
        return LargestInvariant.of(x, z)

    def farthest(self, x: Tensor, direction: Tensor) -> Tensor:
        """VN max pooling: the node where <x, direction x> is largest, x (w, d, n, M) -> (w, M)."""
        x = x.detach()
        parts = (x[..., m] for m in some_clouds(x.shape[-1], 3 * math.prod(x.shape[:-1]), x.device))
        return torch.cat([dot(some, linear(direction, some)).max(1).indices for some in parts], -1)


class ValidNodes(Nodes):
    """The first num_nodes (M,) of n nodes, marked: for any device, program and transform. Empty clouds give 0."""

    def __init__(self, num_nodes: Tensor, n: int):
        self.num_nodes, self._counts = num_nodes, num_nodes
        self.inside = self.valid = valid(num_nodes, n)

    def padded(self, x: Tensor) -> Tensor:
        return torch.where(self.valid, x, 0)

    def mean(self, x: Tensor) -> Tensor:
        return self.spread(self._total(x) / self._counts.clamp(min=1).to(x.dtype))

    def largest(self, x: Tensor, z: Tensor) -> Tensor:
        heights = dot(x.unsqueeze(2), z.transpose(0, 1).unsqueeze(0))
        return torch.where(self._counts > 0, self._lowest_outside(heights).max(2).values, 0)

    def farthest(self, x: Tensor, direction: Tensor) -> Tensor:
        x = self.of(x.detach())
        return self._lowest_outside(dot(x, linear(direction, x))).max(1).indices

    def _total(self, x: Tensor) -> Tensor:
        return self.padded(x).sum(2, keepdim=True)

    def _lowest_outside(self, x: Tensor) -> Tensor:
        """(..., n, M), below all numbers at nodes that are not valid."""
        return x.masked_fill(~self.valid, -math.inf)


class ListedNodes(ValidNodes):
    """The same in one list (..., nodes): the first node of every cloud, the second of all that have one, and so on.

    num_nodes must not rise. So all copies are of whole rows, and no step computes on other nodes. This reads num_nodes.
    """

    def __init__(self, num_nodes: Tensor, n: int):
        super().__init__(num_nodes, n)
        self.inside = None
        self.shape = tuple(self.valid.shape)
        self.clouds = self.valid.sum(1).tolist()  # that have node i: a row of the list
        self.place = self.valid.flatten().nonzero().flatten()  # of the nodes of the list in (n M)

    def of(self, x: Tensor) -> Tensor:
        return _Listed.of(self, x)

    def spread(self, x: Tensor) -> Tensor:
        return _Spread.of(self, x)

    def padded(self, x: Tensor) -> Tensor:
        return _Padded.of(self, x)

    def largest(self, x: Tensor, z: Tensor) -> Tensor:
        return _LargestOfListed.of(self, x, z)

    def rows(self, x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(i, clouds, the part of a list for node i) of every node that there is."""
        for i, some in enumerate(x.split(self.clouds, -1)):
            if self.clouds[i]:
                yield i, self.clouds[i], some

    def _total(self, x: Tensor) -> Tensor:
        return _Total.of(self, x)

    def _lowest_outside(self, x: Tensor) -> Tensor:
        return _Padded.of(self, x, -math.inf)


class _Copies(Fused):
    """A linear map of values, by copies of rows; `transposed` is its gradient, to any order."""

    transposed: type[_Copies]

    @classmethod
    def backward(cls, ctx: Any, g: Tensor) -> Any:
        turn = cls.transposed.definition if vmapped(g) else cls.transposed.apply
        return None, turn(ctx.nodes, g), *(None,) * (len(ctx.needs_input_grad) - 2)


class _Listed(_Copies):
    """(..., n, M) -> (..., nodes)."""

    @staticmethod
    def definition(nodes: ListedNodes, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-2], -1).index_select(-1, nodes.place)

    @staticmethod
    def forward(ctx: Any, nodes: ListedNodes, x: Tensor) -> Tensor:
        ctx.nodes = nodes
        return torch.cat([x[..., i, :m] for i, m in enumerate(nodes.clouds)], -1)


class _Padded(_Copies):
    """(..., nodes) -> (..., n, M), and `fill` elsewhere."""

    @staticmethod
    def definition(nodes: ListedNodes, x: Tensor, fill: float = 0.0) -> Tensor:
        number = torch.zeros(math.prod(nodes.shape), dtype=torch.int64)
        number[nodes.place] = torch.arange(len(nodes.place))
        values = x.index_select(-1, number).view(*x.shape[:-1], *nodes.shape)
        return torch.where(nodes.valid, values, fill)

    @staticmethod
    def forward(ctx: Any, nodes: ListedNodes, x: Tensor, fill: float = 0.0) -> Tensor:
        ctx.nodes = nodes
        out = x.new_full((*x.shape[:-1], *nodes.shape), fill)
        for i, m, some in nodes.rows(x):
            out[..., i, :m] = some
        return out


class _Total(_Copies):
    """(..., nodes) -> the sum over each cloud, (..., 1, M)."""

    @staticmethod
    def definition(nodes: ListedNodes, x: Tensor) -> Tensor:
        return _Padded.definition(nodes, x).sum(-2, keepdim=True)

    @staticmethod
    def forward(ctx: Any, nodes: ListedNodes, x: Tensor) -> Tensor:
        ctx.nodes = nodes
        out = x.new_zeros(*x.shape[:-1], 1, nodes.shape[1])
        for _, m, some in nodes.rows(x):
            out[..., 0, :m] += some
        return out


class _Spread(_Copies):
    """(..., 1, M) -> each node's own, (..., nodes)."""

    @staticmethod
    def definition(nodes: ListedNodes, x: Tensor) -> Tensor:
        return x.select(-2, 0).index_select(-1, nodes.place % nodes.shape[1])

    @staticmethod
    def forward(ctx: Any, nodes: ListedNodes, x: Tensor) -> Tensor:
        ctx.nodes = nodes
        return torch.cat([x[..., 0, :m] for m in nodes.clouds], -1)


_Listed.transposed, _Padded.transposed, _Total.transposed, _Spread.transposed = _Padded, _Listed, _Spread, _Total


class _LargestOfListed(Fused):
    """`LargestInvariant` of lists: x (c, d, nodes), z (v, d, nodes) -> (c, v, M)."""

    @staticmethod
    def definition(nodes: ListedNodes, x: Tensor, z: Tensor) -> Tensor:
        return ValidNodes.largest(nodes, x, z)

    @staticmethod
    def forward(ctx: Any, nodes: ListedNodes, x: Tensor, z: Tensor) -> Tensor:
        values = x.new_full((x.shape[0], z.shape[0], nodes.shape[1]), -math.inf)
        node = torch.zeros_like(values, dtype=index_dtype(len(nodes.clouds)))
        for i, m, heights in nodes.rows(dot(x.unsqueeze(2), z.transpose(0, 1).unsqueeze(0))):
            best = values[..., :m]
            node[..., :m].masked_fill_(heights > best, i)
            torch.maximum(best, heights, out=best)
        values[..., nodes.clouds[0] :] = 0
        ctx.nodes = nodes
        ctx.save_for_backward(x, z, node)
        return values

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, z, node = ctx.saved_tensors
        if needs_definition(g):
            return None, *gradient(partial(_LargestOfListed.definition, ctx.nodes), [x, z], g)
        clouds = torch.tensor(ctx.nodes.clouds)
        m = ctx.nodes.clouds[0]  # clouds with nodes
        place = (clouds.cumsum(0) - clouds)[node[..., :m].int()] + torch.arange(m)
        at_node = g.new_zeros(*g.shape[:2], x.shape[-1]).scatter_(2, place, g[..., :m])
        d_x = dot(at_node.unsqueeze(2), z.unsqueeze(0))
        return None, d_x, dot(at_node.transpose(0, 1).unsqueeze(2), x.unsqueeze(0))

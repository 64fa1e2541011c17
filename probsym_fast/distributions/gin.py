"""GIN: the network of the learned distribution on graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast import ops
from probsym_fast._autocast import autocasts, promoted, without_autocast
from probsym_fast._checkpointing import checkpoint_layer
from probsym_fast._checks import check_counts, check_share, transformed
from probsym_fast.batches import check_batch
from probsym_fast.distributions._statistics import move_statistics
from probsym_fast.groups import Graphs


class GIN(nn.Module):
    """Scores of nodes by message passing with a virtual node; S samples share one adjacency.

    Layer: `h_u <- MLP((1 + eps) h_u + sum of h_v over neighbours + h_virtual)`. The virtual node is joined to itself and to
    every node: `h_virtual <- MLP((2 + eps) h_virtual + sum of all h_u)`. Both share one MLP of two linear maps, each with
    BatchNorm (over all nodes of all samples, no padding) and ReLU. The virtual node starts as a learned vector. A linear
    map of the last layer gives one score per node. In eval mode graphs and samples do not depend on each other. Edges are
    unweighted: edge_attr is not read.

    in_features: C of the nodes. width: hidden. layers: message passing steps >= 1. dropout: in training, of the input of
    each layer's second linear map; nothing is dropped between layers or before the scores.
    Source: the distribution of Kim et al. 2023 (arXiv 2306.02866); GIN is Xu et al. 2019 (arXiv 1810.00826).
    """

    outputs = ("scores",)
    layers: Any  # a ModuleList of Sequentials, which torch types as Modules

    def __init__(self, in_features: int, width: int = 64, layers: int = 3, dropout: float = 0.0):
        super().__init__()
        in_features, width, layers = check_counts("GIN", in_features=in_features, width=width, layers=layers)
        dropout = check_share("GIN", "dropout", dropout)
        self.in_features, self.width = in_features, width
        self.virtual = nn.Parameter(torch.randn(in_features))
        self.eps = nn.Parameter(torch.rand(layers))
        self.layers = nn.ModuleList(
            nn.Sequential(LinearBatchNormRelu(width if k else in_features, width), LinearBatchNormRelu(width, width))
            for k in range(layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(width, 1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, width={self.width}, layers={len(self.layers)}"

    def noise_shape(self, batch: Graphs, samples: int) -> tuple[int, ...]:
        """(nodes, S, C): added to the node features; the virtual node has no noise."""
        check_batch("GIN", batch, "x", "edge_index")
        return batch.x.shape[0], samples, self.in_features

    def forward(self, batch: Graphs, noise: Tensor) -> dict[str, Tensor]:
        """noise (nodes, S, C) -> "scores" (nodes, S), in the dtype of the weights or float32 if that is better.

        Also under autocast, and with weights below float32, which would give many nodes the same score. Raises TypeError
        where x or noise would lose precision in that dtype (allowed under autocast), ValueError for shapes, and as
        `Graphs.check`.
        """
        batch.check()
        nodes, C = batch.x.shape
        if self.in_features != C:
            raise ValueError(f"GIN: x must be (nodes, {self.in_features}), got {tuple(batch.x.shape)}")
        if noise.ndim != 3 or (nodes, C) != (noise.shape[0], noise.shape[2]):
            raise ValueError(f"GIN: noise must be (nodes, S, C) = ({nodes}, *, {C}), got {tuple(noise.shape)}")
        dtype = promoted(self.virtual.dtype, torch.float32)
        for name, value in (("x", batch.x), ("noise", noise)):
            fits = value.is_floating_point() and autocasts(value.device)
            if promoted(value.dtype, dtype) != dtype and not fits:
                raise TypeError(f"GIN: {name} must be {dtype} as the scores are, or below, got {value.dtype}")
        with without_autocast(noise.device):
            samples = noise.shape[1]
            virtual, own = self.virtual.to(dtype).expand(batch.size, samples, -1), (1 + self.eps.to(dtype)).unbind()
            h = torch.cat([batch.x.to(dtype)[:, None] + noise.to(dtype), virtual])  # (nodes + B, S, C)

            def first(h: Tensor, k: int) -> Tensor:
                h = ops.aggregate(h, batch.edge_index, own=own[k], ptr=batch.ptr)
                return self.dropout(self.layers[k][0](h.flatten(0, 1)))

            def step(h: Tensor, k: int) -> Tensor:
                h = self.layers[k][1](checkpoint_layer(partial(first, k=k), h, modules=self.layers[k][:1]))
                return h.unflatten(0, (nodes + batch.size, samples))

            def through(h: Tensor, count: int) -> Tensor:
                """The first `count` layers. With checkpointed layers it keeps nothing of those before the last."""
                if not count:
                    return h
                before = checkpoint_layer(partial(through, count=count - 1), h, modules=self.layers[: count - 1])
                return step(before, count - 1)

            h = through(h, len(self.layers))
            return {"scores": _wide_linear(self.score, h).squeeze(-1)[:nodes]}


class LinearBatchNormRelu(nn.Module):
    """A linear map, BatchNorm1d and ReLU of rows, (M, in_features) -> (M, width).

    One fused op in training; eval mode uses the running statistics. The linear map has no bias, which BatchNorm would
    cancel. Computes in the dtype of the rows.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, in_features: int, width: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.linear = nn.Linear(in_features, width, bias=False)
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if not self.training:
            mean, variance = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
            scale = weight * (variance + self.eps).rsqrt()
            y = torch.addcmul(bias - scale * mean, _wide_linear(self.linear, x), scale)
            return y.relu() if transformed() else y.relu_()  # torch.func.linearize changes nothing in place
        if x.shape[0] < 2:
            raise ValueError(f"LinearBatchNormRelu: x must have at least 2 rows in training, got {tuple(x.shape)}")
        y, mean, variance = ops.linear_batch_norm_relu(x, self.linear.weight.to(x.dtype), weight, bias, self.eps)
        seen = mean, variance * (x.shape[0] / (x.shape[0] - 1))
        move_statistics("LinearBatchNormRelu", (self.running_mean, self.running_var), seen, self.momentum)
        return y


def _wide_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x), with weights of another dtype converted to that of x."""
    if layer.weight.dtype == x.dtype:
        return layer(x)
    return nn.functional.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

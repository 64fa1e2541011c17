"""GIN, message passing on graphs, as a backbone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from probsym_fast import ops
from probsym_fast._checks import check_bool, check_counts
from probsym_fast.groups import Graphs
from probsym_fast.models.backbones.fused import HALF_WIDTH, OnePass, row
from probsym_fast.models.backbones.mlp import ACTIVATIONS
from probsym_fast.ops.gin import beyond_kernels
from probsym_fast.ops.reference.gin import check_values

WIDTH, GRAPH = 256, 512  # up to this width, and to so many nodes a graph, all layers run in one pass


class GINBackbone(OnePass):
    """GIN with one linear map per layer, then the sum over nodes and a linear map: (nodes, S, width) -> (B, S, out).

    Layer: `h_u <- W ((1 + eps) h_u + sum of h_v over neighbours) + b`, with learned eps initialised from U(0, 1). The
    first W is in the embedding, before the sum (both are linear); its bias and eps are here. Edges are unweighted:
    edge_attr is ignored. activation: "tanh", "relu" or "gelu", after every layer, and with `final` after the output
    too.

    Up to width 256 and 512 nodes a graph, all layers run as one op, `ops.gin`, where it has a kernel and nothing has to
    happen between them: no hook or replaced part (`why_modules` names what does). The numbers are those of the modules up
    to rounding. recompute: see `OnePass`.
    """

    op = "gin"

    def __init__(
        self,
        width: int,
        layers: int,
        out_features: int,
        activation: str,
        final: bool = False,
        recompute: bool = False,
    ):
        super().__init__("GINBackbone", recompute)
        width, layers, out_features = check_counts("GINBackbone", width=width, layers=layers, out_features=out_features)
        self.eps = nn.Parameter(torch.rand(layers))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-1, 1) / math.sqrt(width))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.out = nn.Linear(width, out_features)
        if activation not in ACTIVATIONS:
            raise ValueError(f"GINBackbone: activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
        final = check_bool("GINBackbone", "final", final)
        self.activation = ACTIVATIONS[activation]()
        self.final = ACTIVATIONS[activation]() if final else nn.Identity()
        self._activation, self._final = activation, final
        self.built()

    def forward(self, h: Tensor, batch: Graphs) -> Tensor:
        if self.why_modules(h, batch) is not None:
            return self._by_modules(h, batch)
        return self.as_autocast(lambda h: self._in_one_pass(h, batch), h)

    def too_large(self) -> str | None:
        return f"width {len(self.bias)}" if len(self.bias) > WIDTH else None

    def unfit(self, h: Tensor, batch: Graphs) -> str | None:
        if self.asked() or len(h) <= GRAPH * batch.size:  # a thread has a graph to itself
            return None
        return f"{len(h)} nodes in {batch.size} graphs, more than {GRAPH} each"

    def faster_than_half(self, bf16: bool) -> bool:
        return len(self.bias) <= HALF_WIDTH

    def beyond_kernels(self, device: str) -> str | None:
        return beyond_kernels(len(self.bias), len(self.eps), self.out.out_features)

    def _parts(self) -> list[nn.Module | Tensor]:
        return [self.eps, self.bias, *self.layers, self.out]

    def _in_one_pass(self, h: Tensor, batch: Graphs) -> Tensor:
        return ops.gin(
            h,
            batch.edge_index,
            batch.ptr,
            row(self._parts()),
            layers=len(self.eps),
            out_features=self.out.out_features,
            activation=self._activation,
            final=self._final,
            recompute=self.recompute,
        )

    def _by_modules(self, h: Tensor, batch: Graphs) -> Tensor:
        check_values(h, batch.edge_index, batch.ptr)  # as the op does
        for k, eps in enumerate(self.eps):
            h = ops.aggregate(h, batch.edge_index, own=1 + eps)
            h = self.activation(h + self.bias if k == 0 else self.layers[k - 1](h))
        return self.final(self.out(batch.pooled(h)))

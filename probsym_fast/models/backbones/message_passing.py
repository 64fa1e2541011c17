"""Message passing on complete graphs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast import ops
from probsym_fast._autocast import allows_bf16, autocasts
from probsym_fast._checks import check_count, check_counts
from probsym_fast.models.backbones.fused import HALF_WIDTH, OnePass, fewest_sequences, row
from probsym_fast.ops.message_passing import beyond_kernels

WIDTH = 256  # up to this width all layers run in one pass


class Layer(nn.Module):
    """m_ij = MLP([h_i, h_j, e_ij]), h_i' = MLP([h_i, sum_{j != i} m_ij]).

    The first linear map of the message is split into W h_i + V h_j + U e_ij: one product per node, not per pair.
    """

    def __init__(self, width: int, edge_features: int):
        super().__init__()
        self.pair = nn.Linear(2 * width + edge_features, width)
        self.message = nn.Linear(width, width)
        self.update = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.act = nn.SiLU()

    def parts(self) -> list[nn.Module]:
        """In the order of `ops.message_passing`."""
        return [self.pair, self.message, self.update[0], self.update[2]]

    def forward(self, h: Tensor, edges: Tensor, neighbor: Tensor) -> Tensor:
        """h (B, S, n, width), edges (B, 1 or S, n, n - 1, C), neighbor (n, n - 1) -> (B, S, n, width)."""
        width = h.shape[-1]
        to, of, pair = self.pair.weight.split([width, width, edges.shape[-1]], dim=1)
        sender = (h @ of.mT).index_select(2, neighbor.flatten())
        sender = sender.unflatten(2, neighbor.shape)  # (B, S, n, n - 1, width)
        z = sender + (h @ to.mT).unsqueeze(-2) + nn.functional.linear(edges, pair, self.pair.bias)
        m = self.act(self.message(self.act(z))).sum(-2)
        return self.update(torch.cat([h, m], dim=-1))


class MessagePassing(OnePass):
    """A GNN on the complete graph without loops: x (..., n, in), edges (..., n, n, C) -> (..., n, out).

    Linear embedding, `layers` layers without residuals, and a two-layer decoder; SiLU. edges may have size 1 on the last
    leading axis (shared by the samples). Equivariant under permutations of the nodes.

    Up to width 256, all layers run as one op, `ops.message_passing`, where it has a kernel and nothing has to
    happen between them: no hook or replaced part (`why_modules` names what does). The numbers are those of the
    modules up to rounding. recompute: see `OnePass`.

    Raises ValueError for shapes and for settings below 1 (edge_features and layers: below 0), TypeError for settings that
    are no ints.
    """

    op = "message_passing"

    def __init__(
        self,
        in_features: int = 6,
        edge_features: int = 2,
        width: int = 60,
        layers: int = 4,
        out_features: int = 3,
        recompute: bool = False,
    ):
        owner = "MessagePassing"
        super().__init__(owner, recompute)
        in_features, width, out_features = check_counts(
            owner, in_features=in_features, width=width, out_features=out_features
        )
        edge_features = check_count(owner, "edge_features", edge_features, least=0)
        layers = check_count(owner, "layers", layers, least=0)
        self.edge_features = edge_features
        self.embed = nn.Linear(in_features, width)
        self.layers = nn.ModuleList(Layer(width, edge_features) for _ in range(layers))
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out_features))
        self.built()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        features = self.embed.in_features
        if x.ndim < 2 or x.shape[-1] != features:
            raise ValueError(f"MessagePassing: x must be (..., n, {features}), got {tuple(x.shape)}")
        n = x.shape[-2]
        if edges.shape[-3:] != (n, n, self.edge_features):
            raise ValueError(
                f"MessagePassing: edges must be (..., {n}, {n}, {self.edge_features}), got {tuple(edges.shape)}"
            )
        lead = x.shape[:-2]
        x = x.reshape(math.prod(lead[:-1]), lead[-1] if lead else 1, n, features)
        pairs = edges.shape[:-3]
        edges = edges.reshape(math.prod(pairs[:-1]), pairs[-1] if pairs else 1, n, n, self.edge_features)
        for axis, name in ((0, "graphs"), (1, "samples")):
            if edges.shape[axis] != x.shape[axis] and edges.shape[axis] != 1:  # in this order: no guard in a program
                raise ValueError(
                    f"MessagePassing: edges must be of 1 or x's {x.shape[axis]} {name}, got {edges.shape[axis]}"
                )
        if self.why_modules(x, edges) is None:
            y = self.as_autocast(self._in_one_pass, x, edges)
        else:
            y = self._by_modules(x, edges)
        return y.reshape(*lead, *y.shape[2:])

    def too_large(self) -> str | None:
        width, layers = self.embed.out_features, len(self.layers)
        return f"width {width}, {layers} layers" if width > WIDTH or not layers else None

    def unfit(self, x: Tensor, edges: Tensor) -> str | None:
        if edges.dtype != x.dtype and not autocasts(x.device):
            return f"x is {x.dtype}, edges are {edges.dtype}".replace("torch.", "")
        return self.too_few(x.shape[:-2], "graphs")

    def fewest(self) -> int:
        return fewest_sequences(self.embed.out_features)

    def faster_than_half(self, bf16: bool) -> bool:
        return self.embed.out_features <= HALF_WIDTH

    def beyond_kernels(self, device: str) -> str | None:
        last: Any = self.decoder[2]
        sizes = self.embed.in_features, self.edge_features, self.embed.out_features, len(self.layers)
        return beyond_kernels(device, *sizes, last.out_features)

    def _parts(self) -> list[nn.Module]:
        layers: Any = self.layers
        parts = [part for layer in layers for part in layer.parts()]
        return [self.embed, *parts, self.decoder[0], self.decoder[2]]

    def _in_one_pass(self, x: Tensor, edges: Tensor) -> Tensor:
        """x (B, S, n, in), edges (B or 1, 1 or S, n, n, C)."""
        if edges.shape[1] != 1:
            edges = edges.expand(x.shape[0], *edges.shape[1:])
        last: Any = self.decoder[2]
        y = ops.message_passing(
            x.flatten(0, 1),
            edges.flatten(0, 1),
            row(self._parts()),
            width=self.embed.out_features,
            layers=len(self.layers),
            out_features=last.out_features,
            recompute=self.recompute,
            allow_bf16=allows_bf16(x.device),
        )
        return y.unflatten(0, x.shape[:2])

    def _by_modules(self, x: Tensor, edges: Tensor) -> Tensor:
        n = x.shape[2]
        node = torch.arange(n, device=x.device)[:, None]
        other = torch.arange(n - 1, device=x.device)
        neighbor = other + (other >= node)  # (n, n - 1): all other nodes
        edges = edges[:, :, node, neighbor]
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, edges, neighbor)
        return self.decoder(h)

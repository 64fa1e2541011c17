"""message_passing in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from probsym_fast.ops.reference._parts import Parts


def message_passing(
    x: Tensor,
    edges: Tensor,
    weights: Tensor,
    width: int,
    layers: int,
    out_features: int,
    keep: bool,
    allow_bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """x (M, n, E), edges (B, n, n, C) -> y (M, n, out); nothing is kept."""
    M, n, features = x.shape
    part = Parts(weights)
    loops = x.new_ones(n, n).triu().tril().bool()[..., None]  # (n, n, 1)
    B, C = edges.shape[0], edges.shape[-1]
    lead = B, M // B if B else 1, n, n  # graphs with edges of their own, samples, receivers, senders
    edges = edges.masked_fill(loops, 0).unsqueeze(1).expand(*lead, C)
    h = part.linear(features, width)(x).unflatten(0, lead[:2])
    for _ in range(layers):
        first, message = part.linear(2 * width + C, width), part.linear(width, width)
        begin, end = part.linear(2 * width, width), part.linear(width, width)
        receiver, sender = (h.unsqueeze(axis).expand(*lead, width) for axis in (3, 2))
        z = first(torch.cat([receiver, sender, edges], -1))
        m = F.silu(message(F.silu(z))).masked_fill(loops, 0).sum(3)
        h = end(F.silu(begin(torch.cat([h, m], -1))))
    hidden, out = part.linear(width, width), part.linear(width, out_features)
    return out(F.silu(hidden(h))).flatten(0, 1), x.new_empty(0, (layers + 1) * n * width)

"""transformer in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from probsym_fast._checks import looks_at_values
from probsym_fast.ops.reference._parts import Parts


def transformer(
    x: Tensor,
    weights: Tensor,
    lengths: Tensor | None,
    sizes: Sequence[int],
    read: Sequence[int],
    gelu: bool,
    eps: float,
    keep: bool,
    allow_bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """x (M, L, E) -> y (M, R, out); nothing is kept. sizes: in_features, width, layers, heads, feedforward, out_features."""
    check_values(x, weights, lengths)
    in_features, width, layers, heads, feedforward, out_features = sizes
    L = x.shape[1]
    part = Parts(weights)
    inside = None if lengths is None else torch.arange(L, device=x.device) < lengths[:, None]  # (M, L)
    if lengths is not None:  # after the end of a sequence its last token again, whose norm is finite
        last = torch.minimum(torch.arange(L, device=x.device), lengths[:, None] - 1)
        x = x.gather(1, last[..., None].expand(x.shape))
    mask = None if inside is None else torch.zeros_like(x[:, :, 0]).masked_fill(~inside, -torch.inf)[:, None, None]

    def linear(h: Tensor, out: int) -> Tensor:
        return part.linear(h.shape[-1], out)(h)

    def norm(h: Tensor) -> Tensor:
        return F.layer_norm(h, (width,), part(width), part(width), eps)

    h = linear(x, width) + part(L, width) if in_features else x
    for _ in range(layers):
        q, k, v = linear(norm(h), 3 * width).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        attended = (scores if mask is None else scores + mask).softmax(-1) @ v  # (M, heads, L, width / heads)
        h = h + linear(attended.transpose(1, 2).flatten(2), width)
        up = linear(norm(h), feedforward)
        h = h + linear(F.gelu(up) if gelu else up.relu(), width)
    h = torch.stack([h[:, token] for token in read], 1) if read else h
    if out_features:
        h = linear(linear(norm(h).relu(), width).relu(), out_features)
    if inside is not None:
        h = h.masked_fill(~inside[..., None], 0)
    return h, x.new_empty(0, (layers * L + h.shape[1]) * width)


def check_values(x: Tensor, weights: Tensor, lengths: Tensor | None, *_) -> None:
    """ValueError unless each length is 1 to L, where checks may read values."""
    if lengths is None or not looks_at_values(lengths):
        return
    bad = lengths[(lengths < 1) | (lengths > x.shape[1])]
    if len(bad):
        raise ValueError(f"transformer: each of lengths must be in 1..{x.shape[1]}, got {int(bad[0])}")

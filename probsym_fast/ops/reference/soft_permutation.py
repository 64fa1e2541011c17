"""soft_permutation, dense: the definition. O(iterations B S N^2) memory under autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._checks import looks_at_values
from probsym_fast.ops.permutation import inverse, sorted_distance, sorted_soft, valid_slots


def check_values(scores: Tensor, num_nodes: Tensor | None, *_) -> None:
    if not looks_at_values(scores, num_nodes):
        return
    finite = scores.isfinite()
    if not (finite if num_nodes is None else finite | ~valid_slots(num_nodes, scores.shape[-1])).all():
        raise ValueError("soft_permutation: scores must be finite, got NaN or infinity among the valid nodes")


def soft_permutation(
    scores: Tensor, num_nodes: Tensor | None, tau: float, iterations: int, normalize: bool, presorted: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scores (B, S, N) -> t, log_r, log_c, order, rank (B, S, N); see `probsym_fast.ops.soft_permutation`.

    presorted: valid scores descend already, so that order is the identity.
    """
    check_values(scores, num_nodes)
    valid = None if num_nodes is None else valid_slots(num_nodes, scores.shape[-1])
    s = scores if valid is None else scores.masked_fill(~valid, 0)
    if normalize:
        top = s.detach().abs().amax(-1, keepdim=True)
        scale = torch.where(top > 1e-6, top, 1)  # squares of scaled scores do not overflow
        s = s / (torch.linalg.vector_norm(s / scale, dim=-1, keepdim=True) * scale).clamp(min=1e-6)
    if presorted:
        order = torch.arange(s.shape[-1], device=s.device).expand(s.shape)
    else:
        key = s.detach() if valid is None else s.detach().masked_fill(~valid, -torch.inf)
        order = key.argsort(dim=-1, descending=True, stable=True)
    rank = inverse(order)
    t = s.gather(-1, order)

    p = (
        (-sorted_distance(t) / tau).exp()
        if num_nodes is None
        else sorted_soft(t, torch.zeros_like(t), torch.zeros_like(t), num_nodes, tau)
    )
    log_r = log_c = torch.zeros_like(t)
    for _ in range(iterations):
        total = p.sum(dim=-1, keepdim=True)
        p, log_r = p / total, log_r - total.squeeze(-1).log()
        total = p.sum(dim=-2, keepdim=True)
        p, log_c = p / total, log_c - total.squeeze(-2).log()
    return t, log_r, log_c, order, rank

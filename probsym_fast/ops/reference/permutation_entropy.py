"""permutation_entropy, dense: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast.ops.permutation import sorted_distance, valid_slots


def permutation_entropy(t: Tensor, log_r: Tensor, log_c: Tensor, num_nodes: Tensor | None, tau: float) -> Tensor:
    """t, log_r, log_c (B, S, N) -> scalar; see `probsym_fast.ops.permutation_entropy`."""
    N = t.shape[-1]
    log_p = log_r[..., None] + log_c[..., None, :] - sorted_distance(t) / tau
    if num_nodes is not None:
        valid = valid_slots(num_nodes, N)
        # padding: the only entry of its row and column, with entropy 0
        alone = torch.where(torch.eye(N, dtype=torch.bool, device=t.device), 0.0, -torch.inf).to(t.dtype)
        log_p = torch.where(valid[..., None] & valid[..., None, :], log_p, alone)
    entropy = t.new_zeros(t.shape)
    for dim in (-1, -2):
        p = log_p.softmax(dim)
        entropy = entropy + torch.special.entr(p.clamp(min=torch.finfo(t.dtype).tiny)).sum(dim)
    count = N if num_nodes is None else num_nodes.to(t.dtype)
    return (entropy.sum(-1).mean(-1) / count).mean()

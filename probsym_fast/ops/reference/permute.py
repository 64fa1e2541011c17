"""permute, dense: the permutation matrix, or its transpose, times the rows."""

from __future__ import annotations

from torch import Tensor

from probsym_fast.ops.permutation import SoftPermutation


def permute(x, rank, order, num_nodes, t, log_r, log_c, tau, inverse) -> Tensor:
    """x (B, 1 or S, N, D) -> (B, S, N, D)."""
    index = (order if inverse else rank)[..., None]
    rows = x.expand(-1, rank.shape[1], -1, -1)
    y = rows.gather(2, index.expand(rows.shape))
    if t is None:
        return y
    soft = SoftPermutation(order, num_nodes, rank, t, log_r, log_c, tau, checked=True).soft().to(x.dtype)
    straight = soft - soft.detach()  # 0, with the soft permutation's gradient
    return y + (straight.mT if inverse else straight) @ rows

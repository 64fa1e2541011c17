"""permute: torch gathers the rows; the gradient to the soft permutation is four scans per number of a row (`long_rows`).

dL/dP[i, j] = <a_i, b_j> in sorted rows. With w = r a and v = c b, numbers of each row side by side:
    d log_r = <w, K v>,  d log_c = <v, K w>,  d t = -(<w, (sgn o K) v> + <v, (sgn o K) w>) / tau.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast.ops.triton import Refused, long_rows
from probsym_fast.ops.triton._launch import check_axes, check_counts, check_tensors


def _checked(x, rank, order, num_nodes, t, log_r, log_c) -> None:
    (B, of_x, N, D), (_, S, _) = check_axes("x", x, 4), check_axes("rank", rank, 3)
    if of_x not in (1, S):
        raise Refused(ValueError, f"x must have 1 or S = {S} samples, got {of_x}")
    check_counts(numbers_of_all_rows=B * S * D)
    row = B, S, N
    given = {"rank": rank, "order": order, "t": t, "log_r": log_r, "log_c": log_c}
    check_tensors(x.device, num_nodes=(num_nodes, (B,)), **{name: (y, row) for name, y in given.items()})


def _moved(x: Tensor, index: Tensor) -> Tensor:
    """x[b, s, index[b, s, j]]: (B, S, N, D) from (B, 1 or S, N, D)."""
    x = x.expand(-1, index.shape[1], -1, -1)
    return x.gather(2, index[..., None].expand(x.shape))


def forward(x, rank, order, num_nodes, t, log_r, log_c, tau: float, inverse: bool) -> Tensor:
    _checked(x, rank, order, num_nodes, t, log_r, log_c)
    return _moved(x, order if inverse else rank)


def backward(
    d_y, x, rank, order, num_nodes, t, log_r, log_c, tau: float, inverse: bool, needs_x: bool, needs_t: bool
) -> tuple[Tensor | None, ...]:
    _checked(x, rank, order, num_nodes, t, log_r, log_c)
    B, S, N = rank.shape
    check_tensors(x.device, d_y=(d_y, (B, S, N, x.shape[-1])))
    d_x: Tensor | None = None
    soft: tuple[Tensor | None, ...] = (None, None, None)
    if needs_x:
        d_x = _moved(d_y, rank if inverse else order)
        d_x = d_x.sum(1, keepdim=True) if x.shape[1] == 1 != S else d_x
    if needs_t:
        if t is None or log_r is None or log_c is None:
            raise Refused(ValueError, "t, log_r and log_c must be given for their gradients, got None")
        soft = _soft_gradient(*((x, d_y) if inverse else (d_y, x)), order, num_nodes, t, log_r, log_c, tau)
    return d_x, *soft


def _soft_gradient(a, b, order, num_nodes, t, log_r, log_c, tau) -> tuple[Tensor, Tensor, Tensor]:
    B, S, N = t.shape
    D = a.shape[-1]
    if num_nodes is not None:
        beyond = torch.arange(N, device=t.device) >= num_nodes[:, None, None]
        log_r, log_c = (x.masked_fill(beyond, -torch.inf) for x in (log_r, log_c))  # r, c = 0 there
        num_nodes = num_nodes.contiguous()

    def rows(x: Tensor) -> Tensor:
        """(B, S, D, N) -> (B, S D, N), contiguous as the scans read it."""
        return x.reshape(B, S * D, N).contiguous()

    w = rows((_moved(a, order) * log_r.exp()[..., None]).mT)
    v = rows((b.expand(-1, S, -1, -1) * log_c.exp()[..., None]).mT)
    each = rows(t[:, :, None].expand(B, S, D, N))  # a row of t for every number of a row

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).view(B, S, D, N).sum(2)

    K_v, signed_v = long_rows.products(each, num_nodes, tau, v)
    K_w, signed_w = long_rows.products(each, num_nodes, tau, w)
    d_t = -(inner(w, signed_v) + inner(v, signed_w)) / tau
    return d_t, inner(w, K_v), inner(v, K_w)

"""permute: torch gathers the rows; the gradient to the soft permutation is two launches for numbers of a row side by side.

dL/dP[i, j] = <a_i, b_j> in sorted rows. With w = r a and v = c b, and K the Laplacian kernel (`laplace`):
    d log_r = <w, K v>,  d log_c = <v, K w>,  d t = -(<w, (sgn o K) v> + <v, (sgn o K) w>) / tau.
K y = f + b - y and (sgn o K) y = b - f, where f scans y upwards and b downwards.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import cdiv, check_axes, check_counts, check_tensors, kernel
from probsym_fast.ops.triton.laplace import valid_slots
from probsym_fast.ops.triton.long_rows import BLOCK, gaps_of

COMBINED = 256  # slots a program


@triton.jit
def join_two(a1, v1, w1, a2, v2, w2):
    return a1 * a2, v2 + a2 * v1, w2 + a2 * w1


@triton.jit
def side(p_x, p_log, b_at, i_row, k, o, m, S, N, D, of_x):
    """Number k of rows b_at of x, (B, of_x, N, D) with of_x 1 or S, times exp(log) of slots o."""
    i_x = i_row // S * of_x + i_row % S % of_x
    m_x = m & (b_at >= 0) & (b_at < N)
    b_x = tl.load(p_x + (i_x * N + b_at) * D + k, mask=m_x, other=0)
    return b_x * tl.exp(tl.load(p_log + i_row * N + o, mask=m, other=float("-inf")))


@triton.jit
def sides(p_a, p_b, p_order, p_log_r, p_log_c, i_row, k, o, m, S, N, D, of_a, of_b):
    """Number k of w and v at slots o."""
    b_order = tl.load(p_order + i_row * N + o, mask=m, other=0)
    b_w = side(p_a, p_log_r, b_order, i_row, k, o, m, S, N, D, of_a)
    return b_w, side(p_b, p_log_c, o, i_row, k, o, m, S, N, D, of_b)


@kernel({"num_warps": 8, "maxnreg": 255})
def _scans(
    p_a, p_b, p_order, p_t, p_log_r, p_log_c, p_nodes, p_out, rows, S, N, D, of_a, of_b, by_tau: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out (2, 2, B S D, N): of one number of a row, scans of v and of w; f, or b in the second half."""
    T: tl.constexpr = p_t.dtype.element_ty
    i_number, back = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_row, k = i_number // D, i_number % D
    b_n = valid_slots(p_nodes, i_row, rows, S, N)
    b_by_tau = tl.full((1,), by_tau, T)
    p_row = p_t + i_row * N
    p_f = p_out + (back * 2 * rows * D + i_number) * N
    b_v_in, b_w_in = tl.zeros((1,), T), tl.zeros((1,), T)
    for first in range(0, N, BLOCK):
        o = first + tl.arange(0, BLOCK)
        o_at, m_joined, b_gap = gaps_of(p_row, o, b_n, b_by_tau, back)
        b_a = tl.where(m_joined, tl.exp(-b_gap), 0.0)
        b_w, b_v = sides(p_a, p_b, p_order, p_log_r, p_log_c, i_row, k, o_at, o < b_n, S, N, D, of_a, of_b)
        b_across, b_v, b_w = tl.associative_scan((b_a, b_v, b_w), 0, join_two)
        b_v += b_across * b_v_in
        b_w += b_across * b_w_in
        tl.store(p_f + o_at, b_v, mask=o < N)
        tl.store(p_f + rows * D * N + o_at, b_w, mask=o < N)
        m_last = o == first + BLOCK - 1
        b_v_in = tl.sum(tl.where(m_last, b_v, 0.0), 0, keep_dims=True)
        b_w_in = tl.sum(tl.where(m_last, b_w, 0.0), 0, keep_dims=True)


@kernel({"num_warps": 4})
def _combined(
    p_a, p_b, p_order, p_log_r, p_log_c, p_nodes, p_scans, p_d_t, p_d_r, p_d_c, rows, S, N, D, of_a, of_b,
    by_tau: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """d of t, log_r and log_c of some slots of a row, summed over the numbers."""
    T: tl.constexpr = p_d_t.dtype.element_ty
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < valid_slots(p_nodes, i_row, rows, S, N)
    step = rows.to(tl.int64) * D * N  # from scans of v to those of w, and from there to the second half
    b_r, b_c, b_t = tl.zeros((BLOCK,), T), tl.zeros((BLOCK,), T), tl.zeros((BLOCK,), T)
    for k in range(D):
        b_w, b_v = sides(p_a, p_b, p_order, p_log_r, p_log_c, i_row, k, o, m, S, N, D, of_a, of_b)
        p_f = p_scans + (i_row * D + k) * N + o
        b_f_v, b_f_w = tl.load(p_f, mask=m, other=0), tl.load(p_f + step, mask=m, other=0)
        b_b_v, b_b_w = tl.load(p_f + 2 * step, mask=m, other=0), tl.load(p_f + 3 * step, mask=m, other=0)
        b_r += b_w * (b_f_v + b_b_v - b_v)
        b_c += b_v * (b_f_w + b_b_w - b_w)
        b_t += b_w * (b_b_v - b_f_v) + b_v * (b_b_w - b_f_w)
    tl.store(p_d_t + i_row * N + o, -b_t * tl.full((1,), by_tau, T), mask=o < N)
    tl.store(p_d_r + i_row * N + o, b_r, mask=o < N)
    tl.store(p_d_c + i_row * N + o, b_c, mask=o < N)


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
    (B, S, N), D = t.shape, a.shape[-1]
    a, b, order, t, log_r, log_c = (x.contiguous() for x in (a, b, order, t, log_r, log_c))
    nodes = None if num_nodes is None else num_nodes.contiguous()
    scans = t.new_empty(2, 2, B * S * D, N)
    d_t, d_r, d_c = (t.new_empty(B, S, N) for _ in range(3))
    sizes = B * S, S, N, D, a.shape[1], b.shape[1], 1.0 / tau
    read = a, b, order
    _scans(lambda settings: (B * S * D, 2), *read, t, log_r, log_c, nodes, scans, *sizes, BLOCK=BLOCK)
    made = d_t, d_r, d_c
    _combined(
        lambda settings: (B * S, cdiv(N, COMBINED)), *read, log_r, log_c, nodes, scans, *made, *sizes, BLOCK=COMBINED
    )
    return made

"""Products with the Laplacian kernel (laplace.py) of rows of any length, in memory: one launch each.

A program scans one row in one direction, block after block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import kernel
from probsym_fast.ops.triton.laplace import valid_slots

BLOCK = 1024


@triton.jit
def join(a1, p1, a2, p2):
    return a1 * a2, p2 + a2 * p1


@triton.jit
def join_far(a1, d1, p1, g1, a2, d2, p2, g2):
    return a1 * a2, d1 + d2, p2 + a2 * p1, g2 + a2 * (g1 - d2 * p1)


@triton.jit
def gaps_of(p_row, o, b_n, b_by_tau, back):
    """Slots at places o of a scan, from the last one where it goes back; which have one before; scaled distances to it."""
    o_at = tl.where((back > 0) & (o < b_n), b_n - 1 - o, o)
    m_joined = (o > 0) & (o < b_n)
    b_here = tl.load(p_row + o_at, mask=m_joined, other=0)
    b_before = tl.load(p_row + tl.where(back > 0, o_at + 1, o_at - 1), mask=m_joined, other=0)
    return o_at, m_joined, tl.where(m_joined, tl.abs(b_before - b_here) * b_by_tau, 0.0)


@kernel({"num_warps": 8, "maxnreg": 255})
def _scan(p_t, p_nodes, p_p, p_q, p_out, rows, S, N, by_tau: tl.float64, BLOCK: tl.constexpr):
    """out[row] of the vector p, and out[rows + row] of K q - (D o K) p with q: scans f, then the scans b."""
    T: tl.constexpr = p_t.dtype.element_ty
    i_row, back = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_n = valid_slots(p_nodes, i_row, rows, S, N)
    b_by_tau = tl.full((1,), by_tau, T)
    p_row = p_t + i_row * N
    count = 1 if p_q is None else 2
    p_f = p_out + (back * count * rows + i_row) * N
    b_p, b_g = tl.zeros((1,), T), tl.zeros((1,), T)
    for first in range(0, N, BLOCK):
        o = first + tl.arange(0, BLOCK)
        o_at, m_joined, b_gap = gaps_of(p_row, o, b_n, b_by_tau, back)
        b_a = tl.where(m_joined, tl.exp(-b_gap), 0.0)
        b_in = tl.load(p_p + i_row * N + o_at, mask=o < N, other=0)
        m_last = o == first + BLOCK - 1
        if p_q is None:
            b_across, b_f = tl.associative_scan((b_a, b_in), 0, join)
        else:
            b_q = tl.load(p_q + i_row * N + o_at, mask=o < N, other=0)
            b_d = tl.where(b_a > 0, b_gap, 0.0)
            b_across, b_away, b_f, b_h = tl.associative_scan((b_a, b_d, b_in, b_q), 0, join_far)
            b_h += b_across * (b_g - b_away * b_p)
            tl.store(p_f + rows * N + o_at, b_h, mask=o < N)
            b_g = tl.sum(tl.where(m_last, b_h, 0.0), 0, keep_dims=True)
        b_f += b_across * b_p
        tl.store(p_f + o_at, b_f, mask=o < N)
        b_p = tl.sum(tl.where(m_last, b_f, 0.0), 0, keep_dims=True)


def products(t: Tensor, num_nodes: Tensor | None, tau: float, p: Tensor, q: Tensor | None = None) -> tuple[Tensor, ...]:
    """K p and (sgn o K) p of rows (B, S, N); with q also K q - (D o K) p, D the scaled distances, and its signed twin."""
    B, S, N = t.shape
    vectors = (p,) if q is None else (p, q)
    scans = t.new_empty(2, len(vectors), B, S, N)
    _scan(lambda settings: (B * S, 2), t, num_nodes, p, q, scans, B * S, S, N, 1.0 / tau, BLOCK=BLOCK)
    f, b = scans
    return tuple(x for f, b, v in zip(f, b, vectors, strict=True) for x in (f + b - v, b - f))

"""Products with the Laplacian kernel K[i, j] = exp(-|t_i - t_j| / tau) of sorted rows, by two scans (csrc/cuda/laplace.h):

    f_i = v_i + a_i f_{i-1},  b_i = v_i + a_{i+1} b_{i+1},  K v = f + b - v,  (sgn o K) v = b - f,

a_i = exp(-(t_{i-1} - t_i) / tau), 0 at the ends. A slot with a_i = a_{i+1} = 0 is isolated, as in the padding.

A program holds ROWS rows (B, S, N) of up to LANES * K slots. Lane l has the neighbouring slots l K to (l + 1) K - 1: a
vector v is a tuple of K blocks (ROWS, LANES). A lane scans its own slots; what enters them from the other lanes is a scan
over the lanes. Longer rows: long_rows.py.
"""
# mypy: disable-error-code="assignment"
# (a tuple that begins empty grows, slot by slot)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import check_axes, check_counts

TEAMS = ((8, 2), (8, 4), (16, 4), (32, 4), (32, 6), (64, 4), (64, 6), (128, 4), (256, 4))  # lanes, slots of each
MOST = 1024  # slots of a row in registers


def team(N: int) -> dict:
    """The program for rows of N <= MOST. With more slots a lane, float64 spills."""
    lanes, k = next(x for x in TEAMS if N <= x[0] * x[1])
    return {"ROWS": max(1, 32 // lanes), "LANES": lanes, "K": k, "num_warps": max(1, lanes // 32)}


def check_slots(name: str, x: Tensor) -> tuple[int, int, int]:
    """The shape (B, S, N) of x; refused if it has another, or too many rows."""
    B, S, N = check_axes(name, x, 3)
    if N < 1:
        raise Refused(ValueError, f"{name} must be (B, S, N) with N >= 1, got {tuple(x.shape)}")
    check_counts(rows=B * S, slots=N)
    return B, S, N


@triton.jit
def valid_slots(p_nodes, o_row, rows, S, N):
    """The number of valid slots of rows, 0 beyond them. Counts out of range are clamped, for memory safety."""
    m_row = o_row < rows
    if p_nodes is None:
        b_n = tl.where(m_row, N, 0)
    else:
        b_n = tl.load(p_nodes + o_row // S, mask=m_row, other=0)
        b_n = tl.minimum(tl.maximum(b_n, 0), N).to(tl.int32)
    return b_n


@triton.jit
def places(i_group, rows, N, ROWS: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr):
    """The rows of a group and where they begin (ROWS, 1); each lane's first slot (1, LANES)."""
    o_row = (i_group * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    return o_row, o_row * N, K * tl.arange(0, LANES)[None, :]


@triton.jit
def full(value: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr):
    v = ()
    for _ in tl.static_range(K):
        v = v + (tl.full((ROWS, LANES), value, T),)
    return v


@triton.jit
def load_slots(p_x, o_at, o_slot, b_n, T: tl.constexpr, K: tl.constexpr):
    """Slots of rows; 0 in the padding, and of None."""
    v = ()
    for i in tl.static_range(K):
        m_i = o_slot + i < b_n
        if p_x is None:
            v = v + (tl.where(m_i, 0.0, 0.0).to(T),)
        else:
            v = v + (tl.load(p_x + o_at + o_slot + i, mask=m_i, other=0).to(T),)
    return v


@triton.jit
def store_slots(p_x, o_row, o_at, o_slot, b_n, rows, N, v, K: tl.constexpr):
    """v in the valid slots, 0 in the padding."""
    for i in tl.static_range(K):
        m_i = (o_row < rows) & (o_slot + i < N)
        tl.store(p_x + o_at + o_slot + i, tl.where(o_slot + i < b_n, v[i], 0.0), mask=m_i)


@triton.jit
def decays(p_t, o_at, o_slot, b_n, by_tau, K: tl.constexpr):
    """a and scaled gaps d to the slot before, 0 where a is, of K + 1 slots: the last is the next lane's first."""
    T: tl.constexpr = p_t.dtype.element_ty
    p_row = p_t + o_at + o_slot
    b_by_tau = tl.full((1, 1), by_tau, T)
    b_before = tl.load(p_row - 1, mask=(o_slot > 0) & (o_slot < b_n), other=0)
    a = ()
    d = ()
    for i in tl.static_range(K + 1):
        b_here = tl.load(p_row + i, mask=o_slot + i < b_n, other=0)
        m_joined = (o_slot + i > 0) & (o_slot + i < b_n)
        b_gap = tl.where(m_joined, (b_before - b_here) * b_by_tau, 0.0)
        b_a = tl.where(m_joined, tl.exp(-b_gap), 0.0)
        a = a + (b_a,)
        d = d + (tl.where(b_a > 0, b_gap, 0.0),)
        b_before = b_here
    return a, d


@triton.jit
def across(a, d, K: tl.constexpr):
    """Decays and distances across each lane, from the neighbour's nearest slot to its own farthest: left, then right."""
    b_left, b_right, b_from_left, b_from_right = a[0], a[K], d[0], d[K]
    for i in tl.static_range(1, K):
        b_left *= a[i]
        b_right *= a[i]
        b_from_left += d[i]
        b_from_right += d[i]
    return b_left, b_right, b_from_left, b_from_right


@triton.jit
def join(a1, f1, e1, x1, a2, f2, e2, x2):
    """Of neighbouring runs of lanes: decay and scan to the last slot, and those to the last slot before the last lane."""
    return a1 * a2, f2 + a2 * f1, a1 * e2, x2 + e2 * f1


@triton.jit
def join_far(a1, d1, p1, g1, e1, w1, x1, y1, a2, d2, p2, g2, e2, w2, x2, y2):
    """`join` of p, and of g, which loses the distance times p."""
    return (
        a1 * a2, d1 + d2, p2 + a2 * p1, g2 + a2 * (g1 - d2 * p1),
        a1 * e2, d1 + w2, x2 + e2 * p1, y2 + e2 * (g1 - w2 * p1),
    )  # fmt: skip


@triton.jit
def product(a, links, v, K: tl.constexpr):
    """K v and (sgn o K) v. links: of `across`."""
    b_left, b_right = links[0], links[1]
    b_zero = tl.zeros_like(b_left)
    b_one = b_zero + 1.0
    b_f, b_b = b_zero, b_zero
    for i in tl.static_range(K):
        b_f = v[i] + a[i] * b_f
        b_b = v[K - 1 - i] + a[K - i] * b_b
    _, _, _, b_f = tl.associative_scan((b_left, b_f, b_one, b_zero), 1, join)
    _, _, _, b_b = tl.associative_scan((b_right, b_b, b_one, b_zero), 1, join, reverse=True)
    b = ()
    for i in tl.static_range(K):
        b_b = v[K - 1 - i] + a[K - i] * b_b
        b = (b_b,) + b
    whole = ()
    signed = ()
    for i in tl.static_range(K):
        b_f = v[i] + a[i] * b_f
        whole = whole + (b_f + b[i] - v[i],)
        signed = signed + (b[i] - b_f,)
    return whole, signed


@triton.jit
def far_product(a, d, links, p, q, K: tl.constexpr):
    """K p and (sgn o K) p; K q - (D o K) p and its signed twin, D the scaled distances."""
    b_left, b_right, b_from_left, b_from_right = links
    b_zero = tl.zeros_like(b_left)
    b_one = b_zero + 1.0
    b_fp, b_fg, b_bp, b_bg = b_zero, b_zero, b_zero, b_zero
    for i in tl.static_range(K):
        b_fg = q[i] + a[i] * (b_fg - d[i] * b_fp)
        b_fp = p[i] + a[i] * b_fp
        b_bg = q[K - 1 - i] + a[K - i] * (b_bg - d[K - i] * b_bp)
        b_bp = p[K - 1 - i] + a[K - i] * b_bp
    _, _, _, _, _, _, b_fp, b_fg = tl.associative_scan(
        (b_left, b_from_left, b_fp, b_fg, b_one, b_zero, b_zero, b_zero), 1, join_far
    )
    _, _, _, _, _, _, b_bp, b_bg = tl.associative_scan(
        (b_right, b_from_right, b_bp, b_bg, b_one, b_zero, b_zero, b_zero), 1, join_far, reverse=True
    )
    bp = ()
    bg = ()
    for i in tl.static_range(K):
        b_bg = q[K - 1 - i] + a[K - i] * (b_bg - d[K - i] * b_bp)
        b_bp = p[K - 1 - i] + a[K - i] * b_bp
        bp = (b_bp,) + bp
        bg = (b_bg,) + bg
    whole = ()
    signed = ()
    far = ()
    signed_far = ()
    for i in tl.static_range(K):
        b_fg = q[i] + a[i] * (b_fg - d[i] * b_fp)
        b_fp = p[i] + a[i] * b_fp
        whole = whole + (b_fp + bp[i] - p[i],)
        signed = signed + (bp[i] - b_fp,)
        far = far + (b_fg + bg[i] - q[i],)
        signed_far = signed_far + (bg[i] - b_fg,)
    return whole, signed, far, signed_far

"""orthogonal_frame and its gradient for d <= 3: a matrix a lane, its nine entries in registers.

A smaller matrix is the corner of a 3 x 3 one with the other axes on the diagonal: Gram-Schmidt leaves them where they are.
The formulas are those of csrc/cpu/orthogonal_frame.kernel.h.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import check_tensors, fresh_like, kernel

BLOCK = 128


@triton.jit
def dot(x0, x1, x2, y0, y1, y2):
    return x0 * y0 + x1 * y1 + x2 * y2


@triton.jit
def without(x0, x1, x2, q0, q1, q2):
    """x without its component along q."""
    b_dot = dot(x0, x1, x2, q0, q1, q2)
    return x0 - b_dot * q0, x1 - b_dot * q1, x2 - b_dot * q2


@triton.jit
def load_column(p_x, o_m, m_m, k: tl.constexpr, d: tl.constexpr):
    """Column k of matrices (M, d, d), that of the identity beyond d."""
    p_m = p_x + o_m * d * d + k
    x0 = tl.load(p_m, mask=m_m, other=0).to(tl.float32) if k < d else tl.zeros(o_m.shape, tl.float32)
    x1 = tl.load(p_m + d, mask=m_m, other=0).to(tl.float32) if k < d and d > 1 else tl.zeros(o_m.shape, tl.float32)
    x2 = tl.load(p_m + 2 * d, mask=m_m, other=0).to(tl.float32) if k < d and d > 2 else tl.zeros(o_m.shape, tl.float32)
    if k >= d:
        if k == 1:
            x1 += 1.0
        else:
            x2 += 1.0
    return x0, x1, x2


@triton.jit
def store_column(p_x, o_m, m_m, x0, x1, x2, k: tl.constexpr, d: tl.constexpr):
    p_m = p_x + o_m * d * d + k
    if k < d:
        tl.store(p_m, x0, mask=m_m)
        if d > 1:
            tl.store(p_m + d, x1, mask=m_m)
        if d > 2:
            tl.store(p_m + 2 * d, x2, mask=m_m)


@triton.jit
def largest(x0, x1, x2):
    """The largest absolute entry, 1 for a zero column."""
    b_top = tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.abs(x2))
    return tl.where(b_top > 0, b_top, 1.0)


@triton.jit
def orthonormal(x0, x1, x2, p0, p1, p2, q0, q1, q2, d: tl.constexpr):
    """Column x without its components along p and q (each orthonormal, or zero), of length 1; filled where it depends."""
    b_top = largest(x0, x1, x2)
    x0, x1, x2 = tl.div_rn(x0, b_top), tl.div_rn(x1, b_top), tl.div_rn(x2, b_top)  # to the largest floats
    b_before = tl.sqrt_rn(dot(x0, x1, x2, x0, x1, x2))
    x0, x1, x2 = without(x0, x1, x2, p0, p1, p2)
    x0, x1, x2 = without(x0, x1, x2, q0, q1, q2)
    x0, x1, x2 = without(x0, x1, x2, p0, p1, p2)  # again: once leaves what rounding let through
    x0, x1, x2 = without(x0, x1, x2, q0, q1, q2)
    b_after = tl.sqrt_rn(dot(x0, x1, x2, x0, x1, x2))
    m_fill = b_after <= 1e-6 * b_before  # as in the reference: shorter than this share of its length
    # the axis, of the first d, that is farthest from p and q, made orthonormal to them
    b_left0 = 1.0 - p0 * p0 - q0 * q0
    b_left1 = 1.0 - p1 * p1 - q1 * q1 - (2.0 if d < 2 else 0.0)
    b_left2 = 1.0 - p2 * p2 - q2 * q2 - (2.0 if d < 3 else 0.0)
    m_second = b_left1 > b_left0
    m_third = b_left2 > tl.maximum(b_left0, b_left1)
    y0 = tl.where(m_third, 0.0, tl.where(m_second, 0.0, 1.0))
    y1 = tl.where(m_third, 0.0, tl.where(m_second, 1.0, 0.0))
    y2 = tl.where(m_third, 1.0, 0.0)
    y0, y1, y2 = without(y0, y1, y2, p0, p1, p2)
    y0, y1, y2 = without(y0, y1, y2, q0, q1, q2)
    y0, y1, y2 = without(y0, y1, y2, p0, p1, p2)
    y0, y1, y2 = without(y0, y1, y2, q0, q1, q2)
    x0, x1, x2 = tl.where(m_fill, y0, x0), tl.where(m_fill, y1, x1), tl.where(m_fill, y2, x2)
    b_length = tl.where(m_fill, tl.sqrt_rn(dot(y0, y1, y2, y0, y1, y2)), b_after)
    return x0 / b_length, x1 / b_length, x2 / b_length


@kernel({"num_warps": 4})
def _frames(p_a, p_q, M, d: tl.constexpr, SPECIAL: tl.constexpr, BLOCK: tl.constexpr):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < M
    zero = tl.zeros((BLOCK,), tl.float32)
    a0, a1, a2 = load_column(p_a, o_m, m_m, 0, d)
    b0, b1, b2 = load_column(p_a, o_m, m_m, 1, d)
    c0, c1, c2 = load_column(p_a, o_m, m_m, 2, d)
    a0, a1, a2 = orthonormal(a0, a1, a2, zero, zero, zero, zero, zero, zero, d)
    b0, b1, b2 = orthonormal(b0, b1, b2, a0, a1, a2, zero, zero, zero, 3 if d == 1 else d)
    c0, c1, c2 = orthonormal(c0, c1, c2, a0, a1, a2, b0, b1, b2, 3 if d < 3 else d)
    if SPECIAL:
        b_det = a0 * (b1 * c2 - b2 * c1) - a1 * (b0 * c2 - b2 * c0) + a2 * (b0 * c1 - b1 * c0)
        b_sign = tl.where(b_det < 0, -1.0, 1.0)
        a0, a1, a2 = b_sign * a0, b_sign * a1, b_sign * a2
    store_column(p_q, o_m, m_m, a0, a1, a2, 0, d)
    store_column(p_q, o_m, m_m, b0, b1, b2, 1, d)
    store_column(p_q, o_m, m_m, c0, c1, c2, 2, d)


@triton.jit
def through_length(g0, g1, g2, q0, q1, q2, a0, a1, a2):
    """d u of q = u / |u|, |u| = q . a up to the sign of a mirrored column; none where the column was filled."""
    b_signed = dot(q0, q1, q2, a0, a1, a2)
    b_top = largest(a0, a1, a2)  # squares of scaled entries do not overflow
    s0, s1, s2 = tl.div_rn(a0, b_top), tl.div_rn(a1, b_top), tl.div_rn(a2, b_top)
    b_length = tl.sqrt_rn(dot(s0, s1, s2, s0, s1, s2)) * b_top
    m_filled = tl.abs(b_signed) <= 1e-6 * b_length
    b_inverse = tl.where(m_filled, 0.0, tl.div_rn(b_signed * 0 + 1.0, tl.where(m_filled, 1.0, b_signed)))
    b_inner = dot(q0, q1, q2, g0, g1, g2)
    return (g0 - q0 * b_inner) * b_inverse, (g1 - q1 * b_inner) * b_inverse, (g2 - q2 * b_inner) * b_inverse


@triton.jit
def through_projection(g0, g1, g2, q0, q1, q2, a0, a1, a2, u0, u1, u2):
    """What u = a - q (q . a) with the gradient u adds to the gradient g of q."""
    b_r, b_s = dot(q0, q1, q2, a0, a1, a2), dot(q0, q1, q2, u0, u1, u2)
    return g0 - b_s * a0 - b_r * u0, g1 - b_s * a1 - b_r * u1, g2 - b_s * a2 - b_r * u2


@kernel({"num_warps": 4})
def _frames_backward(p_d_q, p_q, p_a, p_d_a, M, d: tl.constexpr, BLOCK: tl.constexpr):
    """u_k = a_k - sum_{j<k} q_j (q_j . a_k), q_k = u_k / |u_k|, from the last column to the first."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < M
    p0, p1, p2 = load_column(p_q, o_m, m_m, 0, d)
    a0, a1, a2 = load_column(p_a, o_m, m_m, 0, d)
    g0, g1, g2 = load_column(p_d_q, o_m, m_m, 0, d)
    if d > 1:
        q0, q1, q2 = load_column(p_q, o_m, m_m, 1, d)
        b0, b1, b2 = load_column(p_a, o_m, m_m, 1, d)
        h0, h1, h2 = load_column(p_d_q, o_m, m_m, 1, d)
        if d > 2:
            r0, r1, r2 = load_column(p_q, o_m, m_m, 2, d)
            c0, c1, c2 = load_column(p_a, o_m, m_m, 2, d)
            u0, u1, u2 = load_column(p_d_q, o_m, m_m, 2, d)
            u0, u1, u2 = through_length(u0, u1, u2, r0, r1, r2, c0, c1, c2)
            g0, g1, g2 = through_projection(g0, g1, g2, p0, p1, p2, c0, c1, c2, u0, u1, u2)
            h0, h1, h2 = through_projection(h0, h1, h2, q0, q1, q2, c0, c1, c2, u0, u1, u2)
            u0, u1, u2 = without(u0, u1, u2, p0, p1, p2)
            u0, u1, u2 = without(u0, u1, u2, q0, q1, q2)
            store_column(p_d_a, o_m, m_m, u0, u1, u2, 2, d)
        h0, h1, h2 = through_length(h0, h1, h2, q0, q1, q2, b0, b1, b2)
        g0, g1, g2 = through_projection(g0, g1, g2, p0, p1, p2, b0, b1, b2, h0, h1, h2)
        h0, h1, h2 = without(h0, h1, h2, p0, p1, p2)
        store_column(p_d_a, o_m, m_m, h0, h1, h2, 1, d)
    g0, g1, g2 = through_length(g0, g1, g2, p0, p1, p2, a0, a1, a2)
    store_column(p_d_a, o_m, m_m, g0, g1, g2, 0, d)


def _launch(function, *tensors: Tensor, **flags) -> None:
    d = tensors[0].shape[-1] if tensors[0].ndim else 0
    if not 1 <= d <= 3 or tensors[0].shape[-2:] != (d, d):
        raise Refused(ValueError, f"matrices must be (..., d, d) with d in 1..3, got {tuple(tensors[0].shape)}")
    M = tensors[0].numel() // (d * d)
    function(lambda settings: (triton.cdiv(M, BLOCK),), *tensors, M, d=d, BLOCK=BLOCK, **flags)


def forward(matrices: Tensor, special: bool) -> Tensor:
    matrices = matrices.contiguous()
    frames = fresh_like(matrices)
    _launch(_frames, matrices, frames, SPECIAL=special)
    return frames


def backward(d_frames: Tensor, frames: Tensor, matrices: Tensor) -> Tensor:
    shape = matrices.shape
    check_tensors(matrices.device, d_frames=(d_frames, shape), frames=(frames, shape))
    d_frames, frames, matrices = d_frames.contiguous(), frames.contiguous(), matrices.contiguous()
    d_matrices = fresh_like(matrices)
    _launch(_frames_backward, d_frames, frames, matrices, d_matrices)
    return d_matrices

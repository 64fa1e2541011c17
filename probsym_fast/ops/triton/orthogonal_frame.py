"""orthogonal_frame and its gradient for d <= 3: one matrix per lane, its nine entries in registers.

A smaller matrix is the corner of a 3 x 3 one with the other axes on the diagonal, which Gram-Schmidt leaves unchanged.
Formulas as in csrc/cpu/orthogonal_frame.kernel.h.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import cdiv, check_tensors, fresh_like, kernel

BLOCK = 128


@triton.jit
def dot(x0, x1, x2, y0, y1, y2):
    """Written with fma: compilers may fuse products and sums freely, and `residual` must round alike everywhere."""
    return tl.fma(x2, y2, tl.fma(x1, y1, x0 * y0))


@triton.jit
def less(x0, x1, x2, b_factor, q0, q1, q2):
    """x - factor q."""
    return tl.fma(-b_factor, q0, x0), tl.fma(-b_factor, q1, x1), tl.fma(-b_factor, q2, x2)


@triton.jit
def without(x0, x1, x2, q0, q1, q2):
    """x without its component along q."""
    return less(x0, x1, x2, dot(x0, x1, x2, q0, q1, q2), q0, q1, q2)


@triton.jit
def load_column(p_x, o_m, m_m, k: tl.constexpr, d: tl.constexpr):
    """Column k of matrices (M, d, d); beyond d, that of the identity."""
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
    """The largest absolute entry, or 1 for a zero column."""
    b_top = tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.abs(x2))
    return tl.where(b_top > 0, b_top, 1.0)


@triton.jit
def divided(x0, x1, x2, b_scale):
    """x / scale, accurate for the largest and the smallest floats too."""
    return tl.div_rn(x0, b_scale), tl.div_rn(x1, b_scale), tl.div_rn(x2, b_scale)


@triton.jit
def without_both(x0, x1, x2, p0, p1, p2, q0, q1, q2):
    """x without its components along p and q; twice, since rounding leaves some after one pass."""
    x0, x1, x2 = without(x0, x1, x2, p0, p1, p2)
    x0, x1, x2 = without(x0, x1, x2, q0, q1, q2)
    x0, x1, x2 = without(x0, x1, x2, p0, p1, p2)
    return without(x0, x1, x2, q0, q1, q2)


@triton.jit
def residual(x0, x1, x2, p0, p1, p2, q0, q1, q2):
    """u, the part of x orthogonal to p and q (each of length 1, or zero), |u|, and whether x depends on them.

    The backward pass repeats the forward pass's decision.
    """
    b_before = tl.sqrt_rn(dot(x0, x1, x2, x0, x1, x2))
    x0, x1, x2 = without_both(x0, x1, x2, p0, p1, p2, q0, q1, q2)
    b_length = tl.sqrt_rn(dot(x0, x1, x2, x0, x1, x2))
    return x0, x1, x2, b_length, b_length <= 1e-6 * b_before  # the reference's threshold


@triton.jit
def orthonormal(x0, x1, x2, p0, p1, p2, q0, q1, q2, d: tl.constexpr):
    """Column x without its components along p and q (each of length 1, or zero), normalised; replaced if dependent."""
    x0, x1, x2 = divided(x0, x1, x2, largest(x0, x1, x2))
    x0, x1, x2, b_length, m_replaced = residual(x0, x1, x2, p0, p1, p2, q0, q1, q2)
    # of the first d axes the one farthest from p and q (the first of several), made orthonormal to them
    b_left0 = 1.0 - p0 * p0 - q0 * q0
    b_left1 = 1.0 - p1 * p1 - q1 * q1 - (2.0 if d < 2 else 0.0)
    b_left2 = 1.0 - p2 * p2 - q2 * q2 - (2.0 if d < 3 else 0.0)
    b_tie = 0.999 * tl.maximum(tl.maximum(b_left0, b_left1), b_left2)
    m_first = b_left0 >= b_tie
    m_second = ~m_first & (b_left1 >= b_tie)
    y0 = tl.where(m_first, 1.0, 0.0)
    y1 = tl.where(m_second, 1.0, 0.0)
    y2 = tl.where(m_first | m_second, 0.0, 1.0)
    y0, y1, y2 = without_both(y0, y1, y2, p0, p1, p2, q0, q1, q2)
    x0, x1, x2 = tl.where(m_replaced, y0, x0), tl.where(m_replaced, y1, x1), tl.where(m_replaced, y2, x2)
    b_length = tl.where(m_replaced, tl.sqrt_rn(dot(y0, y1, y2, y0, y1, y2)), b_length)
    return divided(x0, x1, x2, b_length)


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
def through_column(g0, g1, g2, x0, x1, x2, o0, o1, o2, p0, p1, p2, q0, q1, q2):
    """Gradient g of column o, made from x and the columns p and q before it: returns those of x, p and q.

    With x divided by its largest entry, r_p = p . x, s_p = p . d_u and so on: u = x - p r_p - q r_q, o = u / |u|,
    d_x = d_u - p s_p - q s_q, and p gets - s_p u - r_p d_x. Zero if x was replaced.
    """
    b_scale = largest(x0, x1, x2)
    x0, x1, x2 = divided(x0, x1, x2, b_scale)
    b_rp, b_rq = dot(p0, p1, p2, x0, x1, x2), dot(q0, q1, q2, x0, x1, x2)
    u0, u1, u2, b_length, m_replaced = residual(x0, x1, x2, p0, p1, p2, q0, q1, q2)
    b_signed = tl.where(dot(o0, o1, o2, u0, u1, u2) < 0, -b_length, b_length)  # negative if o was mirrored
    g0, g1, g2 = less(g0, g1, g2, dot(o0, o1, o2, g0, g1, g2), o0, o1, o2)
    g0, g1, g2 = divided(g0, g1, g2, tl.where(m_replaced, 1.0, b_signed))
    g0, g1, g2 = tl.where(m_replaced, 0.0, g0), tl.where(m_replaced, 0.0, g1), tl.where(m_replaced, 0.0, g2)  # d_u
    b_sp, b_sq = dot(p0, p1, p2, g0, g1, g2), dot(q0, q1, q2, g0, g1, g2)
    g0, g1, g2 = less(g0, g1, g2, b_sp, p0, p1, p2)
    g0, g1, g2 = less(g0, g1, g2, b_sq, q0, q1, q2)  # d_x up to its scale
    p0, p1, p2 = less(-b_sp * u0, -b_sp * u1, -b_sp * u2, b_rp, g0, g1, g2)
    q0, q1, q2 = less(-b_sq * u0, -b_sq * u1, -b_sq * u2, b_rq, g0, g1, g2)
    g0, g1, g2 = divided(g0, g1, g2, b_scale)
    return within_range(g0), within_range(g1), within_range(g2), p0, p1, p2, q0, q1, q2


@triton.jit
def within_range(x):
    """x, clamped to the finite range of float32; NaN stays."""
    x = tl.where(x > 3.4028234663852886e38, 3.4028234663852886e38, x)
    return tl.where(x < -3.4028234663852886e38, -3.4028234663852886e38, x)


@kernel({"num_warps": 4})
def _frames_backward(p_d_q, p_q, p_a, p_d_a, M, d: tl.constexpr, BLOCK: tl.constexpr):
    """From the last column to the first; each column passes gradients to those before it."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < M
    zero = tl.zeros((BLOCK,), tl.float32)
    p0, p1, p2 = load_column(p_q, o_m, m_m, 0, d)
    g0, g1, g2 = load_column(p_d_q, o_m, m_m, 0, d)
    if d > 1:
        q0, q1, q2 = load_column(p_q, o_m, m_m, 1, d)
        h0, h1, h2 = load_column(p_d_q, o_m, m_m, 1, d)
        if d > 2:
            r0, r1, r2 = load_column(p_q, o_m, m_m, 2, d)
            c0, c1, c2 = load_column(p_a, o_m, m_m, 2, d)
            u0, u1, u2 = load_column(p_d_q, o_m, m_m, 2, d)
            u0, u1, u2, v0, v1, v2, w0, w1, w2 = through_column(
                u0, u1, u2, c0, c1, c2, r0, r1, r2, p0, p1, p2, q0, q1, q2
            )
            store_column(p_d_a, o_m, m_m, u0, u1, u2, 2, d)
            g0, g1, g2 = g0 + v0, g1 + v1, g2 + v2
            h0, h1, h2 = h0 + w0, h1 + w1, h2 + w2
        b0, b1, b2 = load_column(p_a, o_m, m_m, 1, d)
        h0, h1, h2, v0, v1, v2, w0, w1, w2 = through_column(
            h0, h1, h2, b0, b1, b2, q0, q1, q2, p0, p1, p2, zero, zero, zero
        )
        store_column(p_d_a, o_m, m_m, h0, h1, h2, 1, d)
        g0, g1, g2 = g0 + v0, g1 + v1, g2 + v2
    a0, a1, a2 = load_column(p_a, o_m, m_m, 0, d)
    g0, g1, g2, v0, v1, v2, w0, w1, w2 = through_column(
        g0, g1, g2, a0, a1, a2, p0, p1, p2, zero, zero, zero, zero, zero, zero
    )
    store_column(p_d_a, o_m, m_m, g0, g1, g2, 0, d)


def _launch(function, *tensors: Tensor, **flags) -> None:
    d = tensors[0].shape[-1] if tensors[0].ndim else 0
    if not 1 <= d <= 3 or tensors[0].shape[-2:] != (d, d):
        raise Refused(ValueError, f"matrices must be (..., d, d) with d in 1..3, got {tuple(tensors[0].shape)}")
    M = tensors[0].numel() // (d * d)
    function(lambda settings: (cdiv(M, BLOCK),), *tensors, M, d=d, BLOCK=BLOCK, **flags)


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

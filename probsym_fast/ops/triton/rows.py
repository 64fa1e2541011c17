"""Parts of networks on rows of features: what their kernels share, and linear maps.

Weights are matrices (out, in) as in torch. A program loops over the features that it sums over and holds one block of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, kernel, precision, width_block


@triton.jit
def activation(b_u, ACT: tl.constexpr):
    """act(u) and its derivative; NaN stays NaN."""
    if ACT == "tanh":
        b_square, b_part = b_u * b_u, tl.exp(-2.0 * tl.abs(b_u))
        b_series = 0.13333333333333333 + b_square * (-0.05396825396825397 + b_square * 0.021869488536155203)
        b_near = b_u * (1.0 + b_square * (-0.3333333333333333 + b_square * b_series))  # where 1 - part loses digits
        b_far = tl.where(b_u < 0, b_part - 1.0, 1.0 - b_part) / (1.0 + b_part)
        b_y = tl.where(b_square < 0.0625, b_near, b_far)
        b_slope = 4.0 * b_part / ((1.0 + b_part) * (1.0 + b_part))  # 1 - y y has no digits far from 0
    elif ACT == "relu":
        b_y = tl.where(b_u <= 0, 0.0, b_u)
        b_slope = tl.where(b_u <= 0, 0.0, 1.0)
    elif ACT == "gelu":
        b_below = 0.5 + 0.5 * tl.erf(b_u * 0.7071067811865476)
        b_y = b_u * b_below
        b_slope = b_below + b_u * (0.3989422804014327 * tl.exp(-0.5 * b_u * b_u))
    else:  # silu
        b_part = 1.0 / (1.0 + tl.exp(-b_u))
        b_y = b_u * b_part
        b_slope = b_part * (1.0 + b_u * (1.0 - b_part))
    return b_y, b_slope


@triton.jit
def values(p_row, o_k, K):
    """Entries o_k of a row of K as (1, ...); 0 beyond it."""
    return tl.load(p_row + o_k, mask=o_k < K, other=0)[None, :]


@triton.jit
def matrix(p_w, o_row, rows, o_column, columns, line, column):
    """Entries (row, column) of a matrix with steps `line` and `column`; 0 beyond its sizes."""
    p_at = p_w + o_row[:, None] * line + o_column[None, :] * column
    return tl.load(p_at, mask=(o_row < rows)[:, None] & (o_column < columns)[None, :], other=0)


@triton.jit
def features(p_x, o_r, m_r, o_k, K):
    """Features o_k of rows o_r of K; 0 beyond."""
    return tl.load(p_x + o_r[:, None] * K + o_k[None, :], mask=m_r[:, None] & (o_k < K)[None, :], other=0)


@triton.jit
def moments(b_x, m_r, o_w, W, eps):
    """Mean and 1 / sqrt(variance + eps) of rows; 0 and 0 of those that are none."""
    b_mean = tl.sum(b_x, 1) / W
    b_away = tl.where((o_w < W)[None, :], b_x - b_mean[:, None], 0.0)
    b_variance = tl.sum(b_away * b_away, 1) / W
    b_inverse = 1.0 / tl.sqrt_rn(b_variance + eps) + (b_variance - b_variance)  # NaN where the variance overflows
    return b_mean, tl.where(m_r, b_inverse, 0.0)


@triton.jit
def normalised(p_x, o_r, m_r, o_k, K, b_mean, b_inverse, p_gain, p_shift):
    """`features` of the rows' norm."""
    b_x = (features(p_x, o_r, m_r, o_k, K) - b_mean[:, None]) * b_inverse[:, None]
    return b_x * values(p_gain, o_k, K) + values(p_shift, o_k, K)


@kernel(
    {"BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 255},
    ieee=({"BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "maxnreg": 255},),
)
def _linear(
    p_x, p_w, p_bias, p_more, p_z, p_active, p_y, rows, K, N,
    UNIT: tl.constexpr, ALONG: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = act(x) w + bias + more of a block of rows and columns. w (K, N); ALONG: one column after the other.

    With z: y = (x w + bias + more) act'(z), and active = act(z). ACT "": none.
    """
    K, N = K * UNIT, N * UNIT
    line, column = (1, K) if ALONG else (N, 1)
    blocks = tl.cdiv(N, BLOCK_N)
    o_r = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r = o_r < rows
    b_y = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_w, b_x = matrix(p_w, o_k, K, o_n, N, line, column), features(p_x, o_r, m_r, o_k, K)
        if ACT != "" and p_z is None:
            b_x, _ = activation(b_x, ACT)
        b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION)
    if p_bias is not None:
        b_y += values(p_bias, o_n, N)
    if p_more is not None:
        b_y += features(p_more, o_r, m_r, o_n, N)
    m_y, o_y = m_r[:, None] & (o_n < N)[None, :], o_r[:, None] * N + o_n[None, :]
    if p_z is not None:
        b_active, b_slope = activation(features(p_z, o_r, m_r, o_n, N), ACT)
        b_y *= b_slope
        tl.store(p_active + o_y, b_active, mask=m_y)
    tl.store(p_y + o_y, b_y, mask=m_y)


@kernel({"num_warps": 4})
def _activate(p_x, p_d, p_y, total, UNIT: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """y = act(x); with d: y = d act'(x)."""
    total *= UNIT
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_y, b_slope = activation(tl.load(p_x + o_x, mask=o_x < total, other=0), ACT)
    if p_d is not None:
        b_y = b_slope * tl.load(p_d + o_x, mask=o_x < total, other=0)
    tl.store(p_y + o_x, b_y, mask=o_x < total)


@kernel(
    {"BLOCK_K": 32, "num_stages": 2, "maxnreg": 255},
    ieee=({"BLOCK_K": 16, "num_stages": 2, "maxnreg": 255},),
)
def _norm_gradient(
    p_d, p_w, p_x, p_gain, p_more, p_normal, p_d_x, rows, K, W, eps,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d (rows, K) of the linear map w (K, W) of the norm of x -> d_x + more; and the rows x before gain and shift."""
    K, W = K * UNIT, W * UNIT
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_w, m_r = tl.arange(0, BLOCK_W), o_r < rows
    b_d = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_w = matrix(p_w, o_k, K, o_w, W, W, 1)
        b_d = tl.dot(features(p_d, o_r, m_r, o_k, K), b_w, b_d, input_precision=PRECISION)
    b_d *= values(p_gain, o_w, W)
    b_x = features(p_x, o_r, m_r, o_w, W)
    b_mean, b_inverse = moments(b_x, m_r, o_w, W, eps)
    b_x = tl.where((o_w < W)[None, :], (b_x - b_mean[:, None]) * b_inverse[:, None], 0.0)
    b_mean_d, b_along = tl.sum(b_d, 1) / W, tl.sum(b_d * b_x, 1) / W
    b_d = b_inverse[:, None] * (b_d - b_mean_d[:, None] - b_x * b_along[:, None])
    m_x, o_x = m_r[:, None] & (o_w < W)[None, :], o_r[:, None] * W + o_w[None, :]
    tl.store(p_normal + o_x, b_x, mask=m_x)
    tl.store(p_d_x + o_x, b_d + features(p_more, o_r, m_r, o_w, W), mask=m_x)


def tile(width: int, unit: int) -> dict:
    """Rows and warps of a program that holds rows of that width, a power of two: at most 32 values a thread.

    unit: of `in_units`; without wide loads a thread holds more addresses.
    """
    rows = 32 if width <= (256 if unit == 4 else 128) else 16
    return {"BLOCK_R": rows, "num_warps": 4 if rows * width <= 2048 else 8}


def in_units(*sizes: int) -> tuple[tuple[int, ...], int]:
    """sizes / UNIT, UNIT: where 4 divides all, the kernels know it, and rows move in 16 bytes."""
    unit = 1 if any(size % 4 for size in sizes) else 4
    return tuple(size // unit for size in sizes), unit


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    more: Tensor | None = None,
    *,
    act: str = "",
    y: Tensor | None = None,
) -> Tensor:
    """y = act(x) w + bias + more: x (rows, K), w (K, N) or its transpose contiguous; y: where it goes. act "": none."""
    y = torch.empty(x.shape[0], w.shape[1], dtype=x.dtype, device=x.device) if y is None else y
    return _multiply(x, w, (bias, more, None, None, y), act)


def linear_gradient(d: Tensor, w: Tensor, z: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """d (rows, K) of act(z) w^T -> d_z (rows, N), and act(z)."""
    d_z, active = torch.empty_like(z), torch.empty_like(z)
    return _multiply(d, w, (None, None, z, active, d_z), act), active


def _multiply(x: Tensor, w: Tensor, others: tuple, act: str) -> Tensor:
    (rows, K), N, y = x.shape, w.shape[1], others[-1]
    (sizes, unit), block = in_units(K, N), width_block(N, 64)

    def grid(settings):
        return (cdiv(rows, settings["BLOCK_R"]) * cdiv(N, block),)

    constants = {"UNIT": unit, "ALONG": not w.is_contiguous(), "ACT": act, "PRECISION": precision(x.dtype)}
    arguments = x, w, *others, rows, *sizes
    _linear(grid, *arguments, sizes=(rows, K, N), BLOCK_R=64 if unit == 4 else 32, BLOCK_N=block, **constants)
    return y


def activate(x: Tensor, act: str, d: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """y = act(x), with d: d act'(x); all contiguous, y: where it goes."""
    y = torch.empty_like(x) if y is None else y
    (total,), unit = in_units(x.numel())
    _activate(lambda settings: (cdiv(x.numel(), 1024),), x, d, y, total, UNIT=unit, ACT=act, BLOCK=1024)
    return y


def norm_gradient(d: Tensor, w: Tensor, x: Tensor, gain: Tensor, more: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """d (rows, K) of the linear map w (K, W) of the norm of x -> d_x + more; and the rows x before gain and shift."""
    (rows, W), K, block = x.shape, d.shape[1], max(16, bucket(x.shape[1]))
    normal, d_x, (sizes, unit) = torch.empty_like(x), torch.empty_like(x), in_units(K, W)

    def grid(settings):
        return (cdiv(rows, settings["BLOCK_R"]),)

    arguments = d, w, x, gain, more, normal, d_x, rows, *sizes, eps
    constants = tile(block, unit) | {"UNIT": unit, "BLOCK_W": block}
    _norm_gradient(grid, *arguments, sizes=(rows, K, W), PRECISION=precision(x.dtype), **constants)
    return d_x, normal


def learn(weight: Tensor, bias: Tensor, d: Tensor, x: Tensor) -> None:
    """Adds the gradients of a linear map x -> d's rows."""
    weight.addmm_(d.t(), x)
    bias.add_(d.sum(0))

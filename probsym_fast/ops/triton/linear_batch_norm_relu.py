"""linear_batch_norm_relu and its gradient.

The library computes the products. Kernels then sum over parts of the rows, add the parts in order, and make one pass over
z. The gradient computes z again with the same product, so z is not kept between the passes.

    z = x linear^T,   mean = sum z / M,   variance = sum (z - mean)^2 / M,   inverse = 1 / sqrt(variance + eps)
    u = weight inverse (z - mean) + bias,   y = max(0, u),   g = d_y where u > 0
    d_bias = sum g,   d_weight = inverse sum g (z - mean)
    d_z = weight inverse (g - d_bias / M - (z - mean) inverse d_weight / M),   d_x = d_z linear,   d_linear = d_z^T x
Rows (M, C); the statistics are float32. The parts depend only on (M, C), and no sum uses atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import cdiv, check_axes, check_tensors, fresh_like, kernel, width_block

PARTS = 512  # most parts of the rows: programs that sum at a time
ALL_PARTS = {"BLOCK_P": PARTS, "BLOCK_C": 8}  # 32 bytes of a part: what memory moves at once
LEAST = 64  # fewest rows per part


@triton.jit
def normalised(p_z, o_z, m_z, b_mean, b_scale, b_bias):
    """z - mean and u of a tile of rows."""
    b_centred = tl.load(p_z + o_z, mask=m_z, other=0).to(tl.float32) - b_mean[None, :]
    return b_centred, b_centred * b_scale[None, :] + b_bias[None, :]


@triton.jit
def channels(p_weight, p_bias, p_mean, p_variance, o_c, m_c, eps):
    """weight inverse, bias, mean and inverse of a block of channels."""
    b_inverse = 1.0 / tl.sqrt_rn(tl.load(p_variance + o_c, mask=m_c, other=1) + eps)
    b_mean = tl.load(p_mean + o_c, mask=m_c, other=0)
    b_scale = tl.load(p_weight + o_c, mask=m_c, other=0) * b_inverse
    return b_scale, tl.load(p_bias + o_c, mask=m_c, other=0), b_mean, b_inverse


@kernel({"TILE": 1024, "num_warps": 4}, {"TILE": 2048, "num_warps": 8})
def _moments(p_z, p_parts, M, C, rows, TILE: tl.constexpr, BLOCK_C: tl.constexpr):
    """parts[part, 0] = mean of a part's rows, parts[part, 1] = sum of (z - that mean)^2; reads each row once.

    Every lane of a tile accumulates its own rows (Welford 1962); the lanes are combined at the end (Chan et al. 1979).
    """
    BLOCK_R: tl.constexpr = TILE // BLOCK_C
    i_part = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_r = tl.arange(0, BLOCK_R)
    m_c = o_c < C
    b_last = tl.minimum((i_part + 1) * rows, M)
    b_count = tl.zeros((BLOCK_R,), tl.float32)
    b_mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    b_square = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, rows, BLOCK_R):
        o_row = i_part * rows + first + o_r
        m_r = o_row < b_last
        b_count += m_r.to(tl.float32)
        b_weight = tl.div_rn(m_r.to(tl.float32), tl.maximum(b_count, 1.0))
        m_z = m_r[:, None] & m_c[None, :]
        b_z = tl.load(p_z + o_row[:, None] * C + o_c[None, :], mask=m_z, other=0).to(tl.float32)
        b_away = tl.where(m_r[:, None], b_z - b_mean, 0.0)
        b_mean += b_away * b_weight[:, None]
        b_square += b_away * (b_z - b_mean)
    b_all = tl.sum(b_count, 0)
    b_centre = tl.sum(b_mean * b_count[:, None], 0) / b_all
    b_away = b_mean - b_centre[None, :]
    b_out = tl.sum(b_square + b_away * b_away * b_count[:, None], 0)
    tl.store(p_parts + 2 * i_part * C + o_c, b_centre, mask=m_c)
    tl.store(p_parts + (2 * i_part + 1) * C + o_c, b_out, mask=m_c)


@kernel({"num_warps": 8})
def _statistics(p_parts, p_mean, p_variance, M, C, rows, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """mean and variance of a block of channels from those of the parts, all read at once."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p, m_c = tl.arange(0, BLOCK_P), o_c < C
    b_count = tl.maximum(tl.minimum(rows, M - o_p.to(tl.int64) * rows), 0).to(tl.float32)[:, None]
    o_in, m_in = 2 * o_p[:, None] * C + o_c[None, :], (o_p < parts)[:, None] & m_c[None, :]
    b_mean = tl.load(p_parts + o_in, mask=m_in, other=0)
    b_square = tl.load(p_parts + o_in + C, mask=m_in, other=0)
    b_centre = tl.sum(b_mean * b_count, 0) / M
    b_away = b_mean - b_centre[None, :]
    tl.store(p_mean + o_c, b_centre, mask=m_c)
    tl.store(p_variance + o_c, tl.sum(b_square + b_away * b_away * b_count, 0) / M, mask=m_c)


@kernel({"TILE": 2048, "num_warps": 4}, {"TILE": 1024, "num_warps": 4})
def _normalise(
    p_z, p_weight, p_bias, p_mean, p_variance, p_y, M, C, eps, TILE: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """y of a tile of rows; NaN stays NaN."""
    BLOCK_R: tl.constexpr = TILE // BLOCK_C
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_z = (o_r < M)[:, None] & (o_c < C)[None, :]
    o_z = o_r[:, None] * C + o_c[None, :]
    b_scale, b_bias, b_mean, _ = channels(p_weight, p_bias, p_mean, p_variance, o_c, o_c < C, eps)
    _, b_u = normalised(p_z, o_z, m_z, b_mean, b_scale, b_bias)
    tl.store(p_y + o_z, tl.where(b_u <= 0, 0.0, b_u).to(p_y.dtype.element_ty), mask=m_z)


@kernel({"TILE": 1024, "num_warps": 4}, {"TILE": 2048, "num_warps": 8})
def _sums(
    p_d_y, p_z, p_weight, p_bias, p_mean, p_variance, p_parts, M, C, eps, rows,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """parts[part, 0] = sum of g, parts[part, 1] = sum of g (z - mean) over a part's rows."""
    BLOCK_R: tl.constexpr = TILE // BLOCK_C
    i_part = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_r = tl.arange(0, BLOCK_R)
    m_c = o_c < C
    b_last = tl.minimum((i_part + 1) * rows, M)
    b_scale, b_bias, b_mean, _ = channels(p_weight, p_bias, p_mean, p_variance, o_c, m_c, eps)
    b_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    b_product = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, rows, BLOCK_R):
        o_row = i_part * rows + first + o_r
        m_z = (o_row < b_last)[:, None] & m_c[None, :]
        o_z = o_row[:, None] * C + o_c[None, :]
        b_centred, b_u = normalised(p_z, o_z, m_z, b_mean, b_scale, b_bias)
        b_g = tl.load(p_d_y + o_z, mask=m_z, other=0).to(tl.float32)
        b_g = tl.where(m_z & (b_u > 0), b_g, 0.0)
        b_sum += b_g
        b_product += b_g * b_centred
    tl.store(p_parts + 2 * i_part * C + o_c, tl.sum(b_sum, 0), mask=m_c)
    tl.store(p_parts + (2 * i_part + 1) * C + o_c, tl.sum(b_product, 0), mask=m_c)


@kernel({"num_warps": 8})
def _channel_gradients(
    p_parts, p_variance, p_d_weight, p_d_bias, C, eps, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """d_weight and d_bias of a block of channels, from all parts at once."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p, m_c = tl.arange(0, BLOCK_P), o_c < C
    o_in, m_in = 2 * o_p[:, None] * C + o_c[None, :], (o_p < parts)[:, None] & m_c[None, :]
    b_sum = tl.sum(tl.load(p_parts + o_in, mask=m_in, other=0), 0)
    b_product = tl.sum(tl.load(p_parts + o_in + C, mask=m_in, other=0), 0)
    b_inverse = 1.0 / tl.sqrt_rn(tl.load(p_variance + o_c, mask=m_c, other=1) + eps)
    tl.store(p_d_bias + o_c, b_sum, mask=m_c)
    tl.store(p_d_weight + o_c, b_product * b_inverse, mask=m_c)


@kernel({"TILE": 2048, "num_warps": 4}, {"TILE": 1024, "num_warps": 4})
def _row_gradients(
    p_d_y, p_z, p_weight, p_bias, p_mean, p_variance, p_d_weight, p_d_bias, p_d_z, M, C, eps,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d_z of a tile of rows."""
    BLOCK_R: tl.constexpr = TILE // BLOCK_C
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m_z = (o_r < M)[:, None] & m_c[None, :]
    o_z = o_r[:, None] * C + o_c[None, :]
    b_scale, b_bias, b_mean, b_inverse = channels(p_weight, p_bias, p_mean, p_variance, o_c, m_c, eps)
    b_centred, b_u = normalised(p_z, o_z, m_z, b_mean, b_scale, b_bias)
    b_g = tl.where(b_u > 0, tl.load(p_d_y + o_z, mask=m_z, other=0).to(tl.float32), 0.0)
    b_offset = tl.load(p_d_bias + o_c, mask=m_c, other=0) / M
    b_slope = tl.load(p_d_weight + o_c, mask=m_c, other=0) * b_inverse / M
    b_d_z = b_scale[None, :] * (b_g - b_offset[None, :] - b_slope[None, :] * b_centred)
    tl.store(p_d_z + o_z, b_d_z.to(p_d_z.dtype.element_ty), mask=m_z)


def _product(x: Tensor, linear: Tensor) -> Tensor:
    """z, in the dtype of x under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ linear.T


def _shape(z: Tensor) -> tuple[int, int, int, int, int]:
    """M, C, rows per part, number of parts, and the block of channels."""
    M, C = z.shape
    rows = max(LEAST, cdiv(M, PARTS))
    return M, C, rows, cdiv(M, rows), width_block(C, 128)


def _check(x: Tensor, linear: Tensor, **given: Tensor) -> tuple[int, int]:
    """M, C; refuses tensors that do not fit x (M, K) and linear (C, K), or their channels (C,)."""
    (M, K), (C, _) = check_axes("x", x, 2), check_axes("linear", linear, 2)
    if not M:
        raise Refused(ValueError, f"x must have at least one row, got {tuple(x.shape)}")
    channels = {name: (y, (C,)) for name, y in given.items()}
    check_tensors(x.device, linear=(linear, (C, K)), **channels)
    return M, C


def forward(x: Tensor, linear: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, linear, weight=weight, bias=bias)
    z, weight, bias = _product(x, linear), weight.contiguous(), bias.contiguous()
    M, C, rows, parts, block = _shape(z)
    y, (mean, variance) = fresh_like(z), (fresh_like(weight) for _ in range(2))
    kept = torch.empty(parts, 2, C, dtype=torch.float32, device=z.device)
    blocks = cdiv(C, block)
    _moments(lambda settings: (parts, blocks), z, kept, M, C, rows, sizes=(M, C), BLOCK_C=block)
    _statistics(lambda x: (cdiv(C, x["BLOCK_C"]),), kept, mean, variance, M, C, rows, parts, **ALL_PARTS)

    def tiles(settings):
        return cdiv(M, settings["TILE"] // block), blocks

    _normalise(tiles, z, weight, bias, mean, variance, y, M, C, eps, sizes=(M, C), BLOCK_C=block)
    return y, mean, variance


def backward(
    d_y: Tensor, x: Tensor, linear: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor,
    eps: float, needs_x: bool, needs_linear: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:  # fmt: skip
    shape = _check(x, linear, weight=weight, bias=bias, mean=mean, variance=variance)
    check_tensors(x.device, d_y=(d_y, shape))
    d_y, weight, bias, mean, variance = (t.contiguous() for t in (d_y, weight, bias, mean, variance))
    z = _product(x, linear)
    M, C, rows, parts, block = _shape(z)
    d_z, d_weight, d_bias = fresh_like(z), fresh_like(weight), fresh_like(bias)
    kept = torch.empty(parts, 2, C, dtype=torch.float32, device=z.device)
    blocks, read = cdiv(C, block), (d_y, z, weight, bias, mean, variance)
    _sums(lambda settings: (parts, blocks), *read, kept, M, C, eps, rows, sizes=(M, C), BLOCK_C=block)
    _channel_gradients(lambda x: (cdiv(C, x["BLOCK_C"]),), kept, variance, d_weight, d_bias, C, eps, parts, **ALL_PARTS)

    def tiles(settings):
        return cdiv(M, settings["TILE"] // block), blocks

    _row_gradients(tiles, *read, d_weight, d_bias, d_z, M, C, eps, sizes=(M, C), BLOCK_C=block)
    del z, read  # frees memory for d_x
    with torch.autocast(x.device.type, enabled=False):
        return d_z @ linear if needs_x else None, d_z.T @ x if needs_linear else None, d_weight, d_bias

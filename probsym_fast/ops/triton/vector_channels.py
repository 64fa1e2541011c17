"""What vector_edge_convolution computes of channels: weights of the maps, statistics and gradients; each is one launch.

    weight = [A_p, A_q, C_p - A_p, C_q - A_q] of feature = [A_p, C_p] and direction = [A_q, C_q], a row for each channel
    scale = gain / sqrt(variance + eps),   shift = bias - scale mean
Channels are padded with zeros to W. The sums are over parts of the pairs, in an order that depends on their number only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.reference.vector_edge_convolution import VARIANCE_EPS
from probsym_fast.ops.triton._launch import cdiv, fresh_like, kernel

BLOCK = 256  # entries of weights a program
OF_PARTS = {"BLOCK_P": 256, "BLOCK_C": 8}  # 32 bytes of a part: what memory moves at once


@triton.jit
def inverse_of(b_variance, eps):
    return 1.0 / tl.sqrt_rn(b_variance + eps)


@triton.jit
def store_scaling(p_scaling, p_gain, p_bias, b_mean, b_variance, o_c, channels, W, eps):
    """scale and shift (2, W) of channels o_c; 0 from `channels` on."""
    m_c = o_c < channels
    b_scale = tl.load(p_gain + o_c, mask=m_c, other=0) * inverse_of(b_variance, eps)
    b_shift = tl.load(p_bias + o_c, mask=m_c, other=0) - b_scale * b_mean
    tl.store(p_scaling + o_c, tl.where(m_c, b_scale, 0.0), mask=o_c < W)
    tl.store(p_scaling + W + o_c, tl.where(m_c, b_shift, 0.0), mask=o_c < W)


@kernel({"num_warps": 4})
def _parameters(
    p_feature, p_direction, p_pool, p_gain, p_bias, p_mean, p_variance, p_weight, p_padded, p_scaling, C, channels, W, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Entries of weight (4 W, C), of padded (W, W), the pool, and of scaling, unless mean is None."""
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_row, o_k = o_x // C, o_x % C
    o_map, o_c = o_row // W, o_row % W
    m_x = (o_map < 4) & (o_c < channels)
    o_in, m_p, m_center = o_c * (2 * C) + o_k, o_map % 2 == 0, o_map >= 2
    b_own = tl.load(p_feature + o_in, mask=m_x & m_p, other=0)
    b_own += tl.load(p_direction + o_in, mask=m_x & ~m_p, other=0)
    b_center = tl.load(p_feature + o_in + C, mask=m_x & m_p & m_center, other=0)
    b_center += tl.load(p_direction + o_in + C, mask=m_x & ~m_p & m_center, other=0)
    tl.store(p_weight + o_x, tl.where(m_center, b_center - b_own, b_own), mask=o_map < 4)
    o_row, o_k = o_x // W, o_x % W
    m_x = (o_row < channels) & (o_k < channels)
    tl.store(p_padded + o_x, tl.load(p_pool + o_row * channels + o_k, mask=m_x, other=0), mask=o_row < W)
    if p_mean is not None:
        b_mean = tl.load(p_mean + o_x, mask=o_x < channels, other=0)
        b_variance = tl.load(p_variance + o_x, mask=o_x < channels, other=0)
        store_scaling(p_scaling, p_gain, p_bias, b_mean, b_variance, o_x, channels, W, eps)


@kernel({"num_warps": 8})
def _statistics(
    p_count, p_means, p_squares, p_gain, p_bias, p_mean, p_variance, p_total, p_scaling, parts, channels, W, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean, variance and scaling of a block of channels, and the number of pairs, from the parts' moments; in float64."""
    o_c, o_r = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P).to(tl.int64)
    m_c = o_c < channels
    b_count = tl.zeros((BLOCK_P,), tl.float64)
    b_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for first in range(0, parts, BLOCK_P):
        o_p = first + o_r
        o_in, m_in = o_p[:, None] * W + o_c[None, :], (o_p < parts)[:, None] & m_c[None, :]
        b_number = tl.load(p_count + o_p, mask=o_p < parts, other=0).to(tl.float64)
        b_count += b_number
        b_sum += b_number[:, None] * tl.load(p_means + o_in, mask=m_in, other=0).to(tl.float64)
    b_total = tl.sum(b_count, 0)
    b_mean = tl.sum(b_sum, 0) / b_total
    b_square = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for first in range(0, parts, BLOCK_P):
        o_p = first + o_r
        o_in, m_in = o_p[:, None] * W + o_c[None, :], (o_p < parts)[:, None] & m_c[None, :]
        b_number = tl.load(p_count + o_p, mask=o_p < parts, other=0).to(tl.float64)
        b_away = tl.load(p_means + o_in, mask=m_in, other=0).to(tl.float64) - b_mean[None, :]
        b_square += tl.load(p_squares + o_in, mask=m_in, other=0).to(tl.float64) + b_number[:, None] * b_away * b_away
    b_mean, b_variance = b_mean.to(tl.float32), (tl.sum(b_square, 0) / b_total).to(tl.float32)
    tl.store(p_mean + o_c, b_mean, mask=o_c < channels)
    tl.store(p_variance + o_c, b_variance, mask=o_c < channels)
    tl.store(p_total, b_total.to(tl.int64), mask=tl.program_id(0) == 0)
    store_scaling(p_scaling, p_gain, p_bias, b_mean, b_variance, o_c, channels, W, eps)


@kernel({"num_warps": 8})
def _channel_gradients(
    p_sums, p_gain, p_mean, p_variance, p_count, p_d_gain, p_d_bias, p_slopes, parts, channels, W, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d of gain and bias from those of scale and shift, (parts, 2, W); and `slopes` (2, W) unless None."""
    o_c, o_r = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P).to(tl.int64)
    m_c = o_c < channels
    b_scales = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    b_shifts = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, parts, BLOCK_P):
        o_p = first + o_r
        o_in, m_in = 2 * o_p[:, None] * W + o_c[None, :], (o_p < parts)[:, None] & m_c[None, :]
        b_scales += tl.load(p_sums + o_in, mask=m_in, other=0)
        b_shifts += tl.load(p_sums + o_in + W, mask=m_in, other=0)
    b_mean, b_gain = tl.load(p_mean + o_c, mask=m_c, other=0), tl.load(p_gain + o_c, mask=m_c, other=0)
    b_inverse = inverse_of(tl.load(p_variance + o_c, mask=m_c, other=0), eps)
    b_d_shift = tl.sum(b_shifts, 0)
    b_d_gain = (tl.sum(b_scales, 0) - b_mean * b_d_shift) * b_inverse
    tl.store(p_d_gain + o_c, b_d_gain, mask=m_c)
    tl.store(p_d_bias + o_c, b_d_shift, mask=m_c)
    if p_slopes is not None:
        b_count = tl.load(p_count).to(tl.float32)
        b_slope = -b_d_gain * b_gain * b_inverse * b_inverse / b_count  # 2 d_variance / count
        b_offset = -b_gain * b_inverse * b_d_shift / b_count - b_slope * b_mean
        tl.store(p_slopes + o_c, tl.where(m_c, b_offset, 0.0), mask=o_c < W)
        tl.store(p_slopes + W + o_c, tl.where(m_c, b_slope, 0.0), mask=o_c < W)


@kernel({"num_warps": 4})
def _weight_gradients(p_d_weight, p_d_feature, p_d_direction, C, channels, W, BLOCK: tl.constexpr):
    """d of feature and direction (channels, 2 C) from that of weight (4 W, C)."""
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_c, o_k = o_x // (2 * C), o_x % (2 * C)
    m_x, m_own = o_c < channels, o_k < C
    p_in = p_d_weight + o_k % C
    b_d_p = tl.load(p_in + (2 * W + o_c) * C, mask=m_x, other=0)
    b_d_q = tl.load(p_in + (3 * W + o_c) * C, mask=m_x, other=0)
    b_own_p = tl.load(p_in + o_c * C, mask=m_x & m_own, other=0)
    b_own_q = tl.load(p_in + (W + o_c) * C, mask=m_x & m_own, other=0)
    tl.store(p_d_feature + o_x, tl.where(m_own, b_own_p - b_d_p, b_d_p), mask=m_x)
    tl.store(p_d_direction + o_x, tl.where(m_own, b_own_q - b_d_q, b_d_q), mask=m_x)


class Channels(NamedTuple):
    """Arguments of the op, contiguous: feature, direction (w, 2 C), pool (w, w), gain and bias (w,)."""

    feature: Tensor
    direction: Tensor
    pool: Tensor
    gain: Tensor
    bias: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """C, w and W."""
        w, inputs = self.feature.shape
        return inputs // 2, w, w + -w % 4

    def parameters(self, mean: Tensor | None, variance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """weight (4 W, C), pool (W, W) and scaling (2, W), which is not filled without mean and variance (w,)."""
        C, w, W = self.sizes
        weight, pool, scaling = (self.gain.new_empty(shape) for shape in ((4 * W, C), (W, W), (2, W)))
        given = *self, mean, variance, weight, pool, scaling, C, w, W, VARIANCE_EPS
        _parameters(lambda settings: (cdiv(max(4 * W * C, W * W), BLOCK),), *given, BLOCK=BLOCK)
        return weight, pool, scaling

    def statistics(self, moments: list[tuple[Tensor, ...]], scaling: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mean, variance (w,) and count () int64 from the parts' moments, in their order; fills scaling."""
        _, w, W = self.sizes
        count, means, squares = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*moments, strict=True))
        mean, variance = fresh_like(self.gain), fresh_like(self.gain)
        total = torch.empty((), dtype=torch.int64, device=mean.device)
        made = mean, variance, total, scaling
        arguments = count, means, squares, self.gain, self.bias, *made, len(count), w, W, VARIANCE_EPS
        _statistics(lambda x: (cdiv(W, x["BLOCK_C"]),), *arguments, **OF_PARTS)
        return mean, variance, total

    def gradients(
        self, sums: list[Tensor], mean: Tensor, variance: Tensor, count: Tensor, learned: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """d of gain and bias (w,) from that of scaling by part, (P, 2, W) each.

        learned: whether the statistics are the batch's. Then also d of norms by them (2, W), as offset and slope.
        """
        _, w, W = self.sizes
        every = sums[0] if len(sums) == 1 else torch.cat(sums)
        d_gain, d_bias = fresh_like(self.gain), fresh_like(self.gain)
        slopes = self.gain.new_empty(2, W) if learned else None
        given = every, self.gain, mean, variance, count, d_gain, d_bias, slopes, len(every), w, W, VARIANCE_EPS
        _channel_gradients(lambda x: (cdiv(W, x["BLOCK_C"]),), *given, **OF_PARTS)
        return d_gain, d_bias, slopes

    def weight_gradients(self, d_weight: Tensor) -> tuple[Tensor, Tensor]:
        """d of feature and direction (w, 2 C) from that of weight (4 W, C)."""
        C, w, W = self.sizes
        d_feature, d_direction = fresh_like(self.feature), fresh_like(self.direction)
        _weight_gradients(
            lambda settings: (cdiv(2 * w * C, BLOCK),), d_weight, d_feature, d_direction, C, w, W, BLOCK=BLOCK
        )
        return d_feature, d_direction

"""Attention within short sequences, from the rows before their norm to the heads' outputs, and its gradient.

A program takes one head of one sequence, its tokens padded to BLOCK_L: queries, keys and values, which it computes from the
rows that the caches hold, their scores, and the output. So small batches fill the GPU too, no block is wider than a head,
and NaN in one sequence reaches no other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, kernel, precision
from probsym_fast.ops.triton.rows import features, in_units, matrix, moments, norm_gradient, normalised, values


@triton.jit
def length_of(p_lengths, i_m, L):
    """Valid tokens, whatever the lengths hold."""
    b_length = L
    if p_lengths is not None:
        b_length = tl.minimum(tl.load(p_lengths + i_m), L).to(tl.int32)
    return b_length


@triton.jit
def attention_weights(b_q, b_k, o_l, b_length, scale, PRECISION: tl.constexpr):
    """softmax(scale q k^T) over the valid keys."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    b_s = tl.where((o_l < b_length)[None, :], b_s, float("-inf"))
    b_p = tl.exp(b_s - tl.max(b_s, 1)[:, None])
    return b_p / tl.sum(b_p, 1)[:, None]


@triton.jit
def heads_of(
    p_x, o_r, m_l, head, p_gain, p_shift, p_qkv, p_bias, W, H, eps,
    PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values of one head."""
    o_w, o_h = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_H)
    b_mean, b_inverse = moments(features(p_x, o_r, m_l, o_w, W), m_l, o_w, W, eps)
    b_q = tl.zeros((BLOCK_L, BLOCK_H), tl.float32)
    b_k = tl.zeros((BLOCK_L, BLOCK_H), tl.float32)
    b_v = tl.zeros((BLOCK_L, BLOCK_H), tl.float32)
    p_query = p_qkv + head * H * W
    p_key, p_value = p_query + W * W, p_query + 2 * W * W
    for k in range(0, W, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = normalised(p_x, o_r, m_l, o_k, W, b_mean, b_inverse, p_gain, p_shift)
        b_q = tl.dot(b_x, matrix(p_query, o_k, W, o_h, H, 1, W), b_q, input_precision=PRECISION)
        b_k = tl.dot(b_x, matrix(p_key, o_k, W, o_h, H, 1, W), b_k, input_precision=PRECISION)
        b_v = tl.dot(b_x, matrix(p_value, o_k, W, o_h, H, 1, W), b_v, input_precision=PRECISION)
    p_bias += head * H
    return b_q + values(p_bias, o_h, H), b_k + values(p_bias + W, o_h, H), b_v + values(p_bias + 2 * W, o_h, H)


@kernel({"maxnreg": 255})
def _attention(
    p_x, p_lengths, p_gain, p_shift, p_qkv, p_bias, p_attended, L, heads, W, H, scale, eps,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The output of one head."""
    W, H = W * UNIT, H * UNIT
    i_m, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    o_l, o_h = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_H)
    o_r, m_l = i_m * L + o_l, o_l < L
    b_q, b_k, b_v = heads_of(
        p_x, o_r, m_l, head, p_gain, p_shift, p_qkv, p_bias, W, H, eps, PRECISION, BLOCK_L, BLOCK_W, BLOCK_H, BLOCK_K
    )
    b_p = attention_weights(b_q, b_k, o_l, length_of(p_lengths, i_m, L), scale, PRECISION)
    p_out = p_attended + o_r[:, None] * W + head * H + o_h[None, :]
    tl.store(p_out, tl.dot(b_p, b_v, input_precision=PRECISION), mask=m_l[:, None] & (o_h < H)[None, :])


@kernel({"maxnreg": 255})
def _attention_gradient(
    p_d, p_x, p_lengths, p_gain, p_shift, p_qkv, p_bias, p_d_qkv, L, heads, W, H, scale, eps,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d of queries, keys and values of one head."""
    W, H = W * UNIT, H * UNIT
    i_m, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    o_l, o_h = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_H)
    o_r, m_l = i_m * L + o_l, o_l < L
    b_q, b_k, b_v = heads_of(
        p_x, o_r, m_l, head, p_gain, p_shift, p_qkv, p_bias, W, H, eps, PRECISION, BLOCK_L, BLOCK_W, BLOCK_H, BLOCK_K
    )
    m_h = m_l[:, None] & (o_h < H)[None, :]
    b_d = tl.load(p_d + o_r[:, None] * W + head * H + o_h[None, :], mask=m_h, other=0)
    b_p = attention_weights(b_q, b_k, o_l, length_of(p_lengths, i_m, L), scale, PRECISION)
    p_out = p_d_qkv + o_r[:, None] * (3 * W) + head * H + o_h[None, :]
    tl.store(p_out + 2 * W, tl.dot(tl.trans(b_p), b_d, input_precision=PRECISION), mask=m_h)
    b_d_p = tl.dot(b_d, tl.trans(b_v), input_precision=PRECISION)
    b_d_s = b_p * (b_d_p - tl.sum(b_p * b_d_p, 1)[:, None]) * scale
    tl.store(p_out, tl.dot(b_d_s, b_k, input_precision=PRECISION), mask=m_h)
    tl.store(p_out + W, tl.dot(tl.trans(b_d_s), b_q, input_precision=PRECISION), mask=m_h)


class Attention:
    """The weights of one: gain and shift of the norm, qkv (3 W, W) and its bias."""

    def __init__(self, gain: Tensor, shift: Tensor, qkv: Tensor, bias: Tensor, heads: int, eps: float):
        self.weights, self.heads, self.eps = (gain, shift, qkv, bias), heads, eps

    def _launch(self, run, x: Tensor, before: tuple, out: Tensor) -> Tensor:
        M, L, W = x.shape
        H = W // self.heads
        tokens, head = max(16, bucket(L)), max(16, bucket(H))
        (sizes, unit), how = in_units(W, H), precision(x.dtype)
        blocks = {"BLOCK_L": tokens, "BLOCK_W": max(16, bucket(W)), "BLOCK_H": head, "UNIT": unit}
        blocks["num_warps"] = 4 if tokens * max(tokens, head) <= 2048 else 8
        blocks["num_stages"] = 2 if unit == 4 else 1  # without wide loads a thread holds more addresses
        blocks["BLOCK_K"] = 32 if (how, unit) == ("tf32", 4) else 16
        arguments = *before, *self.weights, out, L, self.heads, *sizes, H**-0.5, self.eps
        run(lambda settings: (M * self.heads,), *arguments, sizes=(M, L, W, H), PRECISION=how, **blocks)
        return out

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """x (M, L, W) -> the heads' outputs (M, L, W)."""
        return self._launch(_attention, x, (x, lengths), torch.empty_like(x))

    def backward(self, d: Tensor, x: Tensor, lengths: Tensor | None) -> Tensor:
        """d of the heads' outputs -> d_qkv (M, L, 3 W)."""
        d_qkv = torch.empty(*x.shape[:2], 3 * x.shape[2], dtype=x.dtype, device=x.device)
        return self._launch(_attention_gradient, x, (d, x, lengths), d_qkv)

    def input_gradient(self, d_qkv: Tensor, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        """d_qkv (rows, 3 W), x and more (rows, W) -> d_x + more; and x before gain and shift."""
        gain, _, qkv, _ = self.weights
        return norm_gradient(d_qkv, qkv, x, gain, more, self.eps)

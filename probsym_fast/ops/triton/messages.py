"""Messages between all nodes of small graphs, m_i = sum_{j != i} silu(message(silu(z_ij))), and their gradient.

    z_ij = p_i[:W] + p_j[W:] + pair[:, 2 W:] e_ij + bias,   p (nodes, 2 W): products of h with both parts of the map pair
A program takes a block of nodes or of pairs and a block of features. It computes z from rows that the caches hold wherever
it is read, so forward nothing of a pair's size is in memory. Backward d of the message's map, silu(z) and d z are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import cdiv, kernel, precision, width_block
from probsym_fast.ops.triton.rows import activation, in_units, matrix, values


@triton.jit
def before_silu(p_p, p_edges, p_pair, p_bias, b_to, b_of, b_edge, m_r, o_k, W, C):
    """z (pairs, o_k) of receivers b_to and senders b_of, with the features of edges b_edge."""
    m_k = m_r[:, None] & (o_k < W)[None, :]
    b_z = tl.load(p_p + b_to[:, None] * (2 * W) + o_k[None, :], mask=m_k, other=0)
    b_z += tl.load(p_p + b_of[:, None] * (2 * W) + W + o_k[None, :], mask=m_k, other=0)
    b_z += values(p_bias, o_k, W)
    for c in range(C):
        b_w = tl.load(p_pair + o_k * (2 * W + C) + 2 * W + c, mask=o_k < W, other=0)
        b_z += tl.load(p_edges + b_edge * C + c, mask=m_r, other=0)[:, None] * b_w[None, :]
    return b_z


@triton.jit
def after_message(
    p_p, p_edges, p_pair, p_bias, p_message, p_message_bias, b_to, b_of, b_edge, m_r, o_n, W, C,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """message(silu(z)) (pairs, o_n)."""
    b_q = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for k in range(0, W, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_z, _ = activation(before_silu(p_p, p_edges, p_pair, p_bias, b_to, b_of, b_edge, m_r, o_k, W, C), "silu")
        b_q = tl.dot(b_z, matrix(p_message, o_k, W, o_n, W, 1, W), b_q, input_precision=PRECISION)
    return b_q + values(p_message_bias, o_n, W)


@kernel(
    {"BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 255},
    ieee=({"BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "maxnreg": 255},),
)
def _messages(
    p_h, p_p, p_edges, p_pair, p_bias, p_message, p_message_bias, p_out, rows, samples, n, W, C,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (nodes, 2 W) = [h, m] of a block of nodes and of features."""
    W *= UNIT
    blocks = tl.cdiv(W, BLOCK_N)
    o_r = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r = o_r < rows
    b_first = o_r // n * n
    b_edges = (o_r // (n * samples) * n + o_r % n) * n
    b_m = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for j in range(n):
        b_q = after_message(
            p_p, p_edges, p_pair, p_bias, p_message, p_message_bias, o_r, b_first + j, b_edges + j, m_r, o_n, W, C,
            PRECISION, BLOCK_R, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        b_q, _ = activation(b_q, "silu")
        b_m += tl.where((o_r % n != j)[:, None], b_q, 0.0)
    m_n = m_r[:, None] & (o_n < W)[None, :]
    p_row = p_out + o_r[:, None] * (2 * W) + o_n[None, :]
    tl.store(p_row, tl.load(p_h + o_r[:, None] * W + o_n[None, :], mask=m_n, other=0), mask=m_n)
    tl.store(p_row + W, b_m, mask=m_n)


@kernel(
    {"BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 255},
    ieee=({"BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "maxnreg": 255},),
)
def _message_gradient(
    p_d, p_p, p_edges, p_pair, p_bias, p_message, p_message_bias, p_d_q, rows, samples, n, W, C,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d of the message's map, of a block of pairs and of features, from d (nodes, 2 W) of [h, m]; 0 for loops."""
    W *= UNIT
    blocks = tl.cdiv(W, BLOCK_N)
    o_r = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r, b_to = o_r < rows, o_r // n
    b_of, b_edge = b_to // n * n + o_r % n, o_r // (n * n * samples) * (n * n) + o_r % (n * n)
    b_q = after_message(
        p_p, p_edges, p_pair, p_bias, p_message, p_message_bias, b_to, b_of, b_edge, m_r, o_n, W, C,
        PRECISION, BLOCK_R, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _, b_slope = activation(b_q, "silu")
    m_n = m_r[:, None] & (o_n < W)[None, :]
    b_d = tl.load(p_d + b_to[:, None] * (2 * W) + W + o_n[None, :], mask=m_n, other=0)
    b_d = tl.where((b_to != b_of)[:, None], b_d * b_slope, 0.0)
    tl.store(p_d_q + o_r[:, None] * W + o_n[None, :], b_d, mask=m_n)


@kernel(
    {"BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 255},
    ieee=({"BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "maxnreg": 255},),
)
def _pair_gradient(
    p_d_q, p_p, p_edges, p_pair, p_bias, p_message, p_active, p_d_z, rows, samples, n, W, C,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """silu(z) and d z of a block of pairs and of features."""
    W *= UNIT
    blocks = tl.cdiv(W, BLOCK_N)
    o_r = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r, b_to = o_r < rows, o_r // n
    b_of, b_edge = b_to // n * n + o_r % n, o_r // (n * n * samples) * (n * n) + o_r % (n * n)
    b_d = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for k in range(0, W, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_d_q = tl.load(p_d_q + o_r[:, None] * W + o_k[None, :], mask=m_r[:, None] & (o_k < W)[None, :], other=0)
        b_d = tl.dot(b_d_q, matrix(p_message, o_k, W, o_n, W, W, 1), b_d, input_precision=PRECISION)
    b_z, b_slope = activation(before_silu(p_p, p_edges, p_pair, p_bias, b_to, b_of, b_edge, m_r, o_n, W, C), "silu")
    m_n, o_out = m_r[:, None] & (o_n < W)[None, :], o_r[:, None] * W + o_n[None, :]
    tl.store(p_active + o_out, b_z, mask=m_n)
    tl.store(p_d_z + o_out, b_d * b_slope, mask=m_n)


class Messages:
    """The weights of one layer: pair (W, 2 W + C), message (W, W), and their biases."""

    def __init__(self, pair: Tensor, bias: Tensor, message: Tensor, message_bias: Tensor):
        self.pair, self.message, self.message_bias, self.W = (pair, bias), message, message_bias, message.shape[0]

    def _launch(self, run, first: Tensor, p: Tensor, edges: Tensor, rest: tuple, rows: int, samples: int) -> None:
        W, n, C, block = self.W, *edges.shape[2:], width_block(self.W, 64)
        units, unit = in_units(W)
        arguments = first, p, edges, *self.pair, self.message, *rest, rows, samples, n, *units, C

        def grid(settings):
            return (cdiv(rows, settings["BLOCK_R"]) * cdiv(W, block),)

        constants = {"UNIT": unit, "PRECISION": precision(p.dtype), "BLOCK_R": 32, "BLOCK_N": block}
        run(grid, *arguments, sizes=(rows, n, W), **constants)

    def forward(self, h: Tensor, p: Tensor, edges: Tensor, samples: int) -> Tensor:
        """h (nodes, W), p (nodes, 2 W), edges (B, n, n, C) without loops, each of `samples` graphs -> [h, m] (nodes, 2 W)."""
        out = torch.empty_like(p)
        self._launch(_messages, h, p, edges, (self.message_bias, out), h.shape[0], samples)
        return out

    def backward(self, d: Tensor, p: Tensor, edges: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """d (nodes, 2 W) of [h, m] -> d of the message's map, silu(z) and d z, all (pairs, W)."""
        rows = p.shape[0] * edges.shape[2]
        d_q, active, d_z = (torch.empty(rows, self.W, dtype=p.dtype, device=p.device) for _ in range(3))
        self._launch(_message_gradient, d, p, edges, (self.message_bias, d_q), rows, samples)
        self._launch(_pair_gradient, d_q, p, edges, (active, d_z), rows, samples)
        return d_q, active, d_z

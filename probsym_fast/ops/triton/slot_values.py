"""Values of nodes read from tokens, of which most are read several times: every slot's value, and then the means.

    z[sample, slot, channel] = <tokens[token], W[offset, channel]>,   value = bias + scale sum_samples z
The first is a matrix product, which reads each token once, and depends on no permutation. So it needs each slot in one place
(Q = 1). A node's value then waits for its graph, its slots and z.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, check_counts, kernel, precision
from probsym_fast.ops.triton.graphs import MORE_ENDS, graph_of_few, halvings

BLOCK, SAMPLES = 16, 16  # values and samples of a program
TOKENS, PARTS = 32, 4  # of the product: tokens of a program; parts of the width, for more programs where z is small


@kernel({"num_warps": 2, "num_stages": 3, "maxnreg": 255}, {"num_warps": 4, "num_stages": 3})
def _slot_values(
    p_tokens, p_weight, p_slots, p_z, tokens, N, grid, patch, C, D, X, share,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z of a block of tokens and of columns (offset, channel), over one part of the width, of `share`."""
    i_m, i_x = tl.program_id(0) // tl.cdiv(X, BLOCK_X), tl.program_id(0) % tl.cdiv(X, BLOCK_X)
    o_m, o_x = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    m_m, m_x = o_m < tokens, o_x < X
    b_sum = tl.zeros((BLOCK_M, BLOCK_X), tl.float32)
    for k in range(0, share, BLOCK_K):
        o_k = tl.program_id(1) * share + k + tl.arange(0, BLOCK_K)
        p_x, p_w = p_tokens + o_m[:, None] * D + o_k[None, :], p_weight + o_x.to(tl.int64)[None, :] * D + o_k[:, None]
        b_x = tl.load(p_x, mask=m_m[:, None] & (o_k < D)[None, :], other=0)
        b_w = tl.load(p_w, mask=(o_k < D)[:, None] & m_x[None, :], other=0)
        b_sum = tl.dot(b_x, b_w, b_sum, input_precision=PRECISION)
    m_z, b_offset = m_m[:, None] & m_x[None, :], o_x // C
    b_slot = tl.load(p_slots + (o_m % grid * patch)[:, None] + b_offset[None, :], mask=m_z, other=-1)
    b_at = (o_m // grid)[:, None] * N + b_slot
    p_at = p_z + (b_at * C + (o_x % C)[None, :]) * PARTS + tl.program_id(1)
    tl.store(p_at, b_sum, mask=m_z & (b_slot >= 0) & (b_slot < N))


@kernel({"num_warps": 4})
def _average_samples(
    p_items, p_ptr, p_rank, p_z, p_bias, p_values, total, S, N, graphs, C, STEPS, scale,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A block of values (item, channel): bias + scale times the sum of z over samples; the bias of items of no graph."""
    o_x, o_s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_S)
    b_item, b_c = (o_x // C).to(tl.int64), o_x % C
    m_x = o_x < total
    b_u = tl.load(p_items + b_item, mask=m_x, other=-1)
    b_graph = tl.minimum(graph_of_few(p_ptr, b_u, graphs, STEPS), graphs - 1)
    m_u = m_x & (b_u >= 0) & (b_u < tl.load(p_ptr + graphs))
    b_first = tl.load(p_ptr + b_graph, mask=m_u, other=0)
    m_u = m_u & (b_u >= b_first) & (b_u - b_first < N)
    b_sum = tl.zeros((BLOCK, BLOCK_S), tl.float32)
    for s in range(0, S, BLOCK_S):
        m_s = m_u[:, None] & (s + o_s < S)[None, :]
        b_sample = b_graph[:, None] * S + (s + o_s)[None, :]
        b_slot = tl.load(p_rank + b_sample * N + (b_u - b_first)[:, None], mask=m_s, other=-1)
        m_s = m_s & (b_slot >= 0) & (b_slot < N)
        b_at = b_sample * N + b_slot
        p_at = p_z + ((b_at * C + b_c[:, None]) * PARTS)[:, :, None] + tl.arange(0, PARTS)[None, None, :]
        b_sum += tl.sum(tl.load(p_at, mask=m_s[:, :, None], other=0), 2)
    b_value = scale * tl.sum(b_sum, 1)
    if p_bias is not None:
        b_value += tl.load(p_bias + b_c, mask=m_x, other=0).to(tl.float32)
    tl.store(p_values + o_x, b_value.to(p_values.dtype.element_ty), mask=m_x)


def read_slots(x, tokens: Tensor, scale: float, W: Tensor, bias: Tensor | None, values: Tensor) -> None:
    """values (M, C) of `Items` x, which are nodes with each slot in one place; tokens, W and bias contiguous."""
    offsets, C, D = W.shape
    columns, total = offsets * C, x.M * C
    size = tokens.element_size()
    block, each = max(16, min(128 // size, bucket(columns))), min(128 // size, max(16, bucket(D)))
    blocks, room = cdiv(x.tokens, TOKENS) * cdiv(columns, block), x.B * x.S * x.N * C
    parts = PARTS if 4 * PARTS * columns <= D else 1
    share = cdiv(cdiv(D, parts), each) * each
    check_counts(values_of_all_items=total)
    z = torch.empty(room, parts, dtype=torch.float32, device=tokens.device)
    _slot_values(
        lambda settings: (blocks, parts), tokens, W, x.slots, z, x.tokens, x.N, x.grid, x.patch, C, D, columns, share,
        sizes=(x.tokens, columns, D), PRECISION=precision(tokens.dtype, "tf32x3"), PARTS=parts, BLOCK_M=TOKENS,
        BLOCK_X=block, BLOCK_K=each,
    )  # fmt: skip
    _average_samples(
        lambda settings: (cdiv(total, BLOCK),), x.items, x.ptr, x.rank, z, bias, values, total, x.S if x.B else 0, x.N,
        x.B, C, halvings(x.B, MORE_ENDS), float(scale), PARTS=parts, BLOCK=BLOCK, BLOCK_S=SAMPLES,
    )  # fmt: skip

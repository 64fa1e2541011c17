"""Values of items (items.py), each from its own entries: programs of one item."""

from __future__ import annotations

import triton
import triton.language as tl

from probsym_fast.ops.triton._launch import kernel
from probsym_fast.ops.triton.graphs import graph_of_few


@kernel({"num_warps": 4}, {"num_warps": 2})
def gather(
    p_token, p_offset, p_tokens, p_weight, p_bias, p_values, tokens, M, S, C, D, copies, scale,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One item, BLOCK_C channels: bias + scale times the sum over its entries of <tokens[token], W[offset, channel]>."""
    i_item = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_sum = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        for k in range(S * copies):
            b_entry = ((k // copies) * M + i_item) * copies + k % copies
            b_token = tl.load(p_token + b_entry).to(tl.int64)
            b_offset = tl.load(p_offset + b_entry).to(tl.int64)
            m_d = o_d < tl.where(b_token < tokens, D, 0)
            b_x = tl.load(p_tokens + b_token * D + o_d, mask=m_d, other=0).to(tl.float32)
            p_w = p_weight + (b_offset * C + o_c)[:, None] * D + o_d[None, :]
            b_sum += b_x[None, :] * tl.load(p_w, mask=m_c[:, None] & m_d[None, :], other=0).to(tl.float32)
    b_value = scale * tl.sum(b_sum, 1)
    if p_bias is not None:
        b_value += tl.load(p_bias + o_c, mask=m_c, other=0).to(tl.float32)
    tl.store(p_values + i_item * C + o_c, b_value.to(p_values.dtype.element_ty), mask=m_c)


@triton.jit
def place_of(p_slots, b_slot, places, N, BLOCK_P: tl.constexpr):
    """The place of each slot that has one place; -1 of what is no slot.

    Padding that gives each slot one place has all of it at the end, or half of it in front: two looks. Else a search.
    """
    m_slot, front = (b_slot >= 0) & (b_slot < N), (places - N) // 2
    b_end = tl.load(p_slots + b_slot, mask=m_slot, other=-1) == b_slot
    b_half = tl.load(p_slots + b_slot + front, mask=m_slot, other=-1) == b_slot
    b_place = tl.where(b_end, b_slot, tl.where(b_half, b_slot + front, -1))
    m_left = m_slot & (b_place < 0)
    for p in range(0, tl.where(tl.max(m_left.to(tl.int32), 0) > 0, places, 0), BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        m_hit = tl.load(p_slots + o_p, mask=o_p < places, other=-1)[None, :] == b_slot[:, None]
        b_place = tl.maximum(b_place, tl.max(tl.where(m_hit & m_left[:, None], o_p[None, :], -1), 1))
    return tl.where(m_slot, b_place, -1)


@kernel({"BLOCK_E": 16, "num_warps": 4}, {"BLOCK_E": 8, "num_warps": 4}, {"BLOCK_E": 16, "num_warps": 8})
def gather_one(
    p_items, p_ptr, p_rank, p_slots, p_tokens, p_weight, p_bias, p_values,
    M, S, N, graphs, grid, patch, places, D, STEPS, scale,
    BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One pair, of one channel, as `gather`, of slots in one place each. It finds its entries, BLOCK_E at once, by itself."""
    i_item, o_e = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_E)
    b_u = tl.load(p_items + i_item + tl.arange(0, 1))  # (1,)
    b_v = tl.load(p_items + M + i_item + tl.arange(0, 1))
    b_graph = tl.minimum(graph_of_few(p_ptr, b_u, graphs, STEPS), graphs - 1)
    m_u = (b_u >= 0) & (b_u < tl.load(p_ptr + graphs))
    b_first, b_last = tl.load(p_ptr + b_graph, mask=m_u, other=0), tl.load(p_ptr + b_graph + 1, mask=m_u, other=0)
    m_u = m_u & (b_u >= b_first) & (b_u - b_first < N)
    m_u = m_u & (b_v >= b_first) & (b_v < b_last) & (b_v - b_first < N)
    b_sum = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for e in range(0, S, BLOCK_E):
        b_sample = b_graph * S + (e + o_e)
        m_k = m_u & (e + o_e < S)
        p_rank_s = p_rank + b_sample * N
        b_p = place_of(p_slots, tl.load(p_rank_s + (b_u - b_first), mask=m_k, other=-1), places, N, BLOCK_P)
        m_k = b_p >= 0
        b_q = place_of(p_slots, tl.load(p_rank_s + (b_v - b_first), mask=m_k, other=-1), places, N, BLOCK_P)
        m_k = m_k & (b_q >= 0)
        b_token, b_offset = b_p // patch * grid + b_q // patch, b_p % patch * patch + b_q % patch
        p_x = p_tokens + ((b_sample * grid * grid + b_token) * D)[:, None]
        p_w = p_weight + (b_offset * D)[:, None]
        for d in range(0, D, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            m_d = m_k[:, None] & (o_d < D)[None, :]
            b_x = tl.load(p_x + o_d[None, :], mask=m_d, other=0).to(tl.float32)
            b_sum += b_x * tl.load(p_w + o_d[None, :], mask=m_d, other=0).to(tl.float32)
    b_value = scale * tl.sum(b_sum)
    if p_bias is not None:
        b_value += tl.load(p_bias).to(tl.float32)
    tl.store(p_values + i_item, b_value.to(p_values.dtype.element_ty))

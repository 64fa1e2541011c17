"""The entries of items on patches (items.py): the place of each slot, and the token and offset of each entry."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, kernel
from probsym_fast.ops.triton.graphs import graph_of

BLOCK = 128


@kernel({"num_warps": 4})
def _places(p_slots, p_places, p_count, places, keys, Q, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr):
    """places[slot, copy], ascending; -1 beyond the slot's places. count (keys + 1,): zeros, which save a launch."""
    i_slot = tl.program_id(0).to(tl.int64)
    if p_count is not None:
        for k in range(tl.program_id(0) * BLOCK_P, keys + 1, tl.num_programs(0) * BLOCK_P):
            o_key = k + tl.arange(0, BLOCK_P)
            tl.store(p_count + o_key, o_key * 0, mask=o_key <= keys)
    o_p = tl.arange(0, BLOCK_P)
    b_slot = tl.load(p_slots + o_p, mask=o_p < places, other=-1)
    b_hit = (b_slot == i_slot).to(tl.int32)
    b_copy = tl.cumsum(b_hit, 0) - 1
    tl.store(p_places + i_slot * Q + b_copy, o_p, mask=(b_hit > 0) & (b_copy < Q))
    o_q = tl.arange(0, BLOCK_Q)
    tl.store(p_places + i_slot * Q + o_q, o_q * 0 - 1, mask=(o_q >= tl.sum(b_hit, 0)) & (o_q < Q))


@triton.jit
def entry(
    p_items, p_ptr, p_rank, p_places, o_e, E, M, S, N, graphs, grid, patch, Q, STEPS, AXES: tl.constexpr
):  # fmt: skip
    """The token, counted over all samples, the offset and the item of each entry; and which are not empty."""
    m_e, b_copies = o_e < E, Q  # o_e below 2^31: divided in 32 bits, then widened
    if AXES == 2:
        b_copies = Q * Q
    b_copy = o_e % b_copies
    b_item = ((o_e // b_copies) % M).to(tl.int64)
    b_sample = ((o_e // b_copies) // M).to(tl.int64)
    b_u = tl.load(p_items + b_item, mask=m_e, other=-1)
    b_v = b_u
    if AXES == 2:
        b_v = tl.load(p_items + M + b_item, mask=m_e, other=-1)
    b_graph = tl.minimum(graph_of(p_ptr, b_u, graphs, STEPS), graphs - 1)
    m_e = m_e & (b_u >= 0) & (b_u < tl.load(p_ptr + graphs))
    b_first = tl.load(p_ptr + b_graph, mask=m_e, other=0)
    b_last = tl.load(p_ptr + b_graph + 1, mask=m_e, other=0)
    b_sample = b_graph * S + b_sample
    m_e = m_e & (b_u >= b_first) & (b_u - b_first < N)
    if AXES == 2:
        m_e = m_e & (b_v >= b_first) & (b_v < b_last) & (b_v - b_first < N)
    b_row = tl.load(p_rank + b_sample * N + b_u - b_first, mask=m_e, other=-1)
    m_row = (b_row >= 0) & (b_row < N)
    if AXES == 2:
        b_column = tl.load(p_rank + b_sample * N + b_v - b_first, mask=m_e, other=-1)
        m_e = m_row & (b_column >= 0) & (b_column < N)
        b_p = tl.load(p_places + b_row * Q + b_copy // Q, mask=m_e, other=-1)
        b_q = tl.load(p_places + b_column * Q + b_copy % Q, mask=m_e, other=-1)
        m_e = (b_p >= 0) & (b_q >= 0)
        b_token = b_sample * grid * grid + (b_p // patch) * grid + b_q // patch
        b_offset = (b_p % patch) * patch + b_q % patch
    else:
        b_p = tl.load(p_places + b_row * Q + b_copy, mask=m_row, other=-1)
        m_e = b_p >= 0
        b_token = b_sample * grid + b_p // patch
        b_offset = b_p % patch
    return b_token.to(tl.int32), b_offset.to(tl.int32), b_item, m_e


@kernel({"num_warps": 4})
def entries(
    p_items, p_ptr, p_rank, p_places, p_token, p_offset,
    E, M, S, N, graphs, grid, patch, Q, none, STEPS, AXES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """token[e] and offset[e]; an empty entry has token `none` and offset -1."""
    o_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_token, b_offset, _, m_e = entry(
        p_items, p_ptr, p_rank, p_places, o_e, E, M, S, N, graphs, grid, patch, Q, STEPS, AXES
    )
    tl.store(p_token + o_e, tl.where(m_e, b_token, none), mask=o_e < E)
    tl.store(p_offset + o_e, tl.where(m_e, b_offset, -1), mask=o_e < E)


def places_of_slots(slots: Tensor, N: int, most: int, count: Tensor | None = None) -> Tensor:
    """(N, most) int32: the places of each slot, ascending; -1 beyond. count, int32: gets zeros."""
    places, size, keys = torch.empty(N, most, dtype=torch.int32, device=slots.device), slots.shape[0], 0
    if count is not None:
        keys = count.shape[0] - 1
    _places(lambda settings: (N,), slots, places, count, size, keys, most, BLOCK_P=bucket(size), BLOCK_Q=bucket(most))
    return places

"""Lists of the pairs of an entry and a channel whose value is not zero, for the sums of items.py.

Lists of pairs, since of one-hot values all but one are zero: nothing is read for the others.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import kernel
from probsym_fast.ops.triton.entries import entry


class Lists(NamedTuple):
    """Pairs by key, those of key k from number begin[k] to begin[k + 1] - 1. row, scaled: as `list_pairs` gives them."""

    begin: Tensor
    row: Tensor
    scaled: Tensor


@kernel({"num_warps": 4})
def count_pairs(
    p_items, p_ptr, p_rank, p_places, p_values, p_token, p_offset, p_count, p_place,
    E, M, S, N, graphs, grid, patch, Q, tokens, C, STEPS,
    AXES: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Counts the pairs of an entry and a channel whose value is not zero by their keys.

    The keys: with TOKENS the entry's token, with ROWS the weight row offset C + channel; with both, rows follow all tokens.
    place[kind of key, entry, channel]: how many pairs of that key were counted before, or without count the key, -1 if the
    value is zero. token[e], offset[e]: of the entry, -1 where it is empty.
    """
    o_e, o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    b_token, b_offset, b_item, m_e = entry(
        p_items, p_ptr, p_rank, p_places, o_e, E, M, S, N, graphs, grid, patch, Q, STEPS, AXES
    )
    tl.store(p_token + o_e, tl.where(m_e, b_token, -1), mask=o_e < E)
    tl.store(p_offset + o_e, tl.where(m_e, b_offset, -1), mask=o_e < E)
    for c in range(0, C, BLOCK_C):
        m_c = (o_e < E)[:, None] & (c + o_c < C)[None, :]
        b_value = tl.load(p_values + b_item[:, None] * C + (c + o_c)[None, :], mask=m_c, other=0)
        m_x, p_at = m_e[:, None] & (b_value != 0), p_place + o_e[:, None] * C + (c + o_c)[None, :]
        b_row = b_offset[:, None] * C + (c + o_c)[None, :]
        if TOKENS:
            b_key = tl.where(m_x, b_token[:, None], -1)
            if p_count is not None:
                b_key = tl.atomic_add(p_count + b_key + 1, 1, mask=m_x, sem="relaxed")
            tl.store(p_at, b_key, mask=m_c)
            p_at += E * C
            b_row += tokens
        if ROWS:
            b_key = tl.where(m_x, b_row, -1)
            if p_count is not None:
                b_key = tl.atomic_add(p_count + b_key + 1, 1, mask=m_x, sem="relaxed")
            tl.store(p_at, b_key, mask=m_c)


@kernel({"num_warps": 4})
def list_pairs(
    p_values, p_token, p_offset, p_begin, p_place, p_row, p_scaled, pairs, M, C, copies, tokens, scale,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each pair, at its place in the lists: row, in a token's list the weight row and in that of a weight row the token;
    scaled, scale value. Without begin, place says where in the lists.

    The sums read both at once, and then the row: without them three loads wait for each other.
    """
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_entry, b_c = o_x // C, o_x % C
    b_item = (b_entry // copies % M).to(tl.int64)
    b_token = tl.load(p_token + b_entry, mask=o_x < pairs, other=-1)
    b_row = tl.load(p_offset + b_entry, mask=o_x < pairs, other=-1) * C + b_c
    b_value = tl.load(p_values + b_item * C + b_c, mask=o_x < pairs, other=0).to(tl.float32)
    m_x, p_at = (b_value != 0) & (b_token >= 0), p_place + o_x
    b_key = b_row
    if TOKENS:
        b_at = tl.load(p_at, mask=m_x, other=0)
        if p_begin is not None:
            b_at += tl.load(p_begin + b_token, mask=m_x, other=0)
        tl.store(p_row + b_at, b_row, mask=m_x)
        tl.store(p_scaled + b_at, scale * b_value, mask=m_x)
        p_at += pairs
        b_key += tokens
    if ROWS:
        b_at = tl.load(p_at, mask=m_x, other=0)
        if p_begin is not None:
            b_at += tl.load(p_begin + b_key, mask=m_x, other=0)
        tl.store(p_row + b_at, b_token, mask=m_x)
        tl.store(p_scaled + b_at, scale * b_value, mask=m_x)

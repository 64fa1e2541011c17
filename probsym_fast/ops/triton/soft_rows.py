"""The gradient from items on patches to the soft permutation, formed row by row and reduced against P at once.

L = scale sum value_c <tokens[token], W[offset, c]> over all entries; G = dL/dP has, for an item (u, v) in slots (i, j),
    G[i, p] += sum_c value_c Z_c[p, j],   G[j, p] += sum_c value_c Z_c[i, p],   Z_c[p, q] = <tokens[token], W[offset, c]>
at the token and offset of the places p and q (a node: G[i, p] += sum_c value_c Z_c[p]). With Q = G o P,
    d log_r_i = sum_p Q_ip,   d log_c_p = sum_i Q_ip,   d t_i = (sum_{p<i} - sum_{p>i}) (Q_ip + Q_pi) / tau
and P[i, p] = exp(log_r_i + log_c_p - |t_i - t_p| / tau). Z is a matrix product of the library, for some samples at a time:
tensor cores compute all of it faster than scalar products would compute only the columns of the edges.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, check_counts, fresh_like, kernel
from probsym_fast.ops.triton._sort_by_key import group
from probsym_fast.ops.triton.items import Items

PRODUCTS = 2**28  # bytes of Z at a time
PROGRAMS = 1024  # wanted at a time; with fewer samples, each graph's items are split


@kernel({"num_warps": 4})
def _reduce_rows(
    p_begin, p_entry, p_items, p_ptr, p_rank, p_places, p_slots, p_values, p_z, p_t, p_log_r, p_log_c, p_out,
    first, samples, M, S, N, places, grid, patch, Q, C, splits, scale, by_tau,
    AXES: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out[split, sample, (t, log_r, log_c), place] for one sample and one part of its graph's items."""
    i_z, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_sample = first + i_z
    i_graph = (first + tl.program_id(0)) // S
    b_node = tl.load(p_ptr + i_graph)
    b_nodes = tl.load(p_ptr + i_graph + 1) - b_node
    o_p = tl.arange(0, BLOCK_P)
    b_slot = tl.load(p_slots + o_p, mask=o_p < places, other=-1)
    m_p = (b_slot >= 0) & (b_slot < b_nodes)
    b_t = tl.load(p_t + i_sample * N + b_slot, mask=m_p, other=0).to(tl.float32)
    b_log_c = tl.load(p_log_c + i_sample * N + b_slot, mask=m_p, other=0).to(tl.float32)
    b_cell, b_within = o_p // patch, o_p % patch
    b_offsets, b_tokens = patch, grid
    if AXES == 2:
        b_offsets, b_tokens = patch * patch, grid * grid
    p_sample = p_z + i_z * b_tokens * b_offsets * C
    b_d_t = tl.zeros((BLOCK_P,), tl.float32)
    b_d_r = tl.zeros((BLOCK_P,), tl.float32)
    b_d_c = tl.zeros((BLOCK_P,), tl.float32)
    b_first = tl.load(p_begin + i_graph)
    b_last = tl.load(p_begin + i_graph + 1)
    b_part = (b_last - b_first + splits - 1) // splits
    b_first += i_split * b_part
    b_last = tl.minimum(b_last, b_first + b_part)
    for k in range(b_first, b_last):
        b_item = tl.load(p_entry + k).to(tl.int64)
        for axis in tl.static_range(AXES):
            b_row = tl.load(p_rank + i_sample * N + tl.load(p_items + axis * M + b_item) - b_node)
            b_fixed = b_row
            if AXES == 2:
                b_fixed = tl.load(p_rank + i_sample * N + tl.load(p_items + (1 - axis) * M + b_item) - b_node)
            b_inside = (
                (b_row >= 0) & (b_row < N) & (b_fixed >= 0) & (b_fixed < N)
            )  # otherwise the item has no entry in this sample
            b_row, b_fixed = tl.where(b_inside, b_row, 0), tl.where(b_inside, b_fixed, 0)
            m_item = m_p & (o_p < tl.where(b_inside, places, 0))
            b_g = tl.zeros((BLOCK_P,), tl.float32)
            if AXES == 1:
                for c in range(C):
                    b_value = tl.load(p_values + b_item * C + c).to(tl.float32)
                    p_from = p_sample + (b_cell * b_offsets + b_within) * C + c
                    b_g += b_value * tl.load(p_from, mask=m_item, other=0).to(tl.float32)
            else:
                for copy in range(Q):
                    b_place = tl.load(p_places + b_fixed * Q + copy)
                    m_z = m_item & (o_p < tl.where(b_place >= 0, places, 0))
                    if axis == 0:  # the moving place is the row
                        b_from = (b_cell * grid + b_place // patch) * b_offsets + b_within * patch + b_place % patch
                    else:
                        b_from = (b_place // patch * grid + b_cell) * b_offsets + b_place % patch * patch + b_within
                    for c in range(C):
                        b_value = tl.load(p_values + b_item * C + c).to(tl.float32)
                        if b_value != 0:
                            b_z = tl.load(p_sample + b_from.to(tl.int64) * C + c, mask=m_z, other=0)
                            b_g += b_value * b_z.to(tl.float32)
            b_t_row = tl.load(p_t + i_sample * N + b_row).to(tl.float32)
            b_r_row = tl.load(p_log_r + i_sample * N + b_row).to(tl.float32)
            b_sign = (b_slot < b_row).to(tl.float32) - (b_slot > b_row).to(tl.float32)
            b_log_p = b_r_row + b_log_c - b_sign * (b_t - b_t_row) * by_tau
            b_q = tl.where(m_item, b_g * tl.exp(b_log_p), 0.0)
            b_pull = b_sign * b_q * by_tau
            m_row = o_p == tl.load(p_places + b_row * Q)  # the row's sums go to the first place of its slot
            b_d_r += tl.where(m_row, tl.sum(b_q, 0), 0.0)
            b_d_t += tl.where(m_row, tl.sum(b_pull, 0), 0.0) - b_pull
            b_d_c += b_q
    o_out = ((i_split.to(tl.int64) * samples + i_sample) * 3) * places + o_p
    tl.store(p_out + o_out, scale * b_d_t, mask=o_p < places)
    tl.store(p_out + o_out + places, scale * b_d_r, mask=o_p < places)
    tl.store(p_out + o_out + 2 * places, scale * b_d_c, mask=o_p < places)


@kernel({"num_warps": 4})
def _add_places(p_parts, p_places, p_t, p_log_r, p_log_c, samples, N, places, Q, splits, BLOCK_N: tl.constexpr):
    """The three gradients of a block of slots: the sums over their places and all parts."""
    i_sample = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_d_t = tl.zeros((BLOCK_N,), tl.float32)
    b_d_r = tl.zeros((BLOCK_N,), tl.float32)
    b_d_c = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(splits * Q):
        b_place = tl.load(p_places + o_n * Q + k % Q, mask=m_n, other=-1)
        p_part = p_parts + (((k // Q) * samples + i_sample) * 3) * places + b_place
        m_place = b_place >= 0
        b_d_t += tl.load(p_part, mask=m_place, other=0)
        b_d_r += tl.load(p_part + places, mask=m_place, other=0)
        b_d_c += tl.load(p_part + 2 * places, mask=m_place, other=0)
    o_out = i_sample * N + o_n
    tl.store(p_t + o_out, b_d_t.to(p_t.dtype.element_ty), mask=m_n)
    tl.store(p_log_r + o_out, b_d_r.to(p_log_r.dtype.element_ty), mask=m_n)
    tl.store(p_log_c + o_out, b_d_c.to(p_log_c.dtype.element_ty), mask=m_n)


def permutation_gradient(
    x: Items,
    values: Tensor,
    scale: float,
    tokens: Tensor,
    W: Tensor,
    t: Tensor,
    log_r: Tensor,
    log_c: Tensor,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_t, d_log_r, d_log_c (B, S, N) of scale sum value_c <tokens[token], W[offset, c]>."""
    t, log_r, log_c, values = (y.contiguous() for y in (t, log_r, log_c, values))
    d_t, d_log_r, d_log_c = (fresh_like(y) for y in (t, log_r, log_c))
    samples, (offsets, C, D), places = x.B * x.S, W.shape, x.slots.shape[0]
    check_counts(**{"places" if x.axes == 1 else "pairs_of_places": places**x.axes})
    if not samples:
        return d_t, d_log_r, d_log_c
    key = x.token.view(x.S, x.M, x.copies)[0, :, 0] // (x.S * x.L)  # the graph of each item, B if it has none
    begin, entry = group(key.contiguous(), x.B)
    width = offsets * C
    chunk = max(1, min(samples, PRODUCTS // (4 * x.L * width)))
    splits = max(1, min(16, PROGRAMS // chunk, x.M // x.B))
    parts = torch.empty(splits, samples, 3, places, dtype=torch.float32, device=t.device)
    flat, rows = tokens.reshape(samples, x.L, D), W.view(width, D)
    for first in range(0, samples, chunk):
        count = min(chunk, samples - first)
        z = product(flat[first : first + count].flatten(0, 1), rows)

        def grid(settings, count=count):
            return count, splits

        _reduce_rows(
            grid, begin, entry, x.items, x.ptr, x.rank, x.places, x.slots, values, z, t, log_r, log_c, parts, first,
            samples, x.M, x.S, x.N, places, x.grid, x.patch, x.Q, C, splits, float(scale), 1.0 / tau,
            sizes=(samples, places, C, x.M // x.B), AXES=x.axes, BLOCK_P=bucket(places),
        )  # fmt: skip
    block = min(256, bucket(x.N))

    def slots(settings):
        return samples, cdiv(x.N, block)

    _add_places(slots, parts, x.places, d_t, d_log_r, d_log_c, samples, x.N, places, x.Q, splits, BLOCK_N=block)
    return d_t, d_log_r, d_log_c


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T in float32, by the library."""
    with torch.autocast(a.device.type, enabled=False):
        if a.device.type == "cuda" and a.dtype != torch.float32:
            return torch.mm(a, b.t(), out_dtype=torch.float32)
        return torch.mm(a.float(), b.float().t())

"""The gradient from items on patches to the soft permutation, formed row by row and reduced against P at once.

L = scale sum value_c <tokens[token], W[offset, c]> over all entries; G = dL/dP has, for an item (u, v) in slots (i, j),
    G[i, p] += sum_c value_c Z_c[p, j],   G[j, p] += sum_c value_c Z_c[i, p],   Z_c[p, q] = <tokens[token], W[offset, c]>
at the token and offset of the places p and q (a node: G[i, p] += sum_c value_c Z_c[p]). With Q = G o P,
    d log_r_i = sum_p Q_ip,   d log_c_p = sum_i Q_ip,   d t_i = (sum_{p<i} - sum_{p>i}) (Q_ip + Q_pi) / tau
and P[i, p] = exp(log_r_i + log_c_p - |t_i - t_p| / tau).
Z is a matrix product of the used tokens, for some samples at a time: tensor cores compute all of it faster than scalar
products would compute only the columns of the edges. Of 151 nodes in 444 slots, 25 tokens of 196 are used: at width 768 and
C = 8 these are 0.3 GFLOP and 0.8 MB a sample, of 2.5 and 6.4. The rows of Z are (channel, offset): neighbouring places q
are neighbours in memory. An end (axis, item, channel) of a value that is not zero is one term of the row of its node. A
node's ends are listed once for all samples, and their other sides are looked up once for all places p.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, check_counts, fresh_like, kernel
from probsym_fast.ops.triton._sort_by_key import group
from probsym_fast.ops.triton.graphs import graph_of
from probsym_fast.ops.triton.items import Items
from probsym_fast.ops.triton.products import BYTES, multiply
from probsym_fast.ops.triton.used_tokens import UsedTokens, rows_before

PRODUCTS = BYTES
PLACES = 128  # that a program takes
BLOCK = 256
PARTS = 32  # most programs a sample and block of places: each writes the sums of its places


@kernel({"num_warps": 4})
def _find_ends(
    p_items, p_ptr, p_values, p_key, ends, M, N, C, graphs, STEPS, AXES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """key[axis, item, channel]: graph N + the node of that end; -1 if the value is zero or the item has no entries."""
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_item, b_axis = (o_x // C % M).to(tl.int64), o_x // C // M
    b_value = tl.load(p_values + b_item * C + o_x % C, mask=o_x < ends, other=0)
    b_node = tl.load(p_items + b_axis * M + b_item, mask=o_x < ends, other=-1)
    m_x = (b_value != 0) & (b_node >= 0) & (b_node < tl.load(p_ptr + graphs))
    b_node = tl.where(m_x, b_node, 0)
    b_graph = tl.minimum(graph_of(p_ptr, b_node, graphs, STEPS), graphs - 1)
    b_first = tl.load(p_ptr + b_graph, mask=m_x, other=0)
    b_last = tl.minimum(tl.load(p_ptr + b_graph + 1, mask=m_x, other=0), b_first + N)
    m_x = m_x & (b_node >= b_first) & (b_node < b_last)
    if AXES == 2:
        b_other = tl.load(p_items + (1 - b_axis) * M + b_item, mask=m_x, other=-1)
        m_x = m_x & (b_other >= b_first) & (b_other < b_last)
    tl.store(p_key + o_x, tl.where(m_x, b_graph * N + b_node - b_first, -1).to(tl.int32), mask=o_x < ends)


@kernel({"num_warps": 4})
def _place_ends(
    p_begin, p_end, p_key, p_items, p_ptr, p_rank, p_places, p_cells, p_values, p_at, p_value,
    ends, M, S, N, C, graphs, grid, patch, Q, programs, AXES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """at[sample of the graph, copy, end in the lists' order]: 2 x + axis, x = where Z of the end's other side begins.

    x counts from the sample's rows; -1 if that side has no such copy. value: of each end, in that order. `programs` take a
    sample's copy; all are on one axis of the grid, as the others end at 65,535.
    """
    i_line, o_e = tl.program_id(0) // programs, tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    i_sample, i_copy = i_line // Q, i_line % Q
    m_e = o_e < tl.load(p_begin + graphs * N)
    b_end = tl.load(p_end + o_e, mask=m_e, other=0)
    b_item, b_axis, b_c = (b_end // C % M).to(tl.int64), b_end // C // M, b_end % C
    if i_line == 0:
        b_value = tl.load(p_values + b_item * C + b_c, mask=m_e, other=0)
        tl.store(p_value + o_e, b_value.to(tl.float32), mask=m_e)
    b_at = b_c * patch
    if AXES == 2:
        b_area = patch * patch
        b_graph = (tl.load(p_key + b_end, mask=m_e, other=0) // N).to(tl.int64)
        b_other = tl.load(p_items + (1 - b_axis) * M + b_item, mask=m_e, other=0)
        b_other -= tl.load(p_ptr + b_graph, mask=m_e, other=0)
        b_slot = tl.load(p_rank + (b_graph * S + i_sample) * N + b_other, mask=m_e, other=-1)
        b_nodes = tl.load(p_ptr + b_graph + 1, mask=m_e, other=0) - tl.load(p_ptr + b_graph, mask=m_e, other=0)
        m_slot = (b_slot >= 0) & (b_slot < tl.minimum(b_nodes, N))
        b_q = tl.load(p_places + b_slot * Q + i_copy, mask=m_slot, other=-1)
        p_cell = p_cells + b_graph * (grid + 1)
        b_cell = tl.load(p_cell + b_q // patch, mask=b_q >= 0, other=0) * b_area * C
        b_line = b_cell * tl.load(p_cell + grid, mask=m_e, other=0) + b_q % patch * patch
        b_at = tl.where(b_q >= 0, b_c * b_area + tl.where(b_axis == 0, b_cell + b_q % patch, b_line), -1)
    tl.store(p_at + i_line * ends + o_e, tl.where(b_at >= 0, 2 * b_at + b_axis, -1), mask=m_e)


@kernel(
    {"BLOCK_R": 2, "BLOCK_K": 4, "num_warps": 4},
    {"BLOCK_R": 4, "BLOCK_K": 2, "num_warps": 4},
    {"BLOCK_R": 4, "BLOCK_K": 4, "num_warps": 8},
    {"BLOCK_R": 2, "BLOCK_K": 2, "num_warps": 4},
)
def _reduce_rows(
    p_begin, p_at, p_value, p_ptr, p_order, p_slots, p_cells, p_before, p_z, p_t, p_log_r, p_log_c, p_rows, p_columns,
    first, samples, ends, S, N, C, places, graphs, grid, patch, Q, parts, scale, by_tau,
    AXES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Every parts-th block of BLOCK_R rows of G of a sample, for a block of places.

    rows[block of places, (t, log_r), sample, slot]: sums of the row; columns[part, (t, log_c), sample, place]: sums over the
    rows. Several rows at a time, since each waits for a chain of loads: node, ends, their numbers in Z, Z.
    """
    i_sample, i_part = first + tl.program_id(0) // parts, tl.program_id(0) % parts
    i_graph, i_at = i_sample // S, i_sample.to(tl.int64) * N
    b_node = tl.load(p_ptr + i_graph)
    b_nodes = tl.minimum(tl.maximum(tl.load(p_ptr + i_graph + 1) - b_node, 0), N).to(tl.int32)
    p_cell = p_cells + i_graph.to(tl.int64) * (grid + 1)
    b_area = patch
    if AXES == 2:
        b_area = patch * patch
    b_before = rows_before(p_before, i_sample, S, graphs) - rows_before(p_before, first, S, graphs)
    p_sample = p_z + b_before.to(tl.int64) * b_area * C
    p_list = p_at + i_sample % S * Q * ends
    o_k, o_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    o_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    b_slot = tl.load(p_slots + o_p, mask=o_p < places, other=-1).to(tl.int32)
    m_p = (b_slot >= 0) & (b_slot < b_nodes)
    b_t = tl.load(p_t + i_at + b_slot, mask=m_p, other=0).to(tl.float32)
    b_log_c = tl.load(p_log_c + i_at + b_slot, mask=m_p, other=0).to(tl.float32)
    b_column = tl.load(p_cell + o_p // patch, mask=m_p, other=0) * b_area * C
    b_row = b_column + o_p % patch  # where Z begins if p is the row, and if it is the column
    if AXES == 2:
        b_row = b_column * tl.load(p_cell + grid) + o_p % patch * patch
    b_column += o_p % patch
    b_d_t = tl.zeros((BLOCK_P,), tl.float32)
    b_d_c = tl.zeros((BLOCK_P,), tl.float32)
    b_rows = tl.where(tl.max(m_p.to(tl.int32), 0) > 0, b_nodes, 0)
    for i in range(i_part * BLOCK_R, b_rows, parts * BLOCK_R):
        b_i = i + o_r
        m_i = b_i < b_nodes
        b_u = tl.load(p_order + i_at + b_i, mask=m_i, other=-1)
        m_u = (b_u >= 0) & (b_u < b_nodes)
        p_first = p_begin + i_graph.to(tl.int64) * N + b_u
        b_first, b_last = tl.load(p_first, mask=m_u, other=0), tl.load(p_first + 1, mask=m_u, other=0)
        b_t_i = tl.load(p_t + i_at + b_i, mask=m_i, other=0).to(tl.float32)
        b_r_i = tl.load(p_log_r + i_at + b_i, mask=m_i, other=0).to(tl.float32)
        b_g = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
        for k in range(0, tl.max(b_last - b_first, 0), BLOCK_K):
            b_end = b_first[:, None] + (k + o_k)[None, :]
            m_end = b_end < b_last[:, None]
            b_value = tl.load(p_value + b_end, mask=m_end, other=0)
            for copy in range(Q):
                b_at = tl.load(p_list + copy * ends + b_end, mask=m_end, other=-1)[:, :, None]
                b_from = tl.where(b_at % 2 == 0, b_row[None, None, :], b_column[None, None, :]) + b_at // 2
                b_z = tl.load(p_sample + b_from, mask=(b_at >= 0) & m_p[None, None, :], other=0)
                b_g += tl.sum(b_value[:, :, None] * b_z, 1)
        b_sign = (b_slot[None, :] < b_i[:, None]).to(tl.float32) - (b_slot[None, :] > b_i[:, None]).to(tl.float32)
        b_log_p = b_r_i[:, None] + b_log_c[None, :] - b_sign * (b_t[None, :] - b_t_i[:, None]) * by_tau
        b_q = tl.where(m_i[:, None] & m_p[None, :], scale * b_g * tl.exp(b_log_p), 0.0)
        b_pull = b_sign * b_q * by_tau
        p_row = p_rows + (2 * tl.program_id(1) * samples + i_sample.to(tl.int64)) * N + b_i
        tl.store(p_row, tl.sum(b_pull, 1), mask=m_i)
        tl.store(p_row + samples.to(tl.int64) * N, tl.sum(b_q, 1), mask=m_i)
        b_d_t -= tl.sum(b_pull, 0)
        b_d_c += tl.sum(b_q, 0)
    p_part = p_columns + (i_part.to(tl.int64) * 2 * samples + i_sample) * places + o_p
    tl.store(p_part, b_d_t, mask=o_p < places)
    tl.store(p_part + samples.to(tl.int64) * places, b_d_c, mask=o_p < places)


@kernel({"num_warps": 4})
def _add_places(
    p_rows, p_columns, p_places, p_ptr, p_t, p_log_r, p_log_c, samples, S, N, places, Q, blocks, parts,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The three gradients of a block of slots: the sums over blocks of places, places of a slot and parts."""
    i_sample = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_nodes = tl.load(p_ptr + i_sample // S + 1) - tl.load(p_ptr + i_sample // S)
    m_n = (o_n < b_nodes) & (o_n < N)
    b_d_t = tl.zeros((BLOCK_N,), tl.float32)
    b_d_r = tl.zeros((BLOCK_N,), tl.float32)
    b_d_c = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(blocks):
        p_row = p_rows + (2 * k * samples + i_sample) * N + o_n
        b_d_t += tl.load(p_row, mask=m_n, other=0)
        b_d_r += tl.load(p_row + samples.to(tl.int64) * N, mask=m_n, other=0)
    for copy in range(Q):
        b_place = tl.load(p_places + o_n * Q + copy, mask=m_n, other=-1)
        m_place = b_place >= 0
        for part in range(parts):
            p_part = p_columns + (2 * part * samples + i_sample) * places + b_place
            b_d_t += tl.load(p_part, mask=m_place, other=0)
            b_d_c += tl.load(p_part + samples.to(tl.int64) * places, mask=m_place, other=0)
    o_out = i_sample * N + o_n
    tl.store(p_t + o_out, b_d_t.to(p_t.dtype.element_ty), mask=o_n < N)
    tl.store(p_log_r + o_out, b_d_r.to(p_log_r.dtype.element_ty), mask=o_n < N)
    tl.store(p_log_c + o_out, b_d_c.to(p_log_c.dtype.element_ty), mask=o_n < N)


def permutation_gradient(
    x: Items,
    values: Tensor,
    scale: float,
    tokens: Tensor,
    W: Tensor,
    order: Tensor,
    t: Tensor,
    log_r: Tensor,
    log_c: Tensor,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_t, d_log_r, d_log_c (B, S, N) of scale sum value_c <tokens[token], W[offset, c]>."""
    order, t, log_r, log_c, values = (y.contiguous() for y in (order, t, log_r, log_c, values))
    d_t, d_log_r, d_log_c = (fresh_like(y) for y in (t, log_r, log_c))
    samples, (offsets, C, D), places = x.B * x.S, W.shape, x.slots.shape[0]
    ends, copies = x.axes * x.M * C, x.Q if x.axes == 2 else 1
    if not samples:
        return d_t, d_log_r, d_log_c
    check_counts(
        ends_of_a_graph_s_samples=x.S * copies * ends, nodes=x.B * x.N, numbers_of_a_sample=2 * x.L * offsets * C
    )
    key, at = (torch.empty(size, dtype=torch.int32, device=t.device) for size in (ends, (x.S * copies, ends)))
    value = torch.empty(ends, dtype=torch.float32, device=t.device)
    count = cdiv(ends, BLOCK)
    _find_ends(
        lambda settings: (count,), x.items, x.ptr, values, key, ends, x.M, x.N, C, x.B, x.steps, AXES=x.axes, BLOCK=BLOCK
    )  # fmt: skip
    begin, end = group(key, x.B * x.N)
    used = UsedTokens(x.slots, x.ptr.diff(), x.S, x.N, x.grid, x.axes)
    _place_ends(
        lambda settings: (count * x.S * copies,), begin, end, key, x.items, x.ptr, x.rank, x.places, used.cells, values,
        at, value, ends, x.M, x.S, x.N, C, x.B, x.grid, x.patch, copies, count, AXES=x.axes,
        BLOCK=BLOCK,
    )  # fmt: skip
    parts, block = min(PARTS, cdiv(x.N, 2)), min(PLACES, bucket(places))
    blocks = cdiv(places, block)
    rows = torch.zeros(blocks, 2, samples, x.N, dtype=torch.float32, device=t.device)
    columns = torch.empty(parts, 2, samples, places, dtype=torch.float32, device=t.device)
    weight, flat = W.transpose(0, 1).reshape(C * offsets, D).t(), tokens.reshape(-1, D)
    if weight.dtype == torch.float32:  # products without tensor cores want the columns next to each other
        weight = weight.contiguous()
    step = max(1, min(samples, PRODUCTS // (4 * x.L * C * offsets)))
    z = torch.empty(step * x.L, C * offsets, dtype=torch.float32, device=t.device)
    for first in range(0, samples, step):
        last = min(samples, first + step)
        multiply(used, first, last, flat, weight, None, z, compact=False)
        _reduce_rows(
            lambda settings, some=last - first: (some * parts, blocks), begin, at, value, x.ptr, order, x.slots, used.cells,
            used.before, z, t, log_r, log_c, rows, columns, first, samples, ends, x.S, x.N, C, places, x.B, x.grid, x.patch,
            copies, parts, float(scale), 1.0 / tau, sizes=(x.N, ends // max(1, x.B * x.N)), AXES=x.axes, BLOCK_P=block,
        )  # fmt: skip
    narrow = min(256, bucket(x.N))
    _add_places(
        lambda settings: (samples, cdiv(x.N, narrow)), rows, columns, x.places, x.ptr, d_t, d_log_r, d_log_c, samples,
        x.S, x.N, places, x.Q, blocks, parts, BLOCK_N=narrow,
    )  # fmt: skip
    return d_t, d_log_r, d_log_c

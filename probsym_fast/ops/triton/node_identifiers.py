"""node_identifiers: features[u, s] = weight[rank_s[u]], and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import (
    cdiv,
    check_axes,
    check_counts,
    check_tensors,
    kernel,
    precision,
    width_block,
)
from probsym_fast.ops.triton.soft_tiles import SoftTiles, reduce_tile

SPLIT, PARTS = 512, 1024  # weight gradient: samples per program, and the most parts
LEAST_TILE = 2048  # of the configurations of `_rows_of_nodes`


@triton.jit
def within(b_begin, b_end, nodes, N):
    """A graph's first node and number of nodes, at most N and within `nodes`, whatever ptr holds."""
    b_first = tl.maximum(b_begin, 0)
    return b_first, tl.minimum(tl.minimum(b_end, nodes) - b_first, N)


@kernel({"TILE": 8192, "num_warps": 4, "maxnreg": 168}, {"TILE": 4096, "num_warps": 4}, {"TILE": 2048, "num_warps": 4})
def _rows_of_nodes(
    p_ptr, p_rank, p_weight, p_out, nodes, S, N, D, graphs, TILE: tl.constexpr, NARROW: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """features[u, s] for a block of rows (u, s) of a graph, so that nothing searches for the graph; 0 for nodes of none.

    Each graph has the programs of one of N nodes. Ranks are read beside ptr: only their rows of the weight wait for them.
    """
    BLOCK_R: tl.constexpr = TILE // NARROW // BLOCK_D
    columns, lines = tl.cdiv(D, BLOCK_D), tl.cdiv(N * S, BLOCK_R)
    i_graph, i_block = tl.program_id(0) // (columns * lines), tl.program_id(0) % (columns * lines)
    o_r, o_d = tl.arange(0, BLOCK_R), (i_block % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_row = (i_block // columns) * BLOCK_R + o_r
    b_local, b_sample = o_row // S, o_row % S
    b_slot = tl.load(p_rank + (i_graph.to(tl.int64) * S + b_sample) * N + b_local, mask=o_row < N * S, other=-1)
    begin, end = tl.load(p_ptr + i_graph), tl.load(p_ptr + i_graph + 1)
    first, count = within(begin, end, nodes, N)
    count = tl.maximum(count, 0)
    m_d, m_slot = (o_d < D)[None, :], (o_row < count * S) & (begin >= 0) & (b_slot >= 0) & (b_slot < N)
    b_slot = tl.where(m_slot, b_slot, -1).to(tl.int32)
    p_w = p_weight + (b_slot.to(tl.int64) * D)[:, None] + o_d[None, :]
    b_w = tl.load(p_w, mask=(b_slot >= 0)[:, None] & m_d, other=0)
    p_row = p_out + first * S * D + (o_row.to(tl.int64) * D)[:, None] + o_d[None, :]
    tl.store(p_row, b_w, mask=(o_row < count * S)[:, None] & m_d)
    if i_block < columns:  # nodes before and after all graphs, or beyond N
        clear = tl.where(i_graph == 0, 0, tl.minimum(tl.maximum(end, 0), first + N))
        stop = tl.where(i_graph == graphs - 1, nodes, tl.minimum(end, nodes)) * S
        for row in range(clear * S, stop, BLOCK_R):
            m_r = (row + o_r < stop) & ((row + o_r < first * S) | (row + o_r >= (first + count) * S))
            p_row = p_out + (row + o_r)[:, None] * D + o_d[None, :]
            tl.store(p_row, tl.zeros((BLOCK_R, BLOCK_D), p_out.dtype.element_ty), mask=m_r[:, None] & m_d)


@kernel({"BLOCK_E": 8, "num_warps": 4}, {"BLOCK_E": 16, "num_warps": 8})
def _sum_of_samples(
    p_ptr, p_order, p_d, p_out, nodes, samples, part, S, N, D, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[part, j] = the sum of d_features of the nodes in slot j over one part of the samples."""
    i_slot, i_split = tl.program_id(0), tl.program_id(2)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_e = tl.arange(0, BLOCK_E)
    b_sum = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for k in range(0, part, BLOCK_E):
        o_s = i_split * part + k + o_e
        m_s = (k + o_e < part) & (o_s < samples)
        b_begin = tl.load(p_ptr + o_s // S, mask=m_s, other=0)
        b_first, b_nodes = within(b_begin, tl.load(p_ptr + o_s // S + 1, mask=m_s, other=0), nodes, N)
        b_node = tl.load(p_order + o_s.to(tl.int64) * N + i_slot, mask=m_s, other=-1)
        m_d = (m_s & (b_node >= 0) & (b_node < b_nodes))[:, None] & (o_d < D)[None, :]
        b_row = (b_first + b_node) * S + o_s % S
        b_sum += tl.load(p_d + b_row[:, None] * D + o_d[None, :], mask=m_d, other=0).to(tl.float32)
    p_part = p_out + (i_split.to(tl.int64) * N + i_slot) * D
    tl.store(p_part + o_d, tl.sum(b_sum, 0).to(p_out.dtype.element_ty), mask=o_d < D)


@kernel(
    {"BLOCK_J": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2, "maxnreg": 255},
    {"BLOCK_J": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 255},
    ieee=({"BLOCK_J": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1, "maxnreg": 255},),
)
def _reduce_identifiers(
    p_ptr, p_order, p_d, p_weight, p_soft, p_rows, p_columns, nodes, S, N, D, blocks, plane, by_tau,
    PRECISION: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G[i, j] = <d_features of the node in slot i, weight[j]>, BLOCK_I rows of a sample."""
    i_sample, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    i_graph = i_sample // S
    b_first, b_nodes = within(tl.load(p_ptr + i_graph), tl.load(p_ptr + i_graph + 1), nodes, N)
    o_i = i_block * BLOCK_I + tl.arange(0, BLOCK_I)
    b_node = tl.load(p_order + i_sample * N + o_i, mask=o_i < b_nodes, other=-1)
    m_i = (b_node >= 0) & (b_node < b_nodes)
    b_row = ((b_first + b_node) * S + i_sample % S) * D
    p_part = p_columns + 2 * i_block.to(tl.int64) * plane + i_sample * N
    b_d_t = tl.zeros((BLOCK_I,), tl.float32)
    b_d_r = tl.zeros((BLOCK_I,), tl.float32)
    for j in range(0, N, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        b_g = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
        for k in range(0, tl.where((i_block * BLOCK_I < b_nodes) & (j < b_nodes), D, 0), BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            m_k = o_k < D
            b_d = tl.load(p_d + b_row[:, None] + o_k[None, :], mask=m_i[:, None] & m_k[None, :], other=0)
            p_w = p_weight + o_j.to(tl.int64)[None, :] * D + o_k[:, None]
            b_w = tl.load(p_w, mask=m_k[:, None] & (o_j < b_nodes)[None, :], other=0)
            b_g = tl.dot(b_d, b_w, b_g, input_precision=PRECISION)
        b_pull, b_q = reduce_tile(b_g, o_i, o_j, b_nodes, N, p_soft + i_sample * N, p_part, plane, by_tau)
        b_d_t += b_pull
        b_d_r += b_q
    tl.store(p_rows + i_sample * N + o_i, b_d_t, mask=o_i < N)
    tl.store(p_rows + plane + i_sample * N + o_i, b_d_r, mask=o_i < N)


def _check(ptr, rank, order, t, log_r, log_c, weight, nodes, **d_features) -> None:
    (B, S, N), (_, D) = check_axes("rank", rank, 3), check_axes("weight", weight, 2)
    slots = (B, S, N)
    check_tensors(
        rank.device, ptr=(ptr, (B + 1,)), order=(order, slots), t=(t, slots), log_r=(log_r, slots), log_c=(log_c, slots),
        weight=(weight, (N, D)), **{name: (x, (nodes, S, D)) for name, x in d_features.items()},
    )  # fmt: skip


def forward(ptr, rank, order, t, log_r, log_c, tau, weight, nodes) -> Tensor:
    _check(ptr, rank, order, t, log_r, log_c, weight, nodes)
    ptr, rank, weight = (x.contiguous() for x in (ptr, rank, weight))
    (B, S, N), D = rank.shape, weight.shape[1]
    out, block = torch.empty(nodes, S, D, dtype=weight.dtype, device=weight.device), width_block(D, 512)
    if not B:
        return out.zero_()

    def grid(settings):
        return (B * cdiv(N * S, settings["TILE"] // narrow // block) * cdiv(D, block),)

    narrow = 1 if D % 16 == 0 else 4  # without wide loads a thread holds more addresses
    check_counts(programs=grid({"TILE": LEAST_TILE})[0], rows_of_a_graph_s_samples=N * S)
    _rows_of_nodes(grid, ptr, rank, weight, out, nodes, S, N, D, B, sizes=(B * N * S, D), NARROW=narrow, BLOCK_D=block)
    return out


def backward(
    d_features, ptr, rank, order, t, log_r, log_c, tau, weight, needs_t, needs_weight
) -> tuple[Tensor | None, ...]:
    nodes = check_axes("d_features", d_features, 3)[0]
    _check(ptr, rank, order, t, log_r, log_c, weight, nodes, d_features=d_features)
    d_features, ptr, order, weight = (x.contiguous() for x in (d_features, ptr, order, weight))
    d_soft = _permutation_gradient(d_features, ptr, order, t, log_r, log_c, tau, weight) if needs_t else (None,) * 3
    return *d_soft, _weight_gradient(d_features, ptr, order, weight) if needs_weight else None


def _weight_gradient(d_features: Tensor, ptr: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    (B, S, N), D = order.shape, weight.shape[1]
    if not B * S:
        return torch.zeros_like(weight)
    samples, nodes, block = B * S, d_features.shape[0], width_block(D, 256)
    splits = min(PARTS, cdiv(samples, SPLIT))
    part = cdiv(samples, splits)
    dtype = weight.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, N, D, dtype=dtype, device=weight.device)

    def grid(settings):
        return N, cdiv(D, block), splits

    _sum_of_samples(
        grid, ptr, order, d_features, out, nodes, samples, part, S, N, D, sizes=(samples, N, D), BLOCK_D=block
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(weight.dtype)


def _permutation_gradient(d_features, ptr, order, t, log_r, log_c, tau, weight) -> tuple[Tensor, Tensor, Tensor]:
    (B, S, N), D = order.shape, weight.shape[1]
    tiles = SoftTiles(t, log_r, log_c)

    def grid(settings):
        return (B * S * tiles.blocks,)

    _reduce_identifiers(
        grid, ptr, order, d_features, weight, tiles.soft, tiles.rows, tiles.columns, d_features.shape[0], S, N, D,
        tiles.blocks, tiles.plane, 1.0 / tau, sizes=(B * S, N, D), PRECISION=precision(weight.dtype), BLOCK_I=tiles.block,
    )  # fmt: skip
    return tiles.gradients()

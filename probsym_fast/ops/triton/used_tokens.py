"""The tokens that hold a place of a valid slot, listed without asking the GPU for their number.

A cell of the padded axis is used if one of its places has a slot below the graph's number of nodes. A token is used if its
cells are. Used tokens are rows: ordered by sample, then by token. Programs find a sample's rows from the tables here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, kernel

TILE = 4096  # places, or cells of some graphs or of some rows of tokens, that a program looks at together
PROGRAMS = 1024  # most of them: each counts the tokens of all graphs before its own


@triton.jit
def rows_before(p_before, sample, S, graphs):
    """The number of rows of all samples before this one."""
    graph = sample // S
    before = tl.load(p_before + graph)
    each = tl.load(p_before + tl.minimum(graph + 1, graphs)) - before
    return before * S + sample % S * each


@kernel({"num_warps": 4})
def _list_tokens(
    p_slots, p_counts, p_cells, p_before, p_rows, rounds, part, S, N, grid, patch, graphs, blocks,
    AXES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """cells[graph, cell]: used cells before this one, all of them at the end; before[graph]: used tokens of one sample of the
    graphs before; rows: the used tokens, ascending, then the others.

    A round is a block of rows of a sample's tokens. A program takes the next `part` of them.
    """
    o_g, o_p, o_r = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_R)
    b_low = tl.zeros((BLOCK_G,), tl.int32) + N  # the lowest slot of a cell
    for k in range(0, patch, BLOCK_P):
        m_slot = (o_g < grid)[:, None] & (k + o_p < patch)[None, :]
        b_slot = tl.load(p_slots + o_g[:, None] * patch + (k + o_p)[None, :], mask=m_slot, other=-1)
        b_low = tl.minimum(b_low, tl.min(tl.where((b_slot >= 0) & (b_slot < N), b_slot, N).to(tl.int32), 1))
    b_round = tl.program_id(0) * part
    b_first = b_round // (S * blocks)  # graph
    b_before = tl.zeros((), tl.int32)
    b_every = tl.zeros((), tl.int32)
    for graph in range(0, graphs, BLOCK_B):
        o_b = graph + tl.arange(0, BLOCK_B)
        b_nodes = tl.minimum(tl.load(p_counts + o_b, mask=o_b < graphs, other=0), N)
        b_each = tl.sum((b_low[:, None] < b_nodes[None, :]).to(tl.int32), 0)
        if AXES == 2:
            b_each *= b_each
        b_before += tl.sum(tl.where(o_b < b_first, b_each, 0), 0)
        b_every += tl.sum(b_each, 0)
    for i_round in range(b_round, tl.minimum(b_round + part, rounds)):
        i_sample, i_block = i_round // blocks, i_round % blocks
        i_graph = i_sample // S
        b_used = (b_low < tl.minimum(tl.load(p_counts + i_graph), N)).to(tl.int32)
        b_at, b_count = tl.cumsum(b_used, 0) - b_used, tl.sum(b_used, 0)
        b_each = b_count * b_count if AXES == 2 else b_count
        m_first = i_round % (S * blocks) == 0
        p_line = p_cells + i_graph.to(tl.int64) * (grid + 1)
        tl.store(p_line + o_g, b_at, mask=(o_g < grid) & m_first)
        tl.store(p_line + grid, b_count, mask=m_first)
        tl.store(p_before + i_graph, b_before, mask=m_first)
        b_row = i_block * BLOCK_R + o_r
        b_row_at, b_row_used = o_r * 0, o_r * 0 + 1
        if AXES == 2:
            b_row_at = tl.sum(tl.where(o_g[None, :] < b_row[:, None], b_used[None, :], 0), 1) * b_count
            b_row_used = tl.sum(tl.where(o_g[None, :] == b_row[:, None], b_used[None, :], 0), 1)
        m_used = b_row_used[:, None] * b_used[None, :] > 0
        b_to = b_before * S + i_sample % S * b_each + b_row_at[:, None] + b_row_used[:, None] * b_at[None, :]
        o_t = i_sample * (grid * grid if AXES == 2 else grid) + b_row[:, None] * grid + o_g[None, :]
        m_t = (b_row < (grid if AXES == 2 else 1))[:, None] & (o_g < grid)[None, :]
        tl.store(p_rows + tl.where(m_used, b_to, b_every * S + o_t - b_to), o_t, mask=m_t)
        b_before += tl.where((i_round + 1) % (S * blocks) == 0, b_each, 0)
        tl.store(p_before + graphs, b_before, mask=i_round + 1 == rounds)


class UsedTokens:
    """rows (B S L,): the used tokens, counted over all samples, then the others. All tables are int32.

    cells (B, grid + 1): the used cells before each cell, and their number. before (B + 1,): the used tokens of one sample of
    every graph before: those of the samples before a sample are `rows_before`.
    """

    def __init__(self, slots: Tensor, counts: Tensor, S: int, N: int, grid: int, axes: int):
        """slots (grid patch,); counts (B,) valid nodes, where larger ones act as N."""
        self.B, self.S, self.grid, self.axes, self.L = counts.shape[0], S, grid, axes, grid**axes
        tokens, device = self.B * S * self.L, slots.device
        fresh = torch.empty if tokens else torch.zeros  # of no tokens there is nothing to launch
        self.cells = fresh(self.B, grid + 1, dtype=torch.int32, device=device)
        self.before = fresh(self.B + 1, dtype=torch.int32, device=device)
        self.rows = torch.empty(tokens, dtype=torch.int32, device=device)
        patch, block = slots.shape[0] // grid, bucket(grid)
        block_r = max(1, min(block, TILE // block)) if axes == 2 else 1
        blocks = cdiv(grid, block_r) if axes == 2 else 1
        rounds = self.B * S * blocks
        part = cdiv(rounds, PROGRAMS)
        most = max(1, TILE // block)
        _list_tokens(
            lambda settings: (cdiv(rounds, max(1, part)),), slots, counts, self.cells, self.before, self.rows, rounds, part,
            S, N, grid, patch, self.B, blocks, AXES=axes, BLOCK_B=min(64, most), BLOCK_R=block_r, BLOCK_G=block,
            BLOCK_P=min(bucket(patch), most),
        )  # fmt: skip

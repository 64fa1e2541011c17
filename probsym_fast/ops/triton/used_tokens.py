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

BLOCK = 256
CELLS = 4096  # places looked at together by one program


@triton.jit
def rows_before(p_before, sample, S, graphs):
    """The number of rows of all samples before this one."""
    graph = sample // S
    before = tl.load(p_before + graph)
    each = tl.load(p_before + tl.minimum(graph + 1, graphs)) - before
    return before * S + sample % S * each


@kernel({"num_warps": 4})
def _find_cells(
    p_slots, p_counts, p_cells, p_each, N, grid, patch,
    AXES: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """cells[graph, cell]: used cells before this one, all of them at the end; each[graph]: used tokens of a sample."""
    i_graph = tl.program_id(0).to(tl.int64)
    o_g, o_p = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    b_nodes = tl.minimum(tl.load(p_counts + i_graph), N)
    b_used = tl.zeros((BLOCK_G,), tl.int32)
    for k in range(0, patch, BLOCK_P):
        m_slot = (o_g < grid)[:, None] & (k + o_p < patch)[None, :]
        b_slot = tl.load(p_slots + o_g[:, None] * patch + (k + o_p)[None, :], mask=m_slot, other=-1)
        b_used = tl.maximum(b_used, tl.max(((b_slot >= 0) & (b_slot < b_nodes)).to(tl.int32), 1))
    b_count = tl.sum(b_used, 0)
    p_line = p_cells + i_graph * (grid + 1)
    tl.store(p_line + o_g, tl.cumsum(b_used, 0) - b_used, mask=o_g < grid)
    tl.store(p_line + grid, b_count)
    tl.store(p_each + i_graph, b_count * b_count if AXES == 2 else b_count)


@kernel({"num_warps": 4})
def _list_tokens(p_cells, p_before, p_rows, tokens, S, L, grid, graphs, AXES: tl.constexpr, BLOCK: tl.constexpr):
    """rows: the used tokens, ascending, then the others."""
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < tokens
    b_sample, b_token = tl.where(m_t, o_t // L, 0), o_t % L
    p_line = p_cells + (b_sample // S).to(tl.int64) * (grid + 1)
    b_p = b_token // grid if AXES == 2 else b_token
    b_at = tl.load(p_line + b_p)
    b_used = tl.load(p_line + b_p + 1) > b_at
    if AXES == 2:
        b_column = tl.load(p_line + b_token % grid)
        b_at = b_at * tl.load(p_line + grid) + tl.where(b_used, b_column, 0)
        b_used = b_used & (tl.load(p_line + b_token % grid + 1) > b_column)
    b_at += rows_before(p_before, b_sample, S, graphs)
    b_at = tl.where(b_used, b_at, tl.load(p_before + graphs) * S + o_t - b_at)
    tl.store(p_rows + b_at, o_t, mask=m_t)


class UsedTokens:
    """rows (B S L,): the used tokens, counted over all samples, then the others. All tables are int32.

    cells (B, grid + 1): the used cells before each cell, and their number. before (B + 1,): the used tokens of one sample of
    every graph before: those of the samples before a sample are `rows_before`.
    """

    def __init__(self, slots: Tensor, counts: Tensor, S: int, N: int, grid: int, axes: int):
        """slots (grid patch,); counts (B,) valid nodes, where larger ones act as N."""
        self.B, self.S, self.grid, self.axes, self.L = counts.shape[0], S, grid, axes, grid**axes
        tokens, device = self.B * S * self.L, slots.device
        self.cells = torch.empty(self.B, grid + 1, dtype=torch.int32, device=device)
        each = torch.empty(self.B, dtype=torch.int32, device=device)
        self.before = torch.zeros(self.B + 1, dtype=torch.int32, device=device)
        self.rows = torch.empty(tokens, dtype=torch.int32, device=device)
        patch, block = slots.shape[0] // grid, bucket(grid)
        block_p = max(1, min(bucket(patch), CELLS // block))
        _find_cells(
            lambda settings: (self.B,), slots, counts, self.cells, each, N, grid, patch,
            AXES=axes, BLOCK_G=block, BLOCK_P=block_p,
        )  # fmt: skip
        torch.cumsum(each, 0, dtype=torch.int32, out=self.before[1:])
        _list_tokens(
            lambda settings: (cdiv(tokens, BLOCK),), self.cells, self.before, self.rows, tokens, S, self.L, grid,
            self.B, AXES=axes, BLOCK=BLOCK,
        )  # fmt: skip

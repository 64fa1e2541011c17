"""From the tokens' gradient to those of the matrix and the permutation, through dA' = dL/dA', for some samples at a time.

    dA'[i, j, c] = the sum over the places p of slot i and q of slot j of <d_tokens[token], W[offset, c]>, at the token and
    offset of (p, q);   dA[u, v] = sum_s dA'[rank_s[u], rank_s[v]];   dL/dP = A' dA'^T + A'^T dA', summed over channels
The products with W are those of the used tokens. A' is gathered, and dL/dP is reduced against P on chip.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, kernel, precision
from probsym_fast.ops.triton.items import places_of_slots
from probsym_fast.ops.triton.patches import Patches
from probsym_fast.ops.triton.products import BYTES as PRODUCTS
from probsym_fast.ops.triton.products import multiply
from probsym_fast.ops.triton.soft_tiles import SoftTiles, reduce_tile
from probsym_fast.ops.triton.used_tokens import rows_before


@kernel({"num_warps": 4})
def _gather_slots(
    p_z, p_places, p_counts, p_cells, p_before, p_out, first, S, graphs, N, C, grid, patch, Q, BLOCK: tl.constexpr
):  # fmt: skip
    """out[sample, i, j, c] = dA' of a row of slots, from z[used token, offset, c]; 0 beyond the valid slots."""
    i_z = (tl.program_id(0) // N).to(tl.int64)
    i_row = tl.program_id(0) % N
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_slot, b_c = o_x // C, o_x % C
    b_nodes = tl.minimum(tl.load(p_counts + (first + i_z) // S), N)
    m_x = b_slot < tl.where(i_row < b_nodes, b_nodes, 0)
    p_cell = p_cells + (first + i_z) // S * (grid + 1)
    b_cells = tl.load(p_cell + grid)
    b_before = rows_before(p_before, first + i_z, S, graphs) - rows_before(p_before, first, S, graphs)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for copy in range(Q * Q):
        b_p = tl.load(p_places + i_row * Q + copy // Q)
        b_q = tl.load(p_places + b_slot * Q + copy % Q, mask=m_x, other=-1)
        m_z = tl.minimum(b_p, b_q) >= 0
        b_row = tl.load(p_cell + b_p // patch, mask=b_p >= 0, other=0) * b_cells
        b_row = (b_before + b_row + tl.load(p_cell + b_q // patch, mask=m_z, other=0)).to(tl.int64)
        b_offset = b_p % patch * patch + b_q % patch
        b_sum += tl.load(p_z + (b_row * patch * patch + b_offset) * C + b_c, mask=m_z, other=0)
    tl.store(p_out + (i_z * N + i_row) * N * C + o_x, b_sum, mask=o_x < N * C)


@kernel({"num_warps": 4})  # one configuration: it adds to its output, so it must not be measured
def _add_samples(p_d, p_rank, p_counts, p_out, first, last, S, N, C, BLOCK: tl.constexpr):
    """out[graph, u, v, c] += the sum over the graph's samples first..last - 1; the graph's first sample overwrites."""
    i_graph = first // S + (tl.program_id(0) // N).to(tl.int64)
    i_u = tl.program_id(0) % N
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_v, b_c = o_x // C, o_x % C
    b_nodes = tl.minimum(tl.load(p_counts + i_graph), N)
    b_valid = tl.where(i_u < b_nodes, b_nodes, 0)
    m_x = b_v < b_valid
    p_line = p_out + (i_graph * N + i_u) * N * C + o_x
    b_sum = tl.load(p_line, mask=b_v < tl.where(first > i_graph * S, b_valid, 0), other=0)
    for i_sample in range(tl.maximum(i_graph * S, first), tl.minimum((i_graph + 1) * S, last)):
        b_row = tl.load(p_rank + i_sample * N + i_u)
        b_column = tl.load(p_rank + i_sample * N + b_v, mask=m_x, other=-1)
        m_d = m_x & (tl.minimum(b_row, b_column) >= 0) & (tl.maximum(b_row, b_column) < N)
        b_sum += tl.load(p_d + (((i_sample - first) * N + b_row) * N + b_column) * C + b_c, mask=m_d, other=0)
    tl.store(p_line, b_sum, mask=o_x < N * C)


@kernel(
    {"BLOCK_J": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1, "maxnreg": 255},
    {"BLOCK_J": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 255},
    ieee=({"BLOCK_J": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1, "maxnreg": 255},),
)
def _reduce_matrix(
    p_matrix, p_d, p_order, p_counts, p_soft, p_rows, p_columns, first, S, N, C, blocks, plane, by_tau,
    PRECISION: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G[i, j] = sum over k, c of A'[i, k, c] dA'[j, k, c] + A'[k, i, c] dA'[k, j, c], BLOCK_I rows of a sample."""
    i_z, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    i_sample = first + i_z
    b_nodes = tl.minimum(tl.load(p_counts + i_sample // S), N)
    o_i = i_block * BLOCK_I + tl.arange(0, BLOCK_I)
    b_u = tl.load(p_order + i_sample * N + o_i, mask=o_i < b_nodes, other=-1).to(tl.int32)
    m_i = (b_u >= 0) & (b_u < N)
    p_graph = p_matrix + i_sample // S * N * N * C
    p_sample = p_d + i_z * N * N * C
    p_part = p_columns + 2 * i_block.to(tl.int64) * plane + i_sample * N
    b_d_t = tl.zeros((BLOCK_I,), tl.float32)
    b_d_r = tl.zeros((BLOCK_I,), tl.float32)
    for j in range(0, N, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        m_j = o_j < b_nodes
        b_g = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
        b_width = tl.where((i_block * BLOCK_I < b_nodes) & (j < b_nodes), b_nodes * C, 0)
        for turn in tl.static_range(2):  # A' dA'^T, then A'^T dA'
            row, column = (N * C, C) if turn == 0 else (C, N * C)
            for k in range(0, b_width, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K)
                b_k, b_c = o_k // C, o_k % C
                b_v = tl.load(p_order + i_sample * N + b_k, mask=b_k < b_nodes, other=-1).to(tl.int32)
                m_v = (b_v >= 0) & (b_v < N)
                b_a_at = (b_u * row)[:, None] + (b_v * column + b_c)[None, :]
                b_a = tl.load(p_graph + b_a_at, mask=m_i[:, None] & m_v[None, :], other=0).to(tl.float32)
                b_d_at = (o_j * row)[None, :] + (b_k * column + b_c)[:, None]
                b_d = tl.load(p_sample + b_d_at, mask=m_v[:, None] & m_j[None, :], other=0)
                b_g = tl.dot(b_a, b_d, b_g, input_precision=PRECISION)
        b_pull, b_q = reduce_tile(b_g, o_i, o_j, b_nodes, N, p_soft + i_sample * N, p_part, plane, by_tau)
        b_d_t += b_pull
        b_d_r += b_q
    tl.store(p_rows + i_sample * N + o_i, b_d_t, mask=o_i < N)
    tl.store(p_rows + plane + i_sample * N + o_i, b_d_r, mask=o_i < N)


class MatrixGradient:
    """Loops over the samples of `Patches`, as many as fit at a time: computes dA' and reduces it as needed."""

    def __init__(self, x: Patches, most_places: int):
        self.x, self.most = x, most_places
        self.places = places_of_slots(x.slots, x.N, self.most)
        self.line = x.N * x.C
        self.block = min(256, bucket(self.line))

    def __call__(self, d_tokens: Tensor, W: Tensor, rank: Tensor | None, soft: tuple | None, tau: float):
        """d_matrix if rank is given (in the matrix's dtype), d_t, d_log_r, d_log_c if soft = (t, log_r, log_c) is."""
        x, D = self.x, W.shape[-1]
        d_matrix = torch.zeros(x.matrix.shape, dtype=torch.float32, device=W.device) if rank is not None else None
        tiles = SoftTiles(*soft) if soft is not None else None
        weight, d_rows = W.view(-1, D), d_tokens.view(-1, D)
        step = max(1, min(x.samples, PRODUCTS // (4 * (x.L * weight.shape[0] + x.N * self.line))))
        z = torch.empty(step * x.L, weight.shape[0], dtype=torch.float32, device=W.device)
        for first in range(0, x.samples, step):
            last = min(x.samples, first + step)
            multiply(x.used, first, last, d_rows, weight.t(), None, z, compact=False)
            d_acted = self._acted(z, first, last)
            if d_matrix is not None and rank is not None:
                self._add(d_acted, rank, d_matrix, first, last)
            if tiles is not None:
                self._reduce(d_acted, tiles, tau, first, last)
        d_matrix = None if d_matrix is None else d_matrix.to(x.matrix.dtype)
        return d_matrix, *((None,) * 3 if tiles is None else tiles.gradients())

    def _acted(self, z: Tensor, first: int, last: int) -> Tensor:
        """dA' (samples, N, N, C), float32."""
        x = self.x
        out = torch.empty(last - first, x.N, x.N, x.C, dtype=torch.float32, device=z.device)

        def grid(settings):
            return (last - first) * x.N, cdiv(self.line, self.block)

        tables = self.places, x.counts, x.used.cells, x.used.before
        _gather_slots(grid, z, *tables, out, first, x.S, x.B, x.N, x.C, x.grid, x.patch, self.most, BLOCK=self.block)
        return out

    def _add(self, d_acted: Tensor, rank: Tensor, d_matrix: Tensor, first: int, last: int) -> None:
        x = self.x
        graphs = (last - 1) // x.S - first // x.S + 1

        def grid(settings):
            return graphs * x.N, cdiv(self.line, self.block)

        arguments = d_acted, rank, x.counts, d_matrix, first, last, x.S, x.N, x.C
        _add_samples(grid, *arguments, BLOCK=self.block)

    def _reduce(self, d_acted: Tensor, tiles: SoftTiles, tau: float, first: int, last: int) -> None:
        x = self.x

        def grid(settings):
            return ((last - first) * tiles.blocks,)

        _reduce_matrix(
            grid, x.matrix, d_acted, x.order, x.counts, tiles.soft, tiles.rows, tiles.columns, first, x.S, x.N, x.C,
            tiles.blocks, tiles.plane, 1.0 / tau, sizes=(last - first, x.N, x.C), PRECISION=precision(x.matrix.dtype),
            BLOCK_I=tiles.block,
        )  # fmt: skip

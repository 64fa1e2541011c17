"""From the tokens' gradient to those of the matrix and the permutation, through dA' = dL/dA', for some samples at a time.

    dA'[i, j, c] = the sum over the places p of slot i and q of slot j of <d_tokens[token], W[offset, c]>, at the token and
    offset of (p, q);   dA[u, v] = sum_s dA'[rank_s[u], rank_s[v]];   dL/dP = A' dA'^T + A'^T dA', summed over channels
The products with W are those of the used tokens. A' is gathered, and dL/dP is reduced against P on chip.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import bucket, cdiv, check_counts, kernel, precision
from probsym_fast.ops.triton.entries import places_of_slots
from probsym_fast.ops.triton.patches import Patches
from probsym_fast.ops.triton.products import BYTES as PRODUCTS
from probsym_fast.ops.triton.products import multiply
from probsym_fast.ops.triton.soft_tiles import SoftTiles, reduce_tile
from probsym_fast.ops.triton.used_tokens import rows_before

BLOCK = 256
LINE = 128  # bytes of k and c that a step reads
TILE = 128  # most rows and columns of G at a time


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
        b_sum += tl.load(p_z + (b_row * patch * patch + b_offset) * C + b_c, mask=m_z, other=0).to(tl.float32)
    tl.store(p_out + (i_z * N + i_row) * N * C + o_x, b_sum.to(p_out.dtype.element_ty), mask=o_x < N * C)


@kernel({"num_warps": 4})
def _find_slots(
    p_places, p_counts, p_cells, p_before, p_begin, p_at, samples, total, S, graphs, N, grid, patch, BLOCK: tl.constexpr
):
    """Where z holds dA' if a slot has one place, in items of C numbers: of slots i, j at begin[sample] + at[0, graph, i] +
    at[1, graph, j]. -1: no place."""
    i_graph = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_cell = p_cells + i_graph * (grid + 1)
    b_place = tl.load(p_places + o_n, mask=o_n < tl.minimum(tl.load(p_counts + i_graph), N), other=-1)
    b_cell = tl.load(p_cell + b_place // patch, mask=b_place >= 0, other=0)
    b_row = (b_cell * tl.load(p_cell + grid) * patch + b_place % patch) * patch
    b_column = b_cell * patch * patch + b_place % patch
    p_line = p_at + i_graph * N + o_n
    tl.store(p_line, tl.where(b_place >= 0, b_row, -1), mask=o_n < N)
    tl.store(p_line + total, tl.where(b_place >= 0, b_column, -1), mask=o_n < N)
    o_s = tl.arange(0, BLOCK)
    for s in range(0, tl.where(tl.program_id(1) == 0, S, 0), BLOCK):
        b_sample = i_graph * S + tl.minimum(s + o_s, S - 1)
        b_rows = rows_before(p_before, b_sample, S, graphs).to(tl.int64)
        tl.store(p_begin + b_sample, b_rows * patch * patch, mask=s + o_s < S)


@kernel({"num_warps": 4})  # one configuration: it adds to its output, so it must not be measured
def _add_samples(
    p_d, p_begin, p_at, p_rank, p_counts, p_out, first, last, total, S, N, C, BLOCK: tl.constexpr
):  # fmt: skip
    """out[graph, u, v, c] += the sum over the graph's samples first..last - 1; the graph's first sample overwrites."""
    i_graph = first // S + (tl.program_id(0) // N).to(tl.int64)
    i_u = tl.program_id(0) % N
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_v, b_c = o_x // C, o_x % C
    b_nodes = tl.minimum(tl.load(p_counts + i_graph), N)
    b_valid = tl.where(i_u < b_nodes, b_nodes, 0)
    m_x = b_v < b_valid
    p_line = p_out + (i_graph * N + i_u) * N * C + o_x
    p_slot = p_at + i_graph * N
    b_sum = tl.load(p_line, mask=b_v < tl.where(first > i_graph * S, b_valid, 0), other=0)
    for i_sample in range(tl.maximum(i_graph * S, first), tl.minimum((i_graph + 1) * S, last)):
        b_i = tl.load(p_rank + i_sample * N + i_u)
        b_j = tl.load(p_rank + i_sample * N + b_v, mask=m_x, other=-1)
        b_row = tl.load(p_slot + b_i, mask=(b_i >= 0) & (b_i < N), other=-1)
        b_column = tl.load(p_slot + total + b_j, mask=(b_j >= 0) & (b_j < N), other=-1)
        b_begin = tl.load(p_begin + i_sample) - tl.load(p_begin + first)
        m_d = m_x & (tl.minimum(b_row, b_column) >= 0)
        b_sum += tl.load(p_d + (b_begin + b_row + b_column) * C + b_c, mask=m_d, other=0).to(tl.float32)
    tl.store(p_line, b_sum, mask=o_x < N * C)


@kernel(
    {"num_warps": 8, "num_stages": 3, "maxnreg": 255},
    {"num_warps": 8, "num_stages": 2, "maxnreg": 255},
    tf32x3=({"num_warps": 8, "num_stages": 2, "maxnreg": 255},),
)
def _reduce_matrix(
    p_matrix, p_d, p_begin, p_at, p_order, p_counts, p_soft, p_rows, p_columns, first, S, N, words, blocks, plane, numbers,
    by_tau, PRECISION: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G[i, j] = sum over k, c of A'[i, k, c] dA'[j, k, c] + A'[k, i, c] dA'[k, j, c], a tile of one sample.

    The nodes of A' and the slots of dA' are looked up once for each i, j and k. WORD of a node's C values, C = words WORD,
    are loaded together.
    """
    i_tile = tl.program_id(0) % (blocks * blocks)
    i_sample = first + (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    i_row, i_column = i_tile // blocks, i_tile % blocks
    C = words * WORD
    b_nodes = tl.minimum(tl.load(p_counts + i_sample // S), N)
    o_i, o_j = i_row * BLOCK + tl.arange(0, BLOCK), i_column * BLOCK + tl.arange(0, BLOCK)
    p_node = p_order + i_sample * N
    p_slot = p_at + i_sample // S * N
    b_u = tl.load(p_node + o_i, mask=o_i < b_nodes, other=-1).to(tl.int32)
    m_i = (b_u >= 0) & (b_u < N)
    b_j = tl.load(p_slot + o_j, mask=o_j < b_nodes, other=-1)  # as a row of dA'
    b_j_column = tl.load(p_slot + plane + o_j, mask=o_j < b_nodes, other=-1)
    m_j = b_j >= 0
    p_graph = p_matrix + i_sample // S * N * N * C
    p_sample = p_d + (tl.load(p_begin + i_sample) - tl.load(p_begin + first)) * C
    b_width = tl.where((i_row * BLOCK < b_nodes) & (i_column * BLOCK < b_nodes), b_nodes * C, 0)
    b_steps = tl.cdiv(b_width, BLOCK_K)
    b_g = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(0, 2 * b_steps):  # A' dA'^T, then A'^T dA'
        turn = step >= b_steps
        o_k = tl.where(turn, step - b_steps, step) * BLOCK_K + tl.arange(0, BLOCK_K)
        b_word = o_k // WORD
        b_k = b_word // words
        b_v = tl.load(p_node + b_k, mask=b_k < b_nodes, other=-1).to(tl.int32)
        b_l = tl.load(p_slot + tl.where(turn, 0, plane) + b_k, mask=b_k < b_nodes, other=-1)
        m_k = (b_v >= 0) & (b_v < N) & (b_l >= 0)
        b_c = b_word % words
        b_from, b_to = tl.where(turn, 1, N), tl.where(turn, N, 1)
        b_at = ((b_u * b_from * words)[:, None] + (b_v * b_to * words + b_c)[None, :]) * WORD + (o_k % WORD)[None, :]
        b_a = tl.load(p_graph + b_at, mask=m_i[:, None] & m_k[None, :], other=0)
        b_at = (tl.where(turn, b_j_column, b_j) * words)[:, None] + (b_l * words + b_c)[None, :]
        b_d = tl.load(p_sample + (b_at * WORD + (o_k % WORD)[None, :]), mask=m_j[:, None] & m_k[None, :], other=0)
        b_g = tl.dot(b_a.to(b_d.dtype), tl.trans(b_d), b_g, input_precision=PRECISION)
    p_part = p_columns + 2 * i_row.to(tl.int64) * numbers + i_sample * N
    b_d_t, b_d_r = reduce_tile(b_g, o_i, o_j, b_nodes, N, p_soft + i_sample * N, p_part, numbers, by_tau)
    p_row = p_rows + 2 * i_column.to(tl.int64) * numbers + i_sample * N
    tl.store(p_row + o_i, b_d_t, mask=o_i < N)
    tl.store(p_row + numbers + o_i, b_d_r, mask=o_i < N)


class MatrixGradient:
    """Loops over the samples of `Patches`, as many as fit at a time: computes z and reduces it as needed.

    z (used tokens, offset, C) holds dA' where a slot has one place. Else dA' is summed from it.
    """

    def __init__(self, x: Patches, most_places: int):
        if not 1 <= most_places <= max(1, x.slots.shape[0]):
            raise Refused(ValueError, f"most_places must be 1 to the {x.slots.shape[0]} places, got {most_places}")
        self.x, self.most = x, most_places
        self.places = places_of_slots(x.slots, x.N, self.most)
        self.line = x.N * x.C
        self.block = min(256, bucket(self.line))
        self.begin, self.at = self._found()

    def _found(self) -> tuple[Tensor, Tensor]:
        """begin (samples,) int64, at (2, B, N) int32: see `_find_slots`."""
        x = self.x
        if self.most > 1:
            begin = torch.arange(x.samples, device=x.order.device) * x.N**2
            slots = torch.arange(x.N, dtype=torch.int32, device=x.order.device)
            return begin, torch.stack([slots * x.N, slots])[:, None].expand(2, x.B, x.N).contiguous()
        begin = torch.empty(x.samples, dtype=torch.int64, device=x.order.device)
        at = torch.empty(2, x.B, x.N, dtype=torch.int32, device=x.order.device)
        tables = self.places, x.counts, x.used.cells, x.used.before, begin, at
        sizes = x.samples, x.B * x.N, x.S, x.B, x.N, x.grid, x.patch
        _find_slots(lambda settings: (x.B, cdiv(x.N, BLOCK)), *tables, *sizes, BLOCK=BLOCK)
        return begin, at

    def __call__(
        self, d_tokens: Tensor, W: Tensor, rank: Tensor | None, soft: tuple[Tensor, Tensor, Tensor] | None, tau: float
    ):
        """d_matrix if rank is given (in the matrix's dtype), d_t, d_log_r, d_log_c if soft = (t, log_r, log_c) is."""
        x, D = self.x, W.shape[-1]
        d_matrix = torch.zeros(x.matrix.shape, dtype=torch.float32, device=W.device) if rank is not None else None
        tiles = SoftTiles(*soft, most=TILE, square=True) if soft is not None else None
        weight, d_rows = W.view(-1, D), d_tokens.view(-1, D)
        # float16 has too small a range for sums over D
        dtype = torch.bfloat16 if W.dtype == torch.bfloat16 else torch.float32
        numbers = x.L * weight.shape[0]
        check_counts(numbers_of_a_sample_s_patches=numbers)
        step = max(1, min(x.samples, PRODUCTS // (dtype.itemsize * (numbers + (self.most > 1) * x.N * self.line))))
        z = torch.empty(step * x.L, weight.shape[0], dtype=dtype, device=W.device)
        for first in range(0, x.samples, step):
            last = min(x.samples, first + step)
            multiply(x.used, first, last, d_rows, weight.t(), None, z, compact=False)
            d_acted = z if self.most == 1 else self._acted(z, first, last)
            if d_matrix is not None and rank is not None:
                self._add(d_acted, rank, d_matrix, first, last)
            if tiles is not None:
                self._reduce(d_acted, tiles, tau, first, last)
        d_matrix = None if d_matrix is None else d_matrix.to(x.matrix.dtype)
        return d_matrix, *((None,) * 3 if tiles is None else tiles.gradients())

    def _acted(self, z: Tensor, first: int, last: int) -> Tensor:
        """dA' (samples, N, N, C), of z's dtype."""
        x = self.x
        out = torch.empty(last - first, x.N, x.N, x.C, dtype=z.dtype, device=z.device)

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

        arguments = d_acted, self.begin, self.at, rank, x.counts, d_matrix, first, last, x.B * x.N, x.S, x.N, x.C
        _add_samples(grid, *arguments, BLOCK=self.block)

    def _reduce(self, d_acted: Tensor, tiles: SoftTiles, tau: float, first: int, last: int) -> None:
        x = self.x
        word = math.gcd(x.C, 16 // d_acted.element_size())

        def grid(settings):
            return ((last - first) * tiles.blocks**2,)

        _reduce_matrix(
            grid, x.matrix, d_acted, self.begin, self.at, x.order, x.counts, tiles.soft, tiles.rows, tiles.columns, first,
            x.S, x.N, x.C // word, tiles.blocks, x.B * x.N, tiles.plane, 1.0 / tau, sizes=(last - first, x.N, x.C),
            PRECISION=precision(x.matrix.dtype, "tf32x3"), WORD=word, BLOCK=tiles.block,
            BLOCK_K=16 if word == 1 else LINE // d_acted.element_size(),  # of single numbers more would spill
        )  # fmt: skip

"""Permuted dense matrices cut into patches, as factors of matrix products.

A token is a patch of A'[i, j] = A[order[i], order[j]], a row of patch^2 C values (o, q, c). o and q count the places in its
cells; places without a valid slot are zero. The forward pass writes the patches of the used tokens once, some samples at a
time, for a product that reads 16 bytes at a time: 0.13 MB a sample of 118 nodes in 188 slots, at C = 4 in bfloat16, beside
0.3 MB of tokens. Gathered while multiplying, each number is a read and a write of its own in every block of the width.
The weight's gradient writes
them again, and is the product of their transpose and the tokens' gradient. Kept from the forward pass they would take
memory until then.
Tokens that are not used cost only their write, and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import (
    bucket,
    cdiv,
    check_axes,
    check_counts,
    check_tensors,
    kernel,
)
from probsym_fast.ops.triton.items import patch_of
from probsym_fast.ops.triton.products import BYTES, multiply, multiply_transposed
from probsym_fast.ops.triton.used_tokens import UsedTokens, rows_before

LINE = 16  # numbers that divide a row of patches, so that they move 16 bytes at a time


@triton.jit
def nodes_of(p_order, p_slots, o_p, m_p, b_nodes, N):
    """The nodes in some places of a sample's axis; -1 if the place has no slot or an invalid one."""
    b_slot = tl.load(p_slots + o_p, mask=m_p, other=-1).to(tl.int32)
    b_node = tl.load(p_order + b_slot, mask=(b_slot >= 0) & (b_slot < b_nodes), other=-1).to(tl.int32)
    return tl.where(b_node < N, b_node, -1)


@kernel({"num_warps": 4})
def _cut(
    p_matrix, p_order, p_slots, p_counts, p_cells, p_before, p_out, first, S, graphs, N, C, grid, patch, row,
    BLOCK_O: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """out[row, (o, q, c)]: the patches of the used tokens from sample `first` on, in words, each followed by zeros.

    A program cuts the patches of a row of cells of one sample. Neighbouring threads read one line of the matrix.
    """
    i_sample, i_cell = first + tl.program_id(0) // grid, tl.program_id(0) % grid
    i_graph = i_sample // S
    p_cell = p_cells + i_graph.to(tl.int64) * (grid + 1)
    b_at, b_cells = tl.load(p_cell + i_cell), tl.load(p_cell + grid)
    m_used = tl.load(p_cell + i_cell + 1) > b_at
    b_row = rows_before(p_before, i_sample, S, graphs) - rows_before(p_before, first, S, graphs) + b_at * b_cells
    b_nodes = tl.minimum(tl.load(p_counts + i_graph), N).to(tl.int32)
    p_graph = p_matrix + i_graph.to(tl.int64) * N * N * C
    p_node = p_order + i_sample.to(tl.int64) * N
    p_row = p_out + b_row.to(tl.int64) * row
    b_width = grid * patch * C
    for o in range(0, tl.where(m_used, patch, 0), BLOCK_O):
        o_o = o + tl.arange(0, BLOCK_O)
        b_line = nodes_of(p_node, p_slots, i_cell * patch + o_o, o_o < patch, b_nodes, N)
        for x in range(0, b_width, BLOCK_X):
            o_x = x + tl.arange(0, BLOCK_X)
            b_cell = o_x // (patch * C)
            b_column = nodes_of(p_node, p_slots, o_x // C, o_x < b_width, b_nodes, N)
            b_token = tl.load(p_cell + b_cell, mask=o_x < b_width, other=0)
            m_to = tl.load(p_cell + b_cell + 1, mask=o_x < b_width, other=0) > b_token
            b_from = (b_line * (N * C))[:, None] + (b_column * C + o_x % C)[None, :]
            b_a = tl.load(p_graph + b_from, mask=(b_line >= 0)[:, None] & (b_column >= 0)[None, :], other=0)
            b_to = (o_o * patch * C)[:, None] + (b_token * row + o_x % (patch * C))[None, :]
            tl.store(p_row + b_to, b_a, mask=(o_o < patch)[:, None] & m_to[None, :])
    b_full = patch * patch * C
    for t in range(0, tl.where(m_used & (b_full < row), b_cells, 0), BLOCK_T):
        o_t, o_x = t + tl.arange(0, BLOCK_T), b_full + tl.arange(0, LINE)
        m_t = (o_t < b_cells)[:, None] & (o_x < row)[None, :]
        p_zero = p_row + o_t.to(tl.int64)[:, None] * row + o_x[None, :]
        tl.store(p_zero, tl.zeros((BLOCK_T, LINE), p_out.dtype.element_ty), mask=m_t)


class Patches:
    """The permuted matrices of all samples: on one device, contiguous.

    matrix (B, N, N, C), counts (B,) valid nodes (larger counts act as N: values are not checked), order (B, S, N),
    slots (grid patch,).
    """

    def __init__(self, matrix: Tensor, num_nodes: Tensor | None, order: Tensor, slots: Tensor, grid: int):
        self.matrix, self.order, self.slots, self.grid = *(x.contiguous() for x in (matrix, order, slots)), grid
        (self.B, self.S, self.N), self.C = check_axes("order", order, 3), check_axes("matrix", matrix, 4)[-1]
        self.patch, self.L = patch_of(slots, self.N, grid), grid * grid
        shape = self.B, self.N, self.N, self.C
        check_tensors(
            order.device, matrix=(matrix, shape), num_nodes=(num_nodes, (self.B,)), slots=(slots, slots.shape)
        )
        self.samples, self.tokens = self.B * self.S, self.B * self.S * self.L
        places = slots.shape[0]
        total = self.samples * places
        check_counts(
            tokens=self.tokens,
            places_of_all_samples=total,
            nodes=self.B * self.N,
            numbers_of_a_matrix=self.N**2 * self.C,
            numbers_of_a_row_of_patches=grid * self.patch**2 * self.C,
        )
        if num_nodes is None:
            num_nodes = torch.full((self.B,), self.N, dtype=torch.int64, device=order.device)
        self.counts = num_nodes.contiguous()
        self.used = UsedTokens(self.slots, self.counts, self.S, self.N, grid, 2)

    def check(self, weight: Tensor, tokens: Tensor | None, bias: Tensor | None, *soft: Tensor | None) -> None:
        """Refuses unfit arguments: weight (D, C, patch, patch), tokens, bias (D,); rank, t, log_r, log_c."""
        D, samples = check_axes("weight", weight, 4)[0], (self.B, self.S, self.N)
        check_tensors(
            self.order.device,
            weight=(weight, (D, self.C, self.patch, self.patch)),
            tokens=(tokens, (self.B, self.S, self.L, D)),
            bias=(bias, (D,)),
            **{name: (x, samples) for name, x in zip(("rank", "t", "log_r", "log_c"), soft, strict=True)},
        )
        for name, x in (("weight", weight), ("tokens", tokens)):  # patches are copied word by word
            if x is not None and x.dtype != self.matrix.dtype:
                raise Refused(TypeError, f"{name} must be {self.matrix.dtype} as matrix is, got {x.dtype}")

    def _parts(self, W: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """first, last, patches (a row of patch^2 C values, then zeros, for each used token) of some samples at a time."""
        width = cdiv(W.shape[0] * self.C, LINE) * LINE  # rows begin at 32 bytes or more
        step = max(1, min(self.samples, BYTES // (W.element_size() * self.L * width)))
        patches = torch.empty(step * self.L, width, dtype=W.dtype, device=W.device)
        tables = self.order, self.slots, self.counts, self.used.cells, self.used.before
        word, each = word_of(self.matrix)
        sizes = self.S, self.B, self.N, each, self.grid, self.patch, width * each // self.C
        for first in range(0, self.samples, step):
            last = min(self.samples, first + step)
            _cut(
                lambda settings, count=last - first: (count * self.grid,), self.matrix.view(-1).view(word), *tables,
                patches.view(word), first, *sizes, BLOCK_O=min(16, bucket(self.patch)), BLOCK_X=128, BLOCK_T=16, LINE=LINE,
            )  # fmt: skip
            yield first, last, patches

    def times(self, W: Tensor, bias: Tensor | None) -> Tensor:
        """tokens (B, S, L, D) in W's dtype. W (patch^2, C, D)."""
        check_counts(weights=W.numel())
        D = W.shape[-1]
        tokens = torch.empty(self.B, self.S, self.L, D, dtype=W.dtype, device=W.device)
        for first, last, patches in self._parts(W):
            multiply(self.used, first, last, patches, W.view(-1, D), bias, tokens.view(-1, D), compact=True)
        return tokens

    def weight_gradient(self, d_tokens: Tensor, W: Tensor) -> Tensor:
        """dW like W, summed in float32 for any dtype."""
        if not self.tokens:
            return torch.zeros_like(W)
        d_rows = d_tokens.view(-1, W.shape[-1])
        parts = (
            multiply_transposed(self.used, first, last, patches, d_rows, W.shape[0] * self.C)
            for first, last, patches in self._parts(W)
        )
        out = next(parts)
        for part in parts:
            out.add_(part)
        return out.to(W.dtype).view(W.shape)


def word_of(matrix: Tensor) -> tuple[torch.dtype, int]:
    """The longest type of numbers of which a node's values in a line of the matrix are made, and how many."""
    bytes_ = matrix.shape[-1] * matrix.element_size()
    for word in (torch.int64, torch.int32):
        if bytes_ % word.itemsize == 0 and matrix.data_ptr() % word.itemsize == 0:
            return word, bytes_ // word.itemsize
    return matrix.dtype, matrix.shape[-1]

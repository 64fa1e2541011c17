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
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import (
    cdiv,
    check_axes,
    check_counts,
    check_tensors,
    kernel,
    width_block,
)
from probsym_fast.ops.triton.items import patch_of
from probsym_fast.ops.triton.products import BYTES, multiply, multiply_transposed
from probsym_fast.ops.triton.used_tokens import UsedTokens, rows_before

BLOCK = 256
LINE = 16  # numbers that divide a row of patches, so that they move 16 bytes at a time


@kernel({"num_warps": 4})
def _find_nodes(p_order, p_slots, p_counts, p_lines, p_columns, total, S, N, places, BLOCK: tl.constexpr):
    """lines[sample, place]: the matrix row, over all graphs, of the node in the place; columns: the node.

    Both are -1 if the place has no slot or an invalid one.
    """
    o_p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sample = o_p // places
    b_slot = tl.load(p_slots + o_p % places, mask=o_p < total, other=-1)
    m_p = (b_slot >= 0) & (b_slot < tl.load(p_counts + b_sample // S, mask=o_p < total, other=0))
    b_node = tl.load(p_order + b_sample * N + b_slot, mask=m_p, other=-1)
    m_node = (b_node >= 0) & (b_node < N)
    tl.store(p_lines + o_p, tl.where(m_node, b_sample // S * N + b_node, -1).to(tl.int32), mask=o_p < total)
    tl.store(p_columns + o_p, tl.where(m_node, b_node, -1).to(tl.int32), mask=o_p < total)


@kernel({"num_warps": 4})
def _cut(
    p_matrix, p_lines, p_columns, p_rows, p_before, p_out, first, last, S, graphs, N, C, grid, patch, row,
    BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """out[row, (o, q, c)]: the patches of the used tokens of samples first..last - 1, in words, each followed by zeros."""
    b_first = rows_before(p_before, first, S, graphs)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_rows = rows_before(p_before, last, S, graphs) - b_first
    m_m = o_m < b_rows
    b_token = tl.load(p_rows + b_first + o_m, mask=m_m, other=0)
    b_cell = b_token // grid * patch
    b_other = (b_token // (grid * grid) * grid + b_token % grid) * patch
    p_row = p_out + o_m.to(tl.int64)[:, None] * row
    for x in range(0, tl.where(tl.program_id(0) * BLOCK_M < b_rows, row, 0), BLOCK_X):
        o_x = x + tl.arange(0, BLOCK_X)
        b_o, b_q = o_x // (patch * C), o_x // C % patch
        m_x = m_m[:, None] & (b_o < patch)[None, :]
        b_line = tl.load(p_lines + (b_cell[:, None] + b_o[None, :]), mask=m_x, other=-1)
        b_column = tl.load(p_columns + (b_other[:, None] + b_q[None, :]), mask=m_x, other=-1)
        p_a = p_matrix + b_line.to(tl.int64) * (N * C) + (b_column * C + (o_x % C)[None, :])
        b_a = tl.load(p_a, mask=(b_line >= 0) & (b_column >= 0), other=0)
        tl.store(p_row + o_x[None, :], b_a, mask=m_m[:, None] & (o_x < row)[None, :])


@kernel({"num_warps": 4})
def _write_bias(
    p_rows, p_before, p_bias, p_out, tokens, S, graphs, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """tokens[token] = bias for the tokens that are not used."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m = (o_m < tokens) & (o_m >= tl.load(p_before + graphs) * S)
    b_token = tl.load(p_rows + o_m, mask=m_m, other=0).to(tl.int64)
    b_bias = tl.zeros((BLOCK_D,), p_out.dtype.element_ty)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_d, mask=o_d < D, other=0).to(p_out.dtype.element_ty)
    p_token = p_out + b_token[:, None] * D + o_d[None, :]
    tl.store(p_token, tl.broadcast_to(b_bias[None, :], (BLOCK_M, BLOCK_D)), mask=m_m[:, None] & (o_d < D)[None, :])


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
        )
        if num_nodes is None:
            num_nodes = torch.full((self.B,), self.N, dtype=torch.int64, device=order.device)
        self.counts = num_nodes.contiguous()
        self.used = UsedTokens(self.slots, self.counts, self.S, self.N, grid, 2)
        lines, columns = (torch.empty(total, dtype=torch.int32, device=order.device) for _ in range(2))
        arguments = self.order, self.slots, self.counts, lines, columns, total, self.S, self.N, places
        _find_nodes(lambda settings: (cdiv(total, BLOCK),), *arguments, BLOCK=BLOCK)
        self.gathered = self.matrix, lines, columns, self.used.rows, self.used.before

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
        (matrix, *tables), (word, each) = self.gathered, word_of(self.matrix)
        for first in range(0, self.samples, step):
            last = min(self.samples, first + step)
            _cut(
                lambda settings, count=last - first: (cdiv(count * self.L, 16),), matrix.view(-1).view(word), *tables,
                patches.view(word), first, last, self.S, self.B, self.N, each, self.grid, self.patch,
                width * each // self.C, BLOCK_M=16, BLOCK_X=64,
            )  # fmt: skip
            yield first, last, patches

    def times(self, W: Tensor, bias: Tensor | None) -> Tensor:
        """tokens (B, S, L, D) in W's dtype. W (patch^2, C, D)."""
        check_counts(weights=W.numel())
        D, block = W.shape[-1], width_block(W.shape[-1], 256)
        tokens = torch.empty(self.B, self.S, self.L, D, dtype=W.dtype, device=W.device)
        for first, last, patches in self._parts(W):
            multiply(self.used, first, last, patches, W.view(-1, D), bias, tokens.view(-1, D), compact=True)
        _write_bias(
            lambda settings: (cdiv(self.tokens, 16), cdiv(D, block)), self.used.rows, self.used.before, bias,
            tokens, self.tokens, self.S, self.B, D, BLOCK_M=16, BLOCK_D=block,
        )  # fmt: skip
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

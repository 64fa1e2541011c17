"""Permuted dense matrices cut into patches, as factors of matrix products.

A token is a patch of A'[i, j] = A[order[i], order[j]], a row of patch^2 C values (o, q, c). o and q count the places in its
cells; places without a valid slot are zero. The forward pass writes the patches of the used tokens once, some samples at a
time, for a product that reads 16 bytes at a time: 0.13 MB a sample of 118 nodes in 188 slots, at C = 4 in bfloat16, beside
0.3 MB of tokens. Gathered while multiplying, each number is a read and a write of its own in every block of the width.
The weight's gradient gathers them while reading: with x = q C + c, `rows_of_patches` gives a block of tokens times BLOCK_O
of o times BLOCK_X of x. It looks up the nodes of a token's places once for each o and each x, not for each value.
Tokens that are not used cost only their write, and no gradient.
"""

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
from probsym_fast.ops.triton.items import patch_of
from probsym_fast.ops.triton.products import BYTES, multiply
from probsym_fast.ops.triton.used_tokens import UsedTokens, rows_before

BLOCK = 256
LINE = 16  # values x at a time; with fewer, triton 3.9 cannot compile the transposed product for 10.0
PROGRAMS, SPLIT = 1024, 512  # weight gradient: programs wanted at a time; fewest tokens per program


@triton.jit
def begin_of_columns(p_columns, b_token, o_x, C, grid, patch):
    """(tokens, BLOCK_X): where the values x of a patch line are in a graph's matrix line; -1 for a zero."""
    b_cell = (b_token // (grid * grid) * grid + b_token % grid) * patch
    m_x = (o_x < patch * C)[None, :]
    b_column = tl.load(p_columns + (b_cell[:, None] + (o_x // C)[None, :]), mask=m_x, other=-1)
    return tl.where(b_column >= 0, b_column * C + (o_x % C)[None, :], -1)


@triton.jit
def rows_of_patches(p_matrix, p_lines, b_cell, b_column, o_o, line, patch):
    """(tokens, BLOCK_O BLOCK_X): the values (o, x) of the patches; b_cell: first line of places, over all samples."""
    b_line = tl.load(p_lines + (b_cell[:, None] + o_o[None, :]), mask=(o_o < patch)[None, :], other=-1)
    p_a = p_matrix + (b_line.to(tl.int64) * line)[:, :, None] + b_column[:, None, :]
    b_a = tl.load(p_a, mask=(b_line >= 0)[:, :, None] & (b_column >= 0)[:, None, :], other=0)
    return tl.reshape(b_a, (b_a.shape[0], b_a.shape[1] * b_a.shape[2]))


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


@kernel(
    {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 255},
    {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 255},
    {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3, "maxnreg": 255},
    ieee=({"BLOCK_M": 16, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2, "maxnreg": 255},),
)
def _multiply_transposed(
    p_matrix, p_lines, p_columns, p_rows, p_before, p_d, p_out, S, graphs, N, C, D, grid, patch, splits,
    PRECISION: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[part, (o, x)] = the sum of patch(token)[o, x] d[token] over one part of the used tokens."""
    BLOCK_O: tl.constexpr = BLOCK_K // BLOCK_X
    blocks, width = tl.cdiv(D, BLOCK_D), patch * C
    columns = tl.cdiv(width, BLOCK_X)
    i_block, i_split = tl.program_id(0) // blocks, tl.program_id(1)
    o_d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    i_o, i_x = i_block // columns * BLOCK_O, i_block % columns * BLOCK_X
    o_o, o_x = i_o + tl.arange(0, BLOCK_O), i_x + tl.arange(0, BLOCK_X)
    m_d = o_d < D
    b_used = tl.load(p_before + graphs) * S
    b_part = tl.cdiv(b_used, splits)
    b_first = i_split * b_part
    b_last = tl.minimum(b_used, b_first + b_part)
    b_sum = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for m in range(b_first, b_last, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        m_m = o_m < b_last
        b_token = tl.load(p_rows + o_m, mask=m_m, other=0)
        b_column = begin_of_columns(p_columns, b_token, o_x, C, grid, patch)
        b_a = rows_of_patches(p_matrix, p_lines, b_token // grid * patch, b_column, o_o, N * C, patch)
        p_token = p_d + b_token.to(tl.int64)[:, None] * D + o_d[None, :]
        b_d = tl.load(p_token, mask=m_m[:, None] & m_d[None, :], other=0)
        b_sum = tl.dot(tl.trans(b_a), b_d, b_sum, input_precision=PRECISION)
    o_k = tl.arange(0, BLOCK_K)
    b_o, b_x = i_o + o_k // BLOCK_X, i_x + o_k % BLOCK_X
    m_k = (b_o < patch) & (b_x < width)
    b_row = i_split.to(tl.int64) * patch * width + b_o * width + b_x
    p_part = p_out + b_row[:, None] * D + o_d[None, :]
    tl.store(p_part, b_sum.to(p_out.dtype.element_ty), mask=m_k[:, None] & m_d[None, :])


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

    def _constants(self, W: Tensor) -> dict:
        D = W.shape[-1]
        most = 512 // W.element_size()  # fits the registers if rows move in 16 bytes
        block = width_block(D, most if D % 16 == 0 else most // 2)
        return {"PRECISION": precision(W.dtype), "BLOCK_X": LINE, "BLOCK_D": block}

    def times(self, W: Tensor, bias: Tensor | None) -> Tensor:
        """tokens (B, S, L, D) in W's dtype. W (patch^2, C, D)."""
        check_counts(weights=W.numel())
        (offsets, C, D), block = W.shape, width_block(W.shape[-1], 256)
        tokens = torch.empty(self.B, self.S, self.L, D, dtype=W.dtype, device=W.device)
        width = cdiv(offsets * C, LINE) * LINE  # rows begin at 32 bytes or more
        step = max(1, min(self.samples, BYTES // (W.element_size() * self.L * width)))
        patches = torch.empty(step * self.L, width, dtype=W.dtype, device=W.device)
        (matrix, *tables), (word, each) = self.gathered, word_of(self.matrix)
        for first in range(0, self.samples, step):
            last = min(self.samples, first + step)
            _cut(
                lambda settings, count=last - first: (cdiv(count * self.L, 16),), matrix.view(-1).view(word), *tables,
                patches.view(word), first, last, self.S, self.B, self.N, each, self.grid, self.patch, width * each // C,
                BLOCK_M=16, BLOCK_X=64,
            )  # fmt: skip
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
        (offsets, C, D), constants = W.shape, self._constants(W)
        tiles = cdiv(offsets * C, 64) * cdiv(D, constants["BLOCK_D"])
        splits = max(1, min(64, PROGRAMS // tiles, self.tokens // SPLIT))
        out = torch.empty(splits, offsets * C, D, dtype=W.dtype if splits == 1 else torch.float32, device=W.device)

        def grid(settings):
            lines = cdiv(self.patch, settings["BLOCK_K"] // LINE)
            return lines * cdiv(self.patch * C, LINE) * cdiv(D, constants["BLOCK_D"]), splits

        _multiply_transposed(
            grid, *self.gathered, d_tokens, out, self.S, self.B, self.N, C, D, self.grid, self.patch, splits,
            sizes=(self.tokens, self.patch * C, self.patch, D), **constants,
        )  # fmt: skip
        return (out[0] if splits == 1 else out.sum(0).to(W.dtype)).view(W.shape)


def word_of(matrix: Tensor) -> tuple[torch.dtype, int]:
    """The longest type of numbers of which a node's values in a line of the matrix are made, and how many."""
    bytes_ = matrix.shape[-1] * matrix.element_size()
    for word in (torch.int64, torch.int32):
        if bytes_ % word.itemsize == 0 and matrix.data_ptr() % word.itemsize == 0:
            return word, bytes_ // word.itemsize
    return matrix.dtype, matrix.shape[-1]

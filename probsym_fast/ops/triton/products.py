"""Matrix products of the used tokens: their number is read on the GPU, and programs loop over the rows there are."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, kernel, precision
from probsym_fast.ops.triton.used_tokens import UsedTokens, rows_before

BYTES = 2**28  # of an operand or result with a row for every used token, at a time
PROGRAMS = 1024  # wanted at a time
LINE = 128  # bytes of the inner axis that a step reads
SPLITS, SPLIT = 256, 512  # transposed product: programs wanted; fewest tokens per program


@kernel(
    {"BLOCK_M": 128, "num_warps": 8, "num_stages": 3, "maxnreg": 255},
    ieee=({"BLOCK_M": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 255},),
    tf32x3=({"BLOCK_M": 128, "num_warps": 8, "num_stages": 2, "maxnreg": 255},),
)
def _multiply(
    p_a, p_b, p_bias, p_out, p_rows, p_before, first, last, S, graphs, K, X, row_a, row_b, column_b, programs,
    PRECISION: tl.constexpr, COMPACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = bias + a b for the rows of samples first..last - 1: one of a and out has those rows (COMPACT: a), the other all
    tokens. The programs of a block of rows follow each other: a is read from memory once, b stays in the cache."""
    columns = tl.cdiv(X, BLOCK_X)
    i_x, i_part = tl.program_id(0) % columns, tl.program_id(0) // columns
    o_x, o_k = i_x * BLOCK_X + tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_K)
    m_x = o_x < X
    b_first, b_last = rows_before(p_before, first, S, graphs), rows_before(p_before, last, S, graphs)
    p_columns = p_b + o_x.to(tl.int64)[None, :] * column_b
    for m in range(b_first + i_part * BLOCK_M, b_last, programs * BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        m_m = o_m < b_last
        b_token = tl.load(p_rows + o_m, mask=m_m, other=0).to(tl.int64)
        b_row = (o_m - b_first).to(tl.int64)
        b_from, b_to = (b_row, b_token) if COMPACT else (b_token, b_row)
        b_sum = tl.zeros((BLOCK_M, BLOCK_X), tl.float32)
        for k in range(0, K, BLOCK_K):
            m_k = k + o_k < K
            p_line = p_a + b_from[:, None] * row_a + (k + o_k)[None, :]
            b_a = tl.load(p_line, mask=m_m[:, None] & (k + o_k < row_a)[None, :], other=0)
            b_b = tl.load(p_columns + (k + o_k)[:, None] * row_b, mask=m_k[:, None] & m_x[None, :], other=0)
            b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
        if p_bias is not None:
            b_sum += tl.load(p_bias + o_x, mask=m_x, other=0).to(tl.float32)[None, :]
        p_to = p_out + b_to[:, None] * X + o_x[None, :]
        tl.store(p_to, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_x[None, :])


def multiply(
    used: UsedTokens, first: int, last: int, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, compact: bool
) -> None:
    """out[row] = bias + a[row] b for the used tokens of samples first..last - 1.

    b (K, X). One of a (rows, at least K) and out (rows, X) has a row for each of them, the other for each token. Values of a
    beyond K must be zero.
    """
    (K, X), kind = b.shape, precision(b.dtype, "tf32x3")
    aligned = X % 16 == 0, a.shape[-1] % 16 == 0  # rows move in 16 bytes; others take more registers
    block = max(16, min(256 // b.element_size() // (1 if aligned[0] else 2), bucket(X)))
    step = 16 if kind == "ieee" else LINE // b.element_size() // (1 if aligned[1] else 2)
    columns = cdiv(X, block)
    programs = max(1, min(cdiv((last - first) * used.L, 128), PROGRAMS // columns))

    def grid(settings):
        return (columns * programs,)

    _multiply(
        grid, a, b, bias, out, used.rows, used.before, first, last, used.S, used.B, K, X, a.shape[-1], b.stride(0),
        b.stride(1), programs, PRECISION=kind, COMPACT=compact, BLOCK_X=block, BLOCK_K=step,
    )  # fmt: skip


@kernel(
    {"num_warps": 8, "num_stages": 3, "maxnreg": 255},
    tf32x3=({"num_warps": 8, "num_stages": 2, "maxnreg": 255},),
)
def _multiply_transposed(
    p_a, p_d, p_out, p_rows, p_before, first, last, S, graphs, K, D, row_a, splits,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[part] = the sum of a[row]^T d[token] over one part of the rows of samples first..last - 1.

    The programs of a part follow each other: its rows are read from memory once.
    """
    columns = tl.cdiv(D, BLOCK_D)
    tiles = tl.cdiv(K, BLOCK_K) * columns
    i_tile, i_part = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    o_k = i_tile // columns * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = i_tile % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    b_first, b_end = rows_before(p_before, first, S, graphs), rows_before(p_before, last, S, graphs)
    b_part = tl.cdiv(b_end - b_first, splits)
    b_last = tl.minimum(b_end - b_first, (i_part + 1).to(tl.int32) * b_part)
    b_sum = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for m in range(i_part.to(tl.int32) * b_part, b_last, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        m_m = o_m < b_last
        b_token = tl.load(p_rows + b_first + o_m, mask=m_m, other=0).to(tl.int64)
        p_line = p_a + o_m.to(tl.int64)[:, None] * row_a + o_k[None, :]
        b_a = tl.load(p_line, mask=m_m[:, None] & (o_k < row_a)[None, :], other=0)
        p_token = p_d + b_token[:, None] * D + o_d[None, :]
        b_d = tl.load(p_token, mask=m_m[:, None] & (o_d < D)[None, :], other=0)
        b_sum = tl.dot(tl.trans(b_a), b_d, b_sum, input_precision=PRECISION)
    p_part = p_out + (i_part * K + o_k)[:, None] * D + o_d[None, :]
    tl.store(p_part, b_sum, mask=(o_k < K)[:, None] & (o_d < D)[None, :])


def multiply_transposed(used: UsedTokens, first: int, last: int, a: Tensor, d: Tensor, K: int) -> Tensor:
    """(K, D) float32: the sum of a[row]^T d[token] over the used tokens of samples first..last - 1.

    a (rows, at least K) has a row for each of them, with zeros beyond K; d (all tokens, D).
    """
    D, kind = d.shape[-1], precision(d.dtype, "tf32x3")
    block = 128 if a.shape[-1] % 16 == 0 and D % 16 == 0 else 64
    narrow = block // 2 if kind == "tf32x3" else block  # the parts of its factors take registers
    block_k, block_d = max(16, min(block, bucket(K))), max(16, min(narrow, bucket(D)))
    tiles = cdiv(K, block_k) * cdiv(D, block_d)
    splits = max(1, min(SPLITS // tiles, (last - first) * used.L // SPLIT))
    out = torch.empty(splits, K, D, dtype=torch.float32, device=d.device)

    def grid(settings):
        return (tiles * splits,)

    _multiply_transposed(
        grid, a, d, out, used.rows, used.before, first, last, used.S, used.B, K, D, a.shape[-1], splits,
        sizes=(K, D), PRECISION=kind, BLOCK_M=LINE // d.element_size(), BLOCK_K=block_k, BLOCK_D=block_d,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)

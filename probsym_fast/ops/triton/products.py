"""Matrix products of the used tokens: their number is read on the GPU, and programs beyond it end at once."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, kernel, precision
from probsym_fast.ops.triton.used_tokens import UsedTokens, rows_before

BYTES = 2**28  # of an operand or result with a row for every used token, at a time
LINE = 128  # bytes of the inner axis that a step reads
NARROW = 2**31 - 2**20  # most numbers of a tensor whose addresses are computed in 32 bits, with room for a block
SPLITS, SPLIT = 256, 512  # transposed product: programs wanted; fewest tokens per program


@kernel(
    {"BLOCK_M": 128, "num_warps": 4, "num_stages": 3, "maxnreg": 255},
    {"BLOCK_M": 128, "num_warps": 8, "num_stages": 3, "maxnreg": 255},
    ieee=({"BLOCK_M": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 255},),
    tf32x3=({"BLOCK_M": 128, "num_warps": 8, "num_stages": 2, "maxnreg": 255},),
)
def _multiply(
    p_a, p_b, p_bias, p_out, p_rows, p_before, first, last, S, graphs, L, K, X, row_a, row_b, column_b,
    PRECISION: tl.constexpr, COMPACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out = bias + a b for the rows of samples first..last - 1: one of a and out has those rows, the other all tokens.

    COMPACT: a has them, and the tokens that are not used become the bias. A program has BLOCK_M rows and BLOCK_X
    columns. Those of a block of rows follow each other: a is read from memory once, b stays in the cache. Blocks of used rows
    and of others alternate: the first compute, the others only write. The last rows come first: they were written last, so
    the cache may have them. Whole steps of BLOCK_K have no masks: beyond the ends, addresses repeat those of other rows and
    columns, whose sums are not stored. WIDE: addresses in 64 bits.
    """
    columns = tl.cdiv(X, BLOCK_X)
    i_x, i_block = tl.program_id(0) % columns, tl.program_id(0) // columns
    blocks = tl.num_programs(0) // columns
    i_block = tl.where(i_block % 2 == 0, i_block // 2, blocks - 1 - i_block // 2)
    b_first, b_last = rows_before(p_before, first, S, graphs), rows_before(p_before, last, S, graphs)
    b_blocks = tl.cdiv(b_last - b_first, BLOCK_M)
    m_used = i_block < b_blocks
    b_every = tl.load(p_before + graphs) * S  # the others follow
    b_begin = tl.where(m_used, b_first + (b_blocks - 1 - i_block) * BLOCK_M, 0)
    b_end = tl.where(m_used, b_last, 0)
    if COMPACT:
        b_begin += tl.where(m_used, 0, b_every + first * L - b_first + (i_block - b_blocks) * BLOCK_M)
        b_end += tl.where(m_used, 0, b_every + last * L - b_last)
    o_m = b_begin + tl.arange(0, BLOCK_M)
    m_m = o_m < b_end
    b_token, b_row = tl.load(p_rows + o_m, mask=m_m, other=0), tl.minimum(o_m, b_last - 1) - b_first
    o_x, o_k = i_x * BLOCK_X + tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_K)
    b_column = o_x % X
    if WIDE:
        b_token, b_row, b_column, o_k = (
            b_token.to(tl.int64),
            b_row.to(tl.int64),
            b_column.to(tl.int64),
            o_k.to(tl.int64),
        )
    b_from, b_to = (b_row, b_token) if COMPACT else (b_token, b_row)
    b_from_a, b_from_b = b_from[:, None] * row_a + o_k[None, :], b_column[None, :] * column_b + o_k[:, None] * row_b
    b_sum = tl.zeros((BLOCK_M, BLOCK_X), tl.float32)
    for _ in range(0, tl.where(m_used, K // BLOCK_K, 0)):
        b_sum = tl.dot(tl.load(p_a + b_from_a), tl.load(p_b + b_from_b), b_sum, input_precision=PRECISION)
        p_a += BLOCK_K
        p_b += BLOCK_K * row_b
    o_k = tl.arange(0, TAIL)
    b_from_a = b_from[:, None] * row_a + o_k[None, :]
    b_from_b = b_column[None, :] * column_b + o_k.to(b_column.dtype)[:, None] * row_b
    for k in range(K // BLOCK_K * BLOCK_K, tl.where(m_used, K, 0), TAIL):
        b_a = tl.load(p_a + b_from_a, mask=(k + o_k < row_a)[None, :], other=0)
        b_b = tl.load(p_b + b_from_b, mask=(k + o_k < K)[:, None], other=0)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
        p_a += TAIL
        p_b += TAIL * row_b
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_x, mask=o_x < X, other=0).to(tl.float32)[None, :]
    p_to = p_out + b_to[:, None] * X + o_x[None, :]
    tl.store(p_to, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_x < X)[None, :])


def multiply(
    used: UsedTokens, first: int, last: int, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, compact: bool
) -> None:
    """out[row] = bias + a[row] b for the used tokens of samples first..last - 1.

    b (K, X). One of a (rows, at least K) and out (rows, X) has a row for each of them, the other for each token. Values of a
    beyond K must be zero. If `compact`, a has the rows, and out[token] = bias for the tokens that are not used.
    """
    (K, X), kind = b.shape, precision(b.dtype, "tf32x3")
    aligned = X % 16 == 0, a.shape[-1] % 16 == 0  # rows move in 16 bytes; others take more registers
    block = max(16, min(256 // b.element_size() // (1 if aligned[0] else 2), bucket(X)))
    step = 16 if kind == "ieee" else LINE // b.element_size() // (1 if aligned[1] else 2)
    wide = max(x.numel() for x in (a, b, out)) > NARROW
    step = max(16, step // 2) if wide else step  # addresses of 64 bits take registers
    columns, rows = cdiv(X, block), (last - first) * used.L

    def grid(settings):
        return ((cdiv(rows, settings["BLOCK_M"]) + compact) * columns,)

    _multiply(
        grid, a, b, bias, out, used.rows, used.before, first, last, used.S, used.B, used.L, K, X, a.shape[-1], b.stride(0),
        b.stride(1), PRECISION=kind, COMPACT=compact, BLOCK_X=block, BLOCK_K=step, TAIL=16, WIDE=wide,
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

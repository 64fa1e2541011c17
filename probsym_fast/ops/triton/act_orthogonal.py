"""act_orthogonal and its gradient: vectors (B, n, d, C), shared by the samples, or (B, S, n, d, C); frames (B, S, d, d)."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, check_axes, check_counts, check_tensors, fresh_like, kernel

TILE = 512  # values of a program


@kernel({"num_warps": 4})
def _act(
    p_frames, p_x, p_y, samples, S, n, C, scale,
    d: tl.constexpr, TRANSPOSED: tl.constexpr, PER_SAMPLE: tl.constexpr, SUM: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y[.., m, i, c] = scale sum_j g(i, j) x[.., m, j, c] of a block of samples, or the sum over the samples of one graph.

    PER_SAMPLE: x has a sample axis. SUM: y has none.
    """
    blocks = tl.cdiv(n * C, BLOCK)
    i_out = (tl.program_id(0) // blocks).to(tl.int64)  # a graph if SUM, else a block of samples
    o_v = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)  # (vector, channel)
    m_v = o_v < n * C
    o_m, o_c = (o_v // C).to(tl.int64), o_v % C
    i_first = i_out * (S if SUM else BLOCK_S)
    i_end = i_first + S if SUM else samples
    for i in range(d):
        b_y = tl.zeros((BLOCK_S, BLOCK), tl.float32)
        for k in range(0, S if SUM else 1, BLOCK_S):
            o_s = i_first + k + tl.arange(0, BLOCK_S)
            m_s = o_s < i_end
            o_x = o_s
            if not PER_SAMPLE:  # divided in 32 bits
                o_x = tl.where(m_s, i_out, 0) if SUM else (o_s.to(tl.int32) // S).to(tl.int64)
            o_x = o_x[:, None] * n + o_m[None, :]
            for j in range(d):
                o_g = j * d + i if TRANSPOSED else i * d + j
                b_g = tl.load(p_frames + o_s * (d * d) + o_g, mask=m_s, other=0).to(tl.float32)
                m_x = m_s[:, None] & m_v[None, :]
                b_x = tl.load(p_x + (o_x * d + j) * C + o_c[None, :], mask=m_x, other=0).to(tl.float32)
                b_y += b_g[:, None] * b_x
        if SUM:
            p_out = p_y + ((i_out * n + o_m) * d + i) * C + o_c
            tl.store(p_out, (scale * tl.sum(b_y, 0)).to(p_y.dtype.element_ty), mask=m_v)
        else:
            o_s = i_first + tl.arange(0, BLOCK_S)
            p_out = p_y + ((o_s[:, None] * n + o_m[None, :]) * d + i) * C + o_c[None, :]
            m_out = (o_s < samples)[:, None] & m_v[None, :]
            tl.store(p_out, (scale * b_y).to(p_y.dtype.element_ty), mask=m_out)


@kernel({"num_warps": 4})
def _frame_gradient(
    p_d_y, p_x, p_d_frames, samples, S, n, C, scale,
    d: tl.constexpr, TRANSPOSED: tl.constexpr, PER_SAMPLE: tl.constexpr, SUM: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """d_g(i, j) = scale sum_{m, c} d_y[m, i, c] x[m, j, c] of a block of samples.

    PER_SAMPLE: x has a sample axis. SUM: d_y has none.
    """
    i, j = tl.program_id(0) // d % d, tl.program_id(0) % d
    o_s = (tl.program_id(0) // (d * d)).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_s, o_graph = o_s < samples, (o_s.to(tl.int32) // S).to(tl.int64)
    o_y, o_x = o_graph if SUM else o_s, o_s if PER_SAMPLE else o_graph
    b_sum = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, n * C, BLOCK):
        o_v = first + tl.arange(0, BLOCK)
        o_m, o_c = (o_v // C).to(tl.int64)[None, :], (o_v % C)[None, :]
        m_v = m_s[:, None] & (o_v < n * C)[None, :]
        b_y = tl.load(p_d_y + ((o_y[:, None] * n + o_m) * d + i) * C + o_c, mask=m_v, other=0).to(tl.float32)
        b_x = tl.load(p_x + ((o_x[:, None] * n + o_m) * d + j) * C + o_c, mask=m_v, other=0).to(tl.float32)
        b_sum += b_y * b_x
    o_g = j * d + i if TRANSPOSED else i * d + j
    b_g = scale * tl.sum(b_sum, 1)
    tl.store(p_d_frames + o_s * (d * d) + o_g, b_g.to(p_d_frames.dtype.element_ty), mask=m_s)


def _shape(vectors: Tensor, frames: Tensor) -> tuple[int, ...]:
    """B, S, n, d, C."""
    B, S, d, _ = check_axes("frames", frames, 4)
    *lead, n, _, C = check_axes("vectors", vectors, 4, 5)
    shape = ((B, S) if len(lead) == 2 else (B,)) + (n, d, C)
    check_tensors(frames.device, frames=(frames, (B, S, d, d)), vectors=(vectors, shape))
    check_counts(channels_of_all_vectors_of_a_graph=n * C, samples=B * S)
    return B, S, n, d, C


def _tile(values: int) -> dict[str, int]:
    """(vector, channel) of a program and its samples: of few vectors, many."""
    block = min(128, max(16, bucket(values)))
    return {"BLOCK": block, "BLOCK_S": TILE // block}


def _rotate(frames: Tensor, x: Tensor, y: Tensor, S: int, scale: float, transposed: bool) -> None:
    """y = scale g x, or g^T x; summed over the samples where y (B, n, d, C) has none."""
    *_, n, d, C = x.shape
    (B, samples), tile = (frames.shape[0], frames.shape[0] * S), _tile(n * C)
    sums = y.ndim == 4

    def grid(settings):
        rows = B if sums else cdiv(samples, settings["BLOCK_S"])
        return (rows * (cdiv(n * C, settings["BLOCK"]) if d else 0),)

    flags = {"TRANSPOSED": transposed, "PER_SAMPLE": x.ndim == 5, "SUM": sums}
    _act(grid, frames, x, y, samples, S, n, C, scale, d=d, **flags, **tile)


def forward(vectors: Tensor, frames: Tensor, inverse: bool, mean: bool) -> Tensor:
    vectors, frames = vectors.contiguous(), frames.contiguous()
    B, S, n, d, C = _shape(vectors, frames)
    shape = (B, n, d, C) if mean else (B, S, n, d, C)
    out = torch.empty(shape, dtype=vectors.dtype, device=vectors.device)
    _rotate(frames, vectors, out, S, 1 / S if mean else 1.0, inverse)
    return out


def backward(
    d_out: Tensor,
    vectors: Tensor,
    frames: Tensor,
    inverse: bool,
    mean: bool,
    needs_vectors: bool,
    needs_frames: bool,
) -> tuple[Tensor | None, Tensor | None]:
    d_out, vectors, frames = d_out.contiguous(), vectors.contiguous(), frames.contiguous()
    B, S, n, d, C = _shape(vectors, frames)
    check_tensors(frames.device, d_out=(d_out, (B, n, d, C) if mean else (B, S, n, d, C)))
    d_vectors = fresh_like(vectors) if needs_vectors else None
    d_frames = fresh_like(frames) if needs_frames else None
    samples, scale = B * S, 1 / S if mean else 1.0
    if d_vectors is not None:
        _rotate(frames, d_out, d_vectors, S, scale, not inverse)
    if d_frames is not None:

        def grid(settings):
            return (cdiv(samples, settings["BLOCK_S"]) * d * d,)

        flags = {"TRANSPOSED": inverse, "PER_SAMPLE": vectors.ndim == 5, "SUM": mean} | _tile(n * C)
        _frame_gradient(grid, d_out, vectors, d_frames, samples, S, n, C, scale, d=d, **flags)
    return d_vectors, d_frames

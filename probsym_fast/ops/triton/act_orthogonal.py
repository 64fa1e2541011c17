"""act_orthogonal and its gradient: vectors (B, n, d, C), shared by the samples, or (B, S, n, d, C); frames (B, S, d, d)."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import bucket, cdiv, check_axes, check_counts, check_tensors, fresh_like, kernel


@kernel({"num_warps": 4})
def _act(
    p_frames, p_x, p_y, S, n, C, scale,
    d: tl.constexpr, TRANSPOSED: tl.constexpr, PER_SAMPLE: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[.., m, i, c] = scale sum_j g(i, j) x[.., m, j, c] for one sample, or the sum over the samples of one graph.

    PER_SAMPLE: x has a sample axis. SUM: y has none.
    """
    blocks = tl.cdiv(n * C, BLOCK)
    i_out = (tl.program_id(0) // blocks).to(tl.int64)  # a graph if SUM, else a sample
    o_v = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)  # (vector, channel)
    m_v = o_v < n * C
    o_m, o_c = (o_v // C).to(tl.int64), o_v % C
    i_graph = i_out if SUM else (tl.program_id(0) // blocks // S).to(tl.int64)
    i_first = i_out * S if SUM else i_out
    for i in range(d):
        b_y = tl.zeros((BLOCK,), tl.float32)
        for s in range(S if SUM else 1):
            i_sample = i_first + s
            i_x = i_sample if PER_SAMPLE else i_graph
            for j in range(d):
                o_g = j * d + i if TRANSPOSED else i * d + j
                b_g = tl.load(p_frames + i_sample * d * d + o_g).to(tl.float32)
                b_x = tl.load(p_x + ((i_x * n + o_m) * d + j) * C + o_c, mask=m_v, other=0).to(tl.float32)
                b_y += b_g * b_x
        p_out = p_y + ((i_out * n + o_m) * d + i) * C + o_c
        tl.store(p_out, (scale * b_y).to(p_y.dtype.element_ty), mask=m_v)


@kernel({"num_warps": 4})
def _frame_gradient(
    p_d_y, p_x, p_d_frames, S, n, C, scale,
    d: tl.constexpr, TRANSPOSED: tl.constexpr, PER_SAMPLE: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_g(i, j) = scale sum_{m, c} d_y[m, i, c] x[m, j, c] for one sample.

    PER_SAMPLE: x has a sample axis. SUM: d_y has none.
    """
    i_sample, i, j = (tl.program_id(0) // (d * d)).to(tl.int64), tl.program_id(0) // d % d, tl.program_id(0) % d
    i_graph = (tl.program_id(0) // (d * d) // S).to(tl.int64)
    i_y = i_graph if SUM else i_sample
    i_x = i_sample if PER_SAMPLE else i_graph
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n * C, BLOCK):
        o_v = first + tl.arange(0, BLOCK)
        o_m, o_c = (o_v // C).to(tl.int64), o_v % C
        b_y = tl.load(p_d_y + ((i_y * n + o_m) * d + i) * C + o_c, mask=o_v < n * C, other=0).to(tl.float32)
        b_x = tl.load(p_x + ((i_x * n + o_m) * d + j) * C + o_c, mask=o_v < n * C, other=0).to(tl.float32)
        b_sum += b_y * b_x
    o_g = j * d + i if TRANSPOSED else i * d + j
    b_g = scale * tl.sum(b_sum, 0)
    tl.store(p_d_frames + i_sample * d * d + o_g, b_g.to(p_d_frames.dtype.element_ty))


def _shape(vectors: Tensor, frames: Tensor) -> tuple[int, ...]:
    """B, S, n, d, C, and the block of (vector, channel)."""
    B, S, d, _ = check_axes("frames", frames, 4)
    *lead, n, _, C = check_axes("vectors", vectors, 4, 5)
    shape = ((B, S) if len(lead) == 2 else (B,)) + (n, d, C)
    check_tensors(frames.device, frames=(frames, (B, S, d, d)), vectors=(vectors, shape))
    check_counts(channels_of_all_vectors_of_a_graph=n * C)
    return B, S, n, d, C, min(512, max(32, bucket(n * C)))


def forward(vectors: Tensor, frames: Tensor, inverse: bool, mean: bool) -> Tensor:
    vectors, frames = vectors.contiguous(), frames.contiguous()
    B, S, n, d, C, block = _shape(vectors, frames)
    shape = (B, n, d, C) if mean else (B, S, n, d, C)
    out = torch.empty(shape, dtype=vectors.dtype, device=vectors.device)

    def grid(settings):
        return ((B if mean else B * S) * (cdiv(n * C, block) if d else 0),)

    flags = {"TRANSPOSED": inverse, "PER_SAMPLE": vectors.ndim == 5, "SUM": mean, "BLOCK": block}
    _act(grid, frames, vectors, out, S, n, C, 1 / S if mean else 1.0, d=d, **flags)
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
    B, S, n, d, C, block = _shape(vectors, frames)
    check_tensors(frames.device, d_out=(d_out, (B, n, d, C) if mean else (B, S, n, d, C)))
    d_vectors = fresh_like(vectors) if needs_vectors else None
    d_frames = fresh_like(frames) if needs_frames else None
    per_sample, scale = vectors.ndim == 5, 1 / S if mean else 1.0

    def grid(settings):
        return ((B * S if per_sample else B) * (cdiv(n * C, block) if d else 0),)

    def entries(settings):
        return (B * S * d * d,)

    if needs_vectors:
        flags = {"TRANSPOSED": not inverse, "PER_SAMPLE": not mean, "SUM": not per_sample, "BLOCK": block}
        _act(grid, frames, d_out, d_vectors, S, n, C, scale, d=d, **flags)
    if needs_frames:
        flags = {"TRANSPOSED": inverse, "PER_SAMPLE": per_sample, "SUM": mean, "BLOCK": block}
        _frame_gradient(entries, d_out, vectors, d_frames, S, n, C, scale, d=d, **flags)
    return d_vectors, d_frames

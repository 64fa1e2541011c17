"""Rotations and reflections of vectors, S samples at once."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._autocast import promoted
from probsym_fast._checks import check_bool, check_float
from probsym_fast.ops._op import Op
from probsym_fast.ops.reference.act_orthogonal import act_orthogonal as reference


def _shapes(vectors, frames, inverse, mean):
    B, S = frames.shape[:2]
    return vectors.new_empty((B, *vectors.shape[-3:]) if mean else (B, S, *vectors.shape[-3:]))


def _gradient_shapes(d_out, vectors, frames, inverse, mean, needs_vectors, needs_frames):
    needed = zip((vectors, frames), (needs_vectors, needs_frames), strict=True)
    return tuple(x.new_empty(x.shape) if needs else None for x, needs in needed)


OP = Op(
    "act_orthogonal",
    "(Tensor vectors, Tensor frames, bool inverse, bool mean) -> Tensor out",
    reference=reference,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_out, Tensor vectors, Tensor frames, bool inverse, bool mean, bool needs_vectors, bool needs_frames)"
    " -> (Tensor d_vectors, Tensor d_frames)",
    shapes=_gradient_shapes,
)


def act_orthogonal(
    vectors: Tensor, frames: Tensor, *, inverse: bool = False, mean: bool = False, backend: str = "auto"
) -> Tensor:
    """`out[b, s, m, i, c] = sum_j g[b, s, i, j] v[b, (s,) m, j, c]`, with g^T for `inverse`.

    Args:
        vectors: (B, n, d, C), shared by the samples, or (B, S, n, d, C).
        frames: (B, S, d, d), orthogonal (the transpose is used as the inverse).
        inverse: apply g^-1. mean: average over the samples.
        backend: "auto", "cpu", "triton" or "reference".

    Returns: (B, S, n, d, C), with `mean` (B, n, d, C); dtype of `vectors` (float16 and bfloat16 compute in float32).

    Gradients: to vectors and frames. Cost: 2 d operations per value.
    Raises: TypeError (dtypes), ValueError (shapes), RuntimeError (devices, backend).
    """
    check_float("act_orthogonal", vectors=vectors, frames=frames)
    inverse, mean = check_bool("act_orthogonal", "inverse", inverse), check_bool("act_orthogonal", "mean", mean)
    if frames.ndim != 4 or frames.shape[-1] != frames.shape[-2]:
        raise ValueError(f"act_orthogonal: frames must be (B, S, d, d), got {tuple(frames.shape)}")
    B, S, d, _ = frames.shape
    if S < 1:
        raise ValueError(f"act_orthogonal: frames must have at least one sample S, got {tuple(frames.shape)}")
    lead = (B,) if vectors.ndim == 4 else (B, S)
    if vectors.ndim not in (4, 5) or vectors.shape[: len(lead)] != lead or vectors.shape[-2] != d:
        raise ValueError(
            f"act_orthogonal: vectors must be (B, [S,] n, d, C) = ({B}, [{S},] *, {d}, *), got {tuple(vectors.shape)}"
        )
    if vectors.device != frames.device:
        raise RuntimeError(f"act_orthogonal: frames must be on {vectors.device}, got {frames.device}")
    dtype = OP.compute_dtype(backend, vectors.device, vectors.dtype)
    frames = frames.to(promoted(dtype, torch.float32))
    run = OP.select(backend, vectors.device, dtype)
    return run(vectors.to(dtype), frames, inverse, mean).to(vectors.dtype)

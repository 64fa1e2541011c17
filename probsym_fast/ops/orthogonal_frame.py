"""Matrices to orthogonal matrices by Gram-Schmidt."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._checks import check_bool, check_float
from probsym_fast.ops._op import Op
from probsym_fast.ops.reference.orthogonal_frame import check_values
from probsym_fast.ops.reference.orthogonal_frame import orthogonal_frame as reference

KERNEL_DIMENSIONS = (1, 2, 3)


OP = Op(
    "orthogonal_frame",
    "(Tensor matrices, bool special) -> Tensor frames",
    reference=reference,
    values=check_values,
    shapes=lambda matrices, special: matrices.new_empty(matrices.shape),
)
OP.gradient(
    "(Tensor d_frames, Tensor frames, Tensor matrices) -> Tensor d_matrices",
    shapes=lambda d_frames, frames, matrices: matrices.new_empty(matrices.shape),
    others={
        "special": lambda known: torch.linalg.det(known["frames"].detach()) > 0
    },  # one of det > 0 is its own rotation
)


def orthogonal_frame(matrices: Tensor, *, special: bool = False, backend: str = "auto") -> Tensor:
    """Gram-Schmidt on the columns: `u_k = a_k - sum_{j<k} q_j (q_j . a_k)`, `q_k = u_k / |u_k|`, k = 1, ..., d.

    Equivariant: `orthogonal_frame(h @ A) = h @ orthogonal_frame(A)` for orthogonal h (with `special`: for rotations h).
    Every step runs twice (re-orthogonalisation), so the result is orthogonal to 1e-5 in float32 for any finite input.
    A column may depend on those before it (its rest shorter than 1e-6 of its length in float32, 1e-14 in float64; also a
    zero column). It is then replaced by the coordinate axis farthest from them, orthonormalised: orthogonal, but not
    equivariant. Among axes whose squared distances are within 0.1% of the largest, the first is used.

    Args:
        matrices: (..., d, d). float16 and bfloat16 are computed and returned in float32.
        special: multiply the first column by the sign of the determinant: SO(d) instead of O(d).
        backend: "auto", "cpu", "triton" (both d <= 3) or "reference".

    Returns: (..., d, d) with orthonormal columns.

    Gradients: to matrices. They treat as constants which columns are replaced, a replaced `q_k` and the sign of the
    determinant. With `P_k` the projection onto the complement of `q_1, ..., q_{k-1}`, of `q_k = u_k / |u_k|, u_k = P_k
    a_k`:

        d_u_k = (d_q_k - q_k (q_k . d_q_k)) / |u_k|,   d_a_k = P_k d_u_k,
        d_q_j += - (q_j . d_u_k) u_k - (q_j . a_k) d_a_k   for j < k,

    from the last column to the first, where a replaced column has `d_u_k = 0`. So it gets no gradient and passes none on:
    later columns stay orthogonal to it, and their gradients go to themselves and to the columns that were kept. Each column
    is divided by its largest entry first: gradients are finite for every finite matrix. Gradients beyond the range of the
    dtype become its largest finite value (of float32 for float16 and bfloat16, whose own may be infinite).

    Raises: TypeError (dtype), ValueError (shape; entries not finite, on a GPU only in debug mode), RuntimeError (backend).
    Source: the orthogonalisation of Kim et al. 2023 (arXiv 2306.02866).
    """
    check_float("orthogonal_frame", matrices=matrices)
    special = check_bool("orthogonal_frame", "special", special)
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2] or matrices.shape[-1] < 1:
        raise ValueError(f"orthogonal_frame: matrices must be (..., d, d), got {tuple(matrices.shape)}")
    matrices = matrices.to(OP.compute_dtype(backend, matrices.device, matrices.dtype))
    d = matrices.shape[-1]
    if d not in KERNEL_DIMENSIONS:
        if backend not in ("auto", "reference"):
            raise ValueError(f"orthogonal_frame: backend {backend!r} takes d in {KERNEL_DIMENSIONS}, got d = {d}")
        lacking = f"its kernels take d in {KERNEL_DIMENSIONS}, got d = {d}"
        return OP.without_kernel(backend, matrices.device, lacking)(matrices, special)
    return OP.select(backend, matrices.device, matrices.dtype)(matrices, special)

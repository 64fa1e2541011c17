"""Permuted dense matrices to tokens, without forming the permuted matrix."""

from __future__ import annotations

from torch import Tensor

from probsym_fast.ops._op import Op
from probsym_fast.ops._patches import (
    check_devices,
    check_padding,
    check_patches,
    check_permutation,
    common_dtype,
    gradient_shapes,
    padded_axis,
    soft_parts,
)
from probsym_fast.ops.permutation import Permutation
from probsym_fast.ops.reference.embed_matrix import embed_matrix as reference


def _shapes(matrix, num_nodes, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight, bias):
    return weight.new_empty(*rank.shape[:2], grid * grid, weight.shape[0])


def _gradient_shapes(
    d_tokens, matrix, num_nodes, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight, *needs
):
    return gradient_shapes(matrix, t, weight, weight.shape[0], needs)


OP = Op(
    "embed_matrix",
    "(Tensor matrix, Tensor? num_nodes, Tensor rank, Tensor order, Tensor? t, Tensor? log_r, Tensor? log_c, float tau,"
    " Tensor slots, int most_places, int grid, Tensor weight, Tensor? bias) -> Tensor tokens",
    reference=reference,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_tokens, Tensor matrix, Tensor? num_nodes, Tensor rank, Tensor order, Tensor? t, Tensor? log_r,"
    " Tensor? log_c, float tau, Tensor slots, int most_places, int grid, Tensor weight, bool needs_matrix, bool needs_t,"
    " bool needs_weight, bool needs_bias)"
    " -> (Tensor d_matrix, Tensor d_t, Tensor d_log_r, Tensor d_log_c, Tensor d_weight, Tensor d_bias)",
    shapes=_gradient_shapes,
)


def embed_matrix(
    matrix: Tensor,
    p: Permutation,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: int,
    pad_mode: str = "zeros",
    centered: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Tokens of permuted dense matrices: `embed_edges` for dense graphs.

    Args:
        matrix: (B, N, N, C); entries beyond the permutation's num_nodes count as zero.
        Others as in `embed_edges`.

    Returns: (B, S, grid^2, D), dtype of the weight.

    Gradients: matrix, weight, bias, p. Cost, kernel: a matrix product over the tokens that hold valid slots,
    (tokens, P^2 C) x (P^2 C, D). Gradient to p: another 4 n^3 C operations per sample, one n x n matrix at a time
    (triton: as many as fit 256 MiB).
    Raises: as `embed_edges`.
    """
    op = "embed_matrix"
    check_permutation(op, p)
    check_padding(op, pad_mode, centered)
    dtype = common_dtype(op, OP, backend, weight=weight, matrix=matrix, bias=bias)
    B, _, N = p.shape
    grid = check_patches(op, weight, bias, N, grid, 2, bias_axis=0)
    if tuple(matrix.shape) != (B, N, N, weight.shape[1]):
        raise ValueError(f"{op}: matrix must be (B, N, N, C) = {(B, N, N, weight.shape[1])}, got {tuple(matrix.shape)}")
    check_devices(op, matrix.device, p=p.order)
    axis = padded_axis(N, grid, pad_mode, centered, matrix.device)
    run = OP.select(backend, weight.device, dtype)
    bias = None if bias is None else bias.to(dtype)
    out = run(matrix.to(dtype), p.num_nodes, *soft_parts(p, dtype), *axis, weight.to(dtype), bias)
    return out.to(weight.dtype)

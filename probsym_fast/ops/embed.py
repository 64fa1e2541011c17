"""Permuted graphs to tokens, without forming the permuted graph."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._checks import check_float, looks_at_values
from probsym_fast.ops._op import Op
from probsym_fast.ops._patches import (
    check_devices,
    check_padding,
    check_patches,
    check_ptr,
    common_dtype,
    gradient_shapes,
    padded_axis,
    soft_parts,
)
from probsym_fast.ops.permutation import Permutation
from probsym_fast.ops.reference.embed import check_values
from probsym_fast.ops.reference.embed import embed as reference


def _shapes(items, values, ptr, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight, bias):
    return weight.new_empty(*rank.shape[:2], grid ** (weight.ndim - 2), weight.shape[0])


def _gradient_shapes(
    d_tokens, items, values, ptr, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight, *needs
):
    return gradient_shapes(values, t, weight, weight.shape[0], needs)


OP = Op(
    "embed",
    "(Tensor items, Tensor values, Tensor ptr, Tensor rank, Tensor order, Tensor? t, Tensor? log_r, Tensor? log_c,"
    " float tau, Tensor slots, int most_places, int grid, Tensor weight, Tensor? bias) -> Tensor tokens",
    reference=reference,
    values=check_values,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_tokens, Tensor items, Tensor values, Tensor ptr, Tensor rank, Tensor order, Tensor? t, Tensor? log_r,"
    " Tensor? log_c, float tau, Tensor slots, int most_places, int grid, Tensor weight, bool needs_values, bool needs_t,"
    " bool needs_weight, bool needs_bias)"
    " -> (Tensor d_values, Tensor d_t, Tensor d_log_r, Tensor d_log_c, Tensor d_weight, Tensor d_bias)",
    shapes=_gradient_shapes,
)


def embed_edges(
    edge_index: Tensor,
    edge_attr: Tensor,
    ptr: Tensor,
    p: Permutation,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: int,
    pad_mode: str = "zeros",
    centered: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Tokens of the permuted adjacency matrix, `tokens = conv2d(pad(A'), weight, bias, stride=P)`.

    A (N, N, C) is zero but for `A[u, v] = sum of edge_attr over edges (u, v)`, the action is
    `A'[rank[u], rank[v]] = A[u, v]`, and N slots are padded to grid P with P = max(1, ceil(N / grid)).

    Args:
        edge_index: (2, E) int64, global node numbers. edge_attr: (E, C). ptr: (B + 1,) int64, offsets of the graphs.
        p: permutations (B, S, N); a SoftPermutation gets the straight-through gradient.
        weight: (D, C, P, P), as in Conv2d; no copy if stored with D innermost (`models.PatchWeight`).
        bias: (D,). grid: patches along an axis; grid 1 makes one token of the whole matrix.
        pad_mode: "zeros", "replicate", "reflect" or "circular", even for padding longer than N. centered: half of the
            padding in front (rounded down), else all of it at the end.
        backend: "auto", "cpu", "triton" or "reference".

    Returns: (B, S, grid^2, D), tokens row by row; dtype of the weight.

    Gradients: edge_attr, weight, bias, p. Cost, kernel: E C D multiplications per sample for the nonzero values and one
    write of the tokens. Gradient to p: 2 E n D per sample, or a matrix product if that is less; it saves no N x N matrix
    per sample.
    Raises: TypeError (dtypes), ValueError (shapes, node numbers, pad_mode), RuntimeError (devices, backend). On a GPU node
    numbers are checked only in debug mode (`probsym_fast.debug`); otherwise those out of range count as no nodes.
    Source: the input map of Kim et al. 2023 (arXiv 2306.02866).
    """
    op = "embed_edges"
    if not isinstance(edge_index, Tensor) or edge_index.dtype != torch.int64:
        raise TypeError(
            f"{op}: edge_index must be an int64 Tensor, got {getattr(edge_index, 'dtype', type(edge_index).__name__)}"
        )
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"{op}: edge_index must be (2, E), got {tuple(edge_index.shape)}")
    return _embed(op, edge_index, "edge_attr", edge_attr, ptr, p, weight, bias, grid, pad_mode, centered, backend)


def embed_nodes(
    x: Tensor,
    ptr: Tensor,
    p: Permutation,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tokens: int,
    pad_mode: str = "zeros",
    centered: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Tokens of the permuted node features, `tokens = conv1d(pad(X'), weight, bias, stride=P)`, `X'[rank[u]] = x[u]`.

    Args:
        x: (nodes, C). weight: (D, C, P) with P = max(1, ceil(N / tokens)). tokens: segments of the slots.
        Others as in `embed_edges`.

    Returns: (B, S, tokens, D). Gradients: x, weight, bias, p. Raises as `embed_edges`.
    """
    op = "embed_nodes"
    check_ptr(op, ptr, p)
    check_float(op, x=x)
    if x.ndim != 2 or (looks_at_values(ptr) and x.shape[0] != int(ptr[-1])):
        raise ValueError(f"{op}: x must be (nodes, C) with as many nodes as ptr ends with, got {tuple(x.shape)}")
    nodes = torch.arange(x.shape[0], device=x.device)[None]
    return _embed(op, nodes, "x", x, ptr, p, weight, bias, tokens, pad_mode, centered, backend)


def _embed(op, items, name, values, ptr, p, weight, bias, grid, pad_mode, centered, backend) -> Tensor:
    check_ptr(op, ptr, p)
    check_padding(op, pad_mode, centered)
    dtype = common_dtype(op, OP, backend, weight=weight, **{name: values}, bias=bias)
    N, k = p.shape[-1], items.shape[0]
    grid = check_patches(op, weight, bias, N, grid, k, bias_axis=0)
    check_devices(op, weight.device, ptr=ptr, edge_index=items)
    if values.shape != (items.shape[1], weight.shape[1]):
        raise ValueError(f"{op}: {name} must be {(items.shape[1], weight.shape[1])}, got {tuple(values.shape)}")
    axis = padded_axis(N, grid, pad_mode, centered, ptr.device)
    run = OP.select(backend, weight.device, dtype)
    bias = None if bias is None else bias.to(dtype)
    out = run(items, values.to(dtype), ptr, *soft_parts(p, dtype), *axis, weight.to(dtype), bias)
    return out.to(weight.dtype)

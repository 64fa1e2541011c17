"""Rows moved by permutations, in linear time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probsym_fast._checks import check_bool
from probsym_fast.ops._op import Op
from probsym_fast.ops._patches import check_devices, check_parts, soft_parts
from probsym_fast.ops.permutation import Permutation
from probsym_fast.ops.reference.permute import permute as reference


def _gradient_shapes(d_y, x, rank, order, num_nodes, t, log_r, log_c, tau, inverse, needs_x, needs_t):
    soft = [t.new_empty(t.shape) if needs_t else None for _ in range(3)]
    return x.new_empty(x.shape) if needs_x else None, *soft


OP = Op(
    "permute",
    "(Tensor x, Tensor rank, Tensor order, Tensor? num_nodes, Tensor? t, Tensor? log_r, Tensor? log_c, float tau,"
    " bool inverse) -> Tensor y",
    reference=reference,
    shapes=lambda x, rank, *_: x.new_empty(*rank.shape, x.shape[-1]),
)
OP.gradient(
    "(Tensor d_y, Tensor x, Tensor rank, Tensor order, Tensor? num_nodes, Tensor? t, Tensor? log_r, Tensor? log_c,"
    " float tau, bool inverse, bool needs_x, bool needs_t) -> (Tensor d_x, Tensor d_t, Tensor d_log_r, Tensor d_log_c)",
    shapes=_gradient_shapes,
)


def permute(p: Permutation, x: Tensor, *, inverse: bool = False, backend: str = "auto") -> Tensor:
    """The product of a permutation matrix and rows: `y = P x`, or `y = P^T x`, with the soft permutation's gradient.

    `P x` gives every node what its slot holds, `y[u] = x[rank[u]]`. With `inverse` y holds the nodes in the order of their
    slots, `y[j] = x[order[j]]`: it sorts.

    Args:
        p: a permutation (..., N), hard or soft.
        x: (..., N) or (..., N, features...), any dtype; leading axes as those of p, or 1 where all share the rows.
        inverse: P^T in place of P. backend: "auto", "cpu", "triton" or "reference".

    Returns: the leading axes of p, then N and the features; x's dtype.

    Gradients: x, and p, whose value is hard and whose gradient is that of `p.soft()`; none of integers. Cost, kernel: O(N
    features) per sample, forward and backward; reference: a matrix N x N per sample for the gradient to p.
    Raises: TypeError (p, x no Tensor), ValueError (shapes), RuntimeError (devices, missing backend).
    """
    op = "permute"
    check_parts(op, p)
    inverse = check_bool(op, "inverse", inverse)
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a Tensor, got {type(x).__name__}")
    lead, N = tuple(p.shape[:-1]), p.shape[-1]
    fits = x.ndim > len(lead) and x.shape[len(lead)] == N
    if not fits or any(a != b and a != 1 for a, b in zip(x.shape, lead, strict=False)):
        wanted = ", ".join([*map(str, lead), str(N)])
        raise ValueError(
            f"{op}: x must be ({wanted}, features...) as p is, or 1 along its first axes, got {tuple(x.shape)}"
        )
    check_devices(op, p.order.device, x=x)
    if x.is_complex():
        y = permute(p, torch.view_as_real(x.resolve_conj()), inverse=inverse, backend=backend)
        return torch.view_as_complex(y.contiguous())
    features = tuple(x.shape[len(lead) + 1 :])
    flat = p.of_samples()
    B, S, _ = flat.shape
    if all(n == 1 for n in x.shape[1 : len(lead)]):
        x = x.reshape(x.shape[0] if lead else 1, 1, N, math.prod(features))
        x = x if x.shape[0] == B else x.expand(B, -1, -1, -1)
    else:
        x = x.expand(*lead, N, *features).reshape(B, S, N, math.prod(features))
    if not x.is_floating_point():
        index = (flat.order if inverse else flat.rank)[..., None]
        y = x.expand(-1, S, -1, -1).gather(2, index.expand(B, S, N, x.shape[-1]))
        return y.reshape(*lead, N, *features)
    dtype = OP.compute_dtype(backend, x.device, x.dtype)
    run = OP.select(backend, x.device, dtype)
    rank, order, *soft, tau = soft_parts(flat, dtype)
    if not flat.requires_grad:
        soft = [None] * 3
    y = run(x.to(dtype), rank, order, flat.num_nodes, *soft, tau, inverse)
    return y.to(x.dtype).reshape(*lead, N, *features)


Permutation.product = permute  # for `p @ x`; that module cannot import this one

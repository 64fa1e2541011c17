"""Tokens back to nodes and pairs, averaged over the samples."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast.ops._op import Op
from probsym_fast.ops._patches import (
    check_devices,
    check_patches,
    check_ptr,
    common_dtype,
    count_nodes,
    gradient_shapes,
    padded_axis,
    soft_parts,
)
from probsym_fast.ops.permutation import Permutation
from probsym_fast.ops.reference.readout import check_values
from probsym_fast.ops.reference.readout import readout as reference


def _shapes(tokens, items, ptr, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight, bias):
    return tokens.new_empty(items.shape[1], weight.shape[1])


def _gradient_shapes(
    d_values, tokens, items, ptr, rank, order, t, log_r, log_c, tau, slots, most_places, grid, weight, *needs
):
    return gradient_shapes(tokens, t, weight, weight.shape[1], needs)


OP = Op(
    "readout",
    "(Tensor tokens, Tensor items, Tensor ptr, Tensor rank, Tensor order, Tensor? t, Tensor? log_r, Tensor? log_c,"
    " float tau, Tensor slots, int most_places, int grid, Tensor weight, Tensor? bias) -> Tensor values",
    reference=reference,
    values=check_values,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_values, Tensor tokens, Tensor items, Tensor ptr, Tensor rank, Tensor order, Tensor? t, Tensor? log_r,"
    " Tensor? log_c, float tau, Tensor slots, int most_places, int grid, Tensor weight, bool needs_tokens, bool needs_t,"
    " bool needs_weight, bool needs_bias)"
    " -> (Tensor d_tokens, Tensor d_t, Tensor d_log_r, Tensor d_log_c, Tensor d_weight, Tensor d_bias)",
    shapes=_gradient_shapes,
)


def readout(
    tokens: Tensor,
    ptr: Tensor,
    p: Permutation,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    at: str | Tensor = "nodes",
    nodes: int | None = None,
    centered: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Outputs mapped back to the nodes, `y[u] = mean_s Z_s[rank_s[u]]` or `y[u, v] = mean_s Z_s[rank_s[u], rank_s[v]]`.

    Z is the transposed convolution of the tokens with stride P, cropped to the N slots; only the entries read are computed.
    The bias is added after the mean: it is the same for every permutation, and not part of their gradient.

    Args:
        tokens: (B, S, L, D). ptr: (B + 1,) int64. p: permutations (B, S, N), as in `embed_edges`.
        weight: at="nodes": (D, C, P), as in ConvTranspose1d, P = max(1, ceil(N / L)); else (D, C, P, P), as in
            ConvTranspose2d, L = grid^2, P = max(1, ceil(N / grid)). bias: (C,).
        at: "nodes", "diagonal" (pairs (u, u) of the N x N map), or int64 global node numbers: (1, M) nodes, (2, M) pairs.
        nodes: ptr's last entry, for torch.compile, and to avoid waiting for a GPU.
        centered: the N slots are the middle of the map (as `embed_edges` pads), else its start.
        backend: "auto", "cpu", "triton" or "reference".

    Returns: (nodes, C), (nodes, C) or (M, C), dtype of the tokens.

    Gradients: tokens, weight, bias, p. Cost, kernel: S M C D multiplications; to p as in `embed_edges`.
    Raises: TypeError (dtypes), ValueError (shapes, node numbers, at), RuntimeError (devices, backend).
    """
    check_ptr("readout", ptr, p)
    dtype = common_dtype("readout", OP, backend, tokens=tokens, weight=weight, bias=bias)
    B, S, N = p.shape
    if weight.ndim < 3:
        raise ValueError(f"readout: weight must be (D, C, P) or (D, C, P, P), got {tuple(weight.shape)}")
    if tokens.ndim != 4 or tokens.shape[:2] != (B, S) or tokens.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"readout: tokens must be (B, S, L, D) = ({B}, {S}, *, {weight.shape[0]}), got {tuple(tokens.shape)}"
        )
    items, L = _items(at, ptr, nodes), tokens.shape[2]
    axes = items.shape[0]
    grid = L if axes == 1 else round(L**0.5)
    if axes == 2 and grid * grid != L:
        raise ValueError(f"readout: tokens must have a square number L for pairs, got {L}")
    check_patches("readout", weight, bias, N, grid, axes, bias_axis=1)
    check_devices("readout", tokens.device, ptr=ptr, at=items)
    axis = padded_axis(N, grid, "zeros", centered, ptr.device)
    run = OP.select(backend, tokens.device, dtype)
    bias = None if bias is None else bias.to(dtype)
    out = run(tokens.to(dtype), items, ptr, *soft_parts(p, dtype), *axis, weight.to(dtype), bias)
    return out.to(tokens.dtype)


def _items(at: str | Tensor, ptr: Tensor, nodes: int | None) -> Tensor:
    if isinstance(at, Tensor):
        if at.dtype != torch.int64:
            raise TypeError(f"readout: at must be int64 node numbers, got {at.dtype}")
        if at.ndim != 2 or at.shape[0] not in (1, 2):
            raise ValueError(f"readout: at must be (1, M) or (2, M), got {tuple(at.shape)}")
        return at
    if at not in ("nodes", "diagonal"):
        raise ValueError(f'readout: at must be "nodes", "diagonal" or node numbers (1 or 2, M), got {at!r}')
    everyone = torch.arange(count_nodes("readout", ptr, nodes), device=ptr.device)
    return everyone[None] if at == "nodes" else torch.stack([everyone, everyone])

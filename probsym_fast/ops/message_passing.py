"""Message passing on complete graphs, all layers in one pass."""

from __future__ import annotations

from torch import Tensor

from probsym_fast._checks import check_bool, check_counts, check_float
from probsym_fast.ops._op import Op
from probsym_fast.ops._weights import beyond, check_weights, kept_rows, needs_kept
from probsym_fast.ops.reference.message_passing import message_passing as reference

MOST = {"features": 4096, "layers": 1024}  # of the kernels, as in csrc/cpu/message_passing.cpp
MOST_ON_GPU = MOST | {"features of the width or output": 256}


def _shapes(x, edges, weights, width, layers, out_features, keep, allow_bf16):
    M, n, _ = x.shape
    y = x.new_empty(M, n, out_features)
    return y, x.new_empty(kept_rows(M) if keep else 0, (layers + 1) * n * width)


def _gradient_shapes(
    d_y, x, edges, weights, kept, width, layers, out_features, needs_x, needs_edges, needs_weights, allow_bf16
):
    return tuple(
        like.new_empty(like.shape) if needed else None
        for like, needed in ((x, needs_x), (edges, needs_edges), (weights, needs_weights))
    )


OP = Op(
    "message_passing",
    "(Tensor x, Tensor edges, Tensor weights, int width, int layers, int out_features, bool keep,"
    " bool allow_bf16) -> (Tensor y, Tensor kept)",
    reference=reference,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_y, Tensor x, Tensor edges, Tensor weights, Tensor kept, int width, int layers, int out_features,"
    " bool needs_x, bool needs_edges, bool needs_weights, bool allow_bf16)"
    " -> (Tensor d_x, Tensor d_edges, Tensor d_weights)",
    shapes=_gradient_shapes,
    others={"keep": lambda known: False},
)


def message_passing(
    x: Tensor,
    edges: Tensor,
    weights: Tensor,
    *,
    width: int,
    layers: int,
    out_features: int,
    recompute: bool = False,
    allow_bf16: bool = False,
    backend: str = "auto",
) -> Tensor:
    """A GNN on complete graphs without loops: `layers` times

        m_i = sum_{j != i} silu(message(silu(pair([h_i, h_j, e_ij])))),   h_i = end(silu(begin([h_i, m_i])))

    from `h = embed(x)`, then `y = out(silu(hidden(h)))`; all of these are linear maps. On a CPU a tile of graphs goes
    through all layers while it is in the cache; on a GPU each layer is three kernels.

    Args:
        x: (M, n, E), n >= 1. edges: (B, n, n, C), M a multiple of B: graph m has edges m // (M / B). Loops are not read.
        weights: (P,), one row of all parts, matrices as in Linear (out, in) row by row: embed.weight (width, E),
            embed.bias; for every layer pair.weight (width, 2 width + C), pair.bias, message.weight, message.bias,
            begin.weight (width, 2 width), begin.bias, end.weight, end.bias; hidden.weight, hidden.bias, out.weight
            (out_features, width), out.bias.
        recompute: the backward pass computes the layers again, tile by tile, instead of reading each layer's input.
        allow_bf16: in float32 the matrices may multiply values rounded to bfloat16 (denormal ones to 0), also in the backward
            pass, where the kernel does so faster (a CPU with AMX). Sums and all that is no linear map stay in float32.
            Second derivatives are those of the exact products.
        backend: "auto", "cpu" (n, widths and features at most 4096), "triton" (width and out_features at most 256) or
            "reference".

    Returns: (M, n, out_features) in the dtype of x; float16 and bfloat16 compute in float32.

    Gradients: x, edges (0 for loops) and weights. Saves the arguments and, unless `recompute`, the input of every layer.
    The gradient of the weights is summed over at most 16 parts of the batch, in their order for any number of threads; on
    a GPU by products of the library over parts of the batch, without atomics.
    Raises: TypeError (dtypes), ValueError (shapes, sizes), RuntimeError (devices, backend).
    Source: Satorras et al. 2021 (arXiv 2102.09844), their GNN.
    """
    op = "message_passing"
    check_float(op, x=x, edges=edges, weights=weights)
    width, layers, out_features = check_counts(op, width=width, layers=layers, out_features=out_features)
    recompute, allow_bf16 = check_bool(op, "recompute", recompute), check_bool(op, "allow_bf16", allow_bf16)
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"{op}: x must be (M, n, E) with n, E >= 1, got {tuple(x.shape)}")
    M, n, features = x.shape
    if edges.ndim != 4 or tuple(edges.shape[1:3]) != (n, n):
        raise ValueError(f"{op}: edges must be (B, n, n, C) = (*, {n}, {n}, *), got {tuple(edges.shape)}")
    if M % edges.shape[0] if edges.shape[0] else M:
        raise ValueError(f"{op}: M must be a multiple of edges' B = {edges.shape[0]}, got {M}")
    if edges.dtype != x.dtype:
        raise TypeError(f"{op}: edges must be {x.dtype} as x is, got {edges.dtype}")
    if edges.device != x.device:
        raise RuntimeError(f"{op}: edges must be on {x.device}, got {edges.device}")
    check_weights(op, weights, x, weights_of(features, edges.shape[-1], width, layers, out_features))
    dtype = OP.compute_dtype(backend, x.device, x.dtype)
    lacking = beyond_kernels(x.device.type, features, edges.shape[-1], width, layers, out_features)
    if lacking is None:
        run = OP.select(backend, x.device, dtype)
    else:
        run = OP.without_kernel(backend, x.device, lacking)
    keep = needs_kept(recompute, x, edges, weights)
    y, _ = run(x.to(dtype), edges.to(dtype), weights.to(dtype), width, layers, out_features, keep, allow_bf16)
    return y.to(x.dtype)


def beyond_kernels(
    device: str, in_features: int, edge_features: int, width: int, layers: int, out_features: int
) -> str | None:
    """Why the kernels for a device type do not take these sizes; None: they do."""
    found, most = {"features": max(in_features, edge_features, width, out_features), "layers": layers}, MOST
    if device == "cuda":
        found, most = found | {"features of the width or output": max(width, out_features)}, MOST_ON_GPU
    return beyond(found, most)


def weights_of(in_features: int, edge_features: int, width: int, layers: int, out_features: int) -> int:
    """How many weights there are."""
    layer = (2 * width + edge_features + 1) * width + 2 * (width + 1) * width + (2 * width + 1) * width
    return (in_features + 1) * width + layers * layer + (width + 1) * (width + out_features)

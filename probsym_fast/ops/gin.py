"""GIN of one linear map a layer, all layers in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._checks import check_bool, check_counts, check_float
from probsym_fast.ops._op import Op
from probsym_fast.ops._weights import beyond, check_weights, needs_kept
from probsym_fast.ops.reference._parts import FUNCTIONS
from probsym_fast.ops.reference.gin import check_values
from probsym_fast.ops.reference.gin import gin as reference

ACTIVATIONS = tuple(FUNCTIONS)
MOST = {"features": 4096, "layers": 1024}  # of the kernels, as in csrc/cpu/gin.cpp


def _shapes(x, edge_index, ptr, weights, layers, out_features, activation, final, keep):
    return x.new_empty(ptr.shape[0] - 1, x.shape[1], out_features), x.new_empty(layers if keep else 0, *x.shape)


def _gradient_shapes(
    d_y, x, edge_index, ptr, weights, kept, layers, out_features, activation, final, needs_x, needs_weights
):
    return (
        x.new_empty(x.shape) if needs_x else None,
        weights.new_empty(weights.shape) if needs_weights else None,
    )


OP = Op(
    "gin",
    "(Tensor x, Tensor edge_index, Tensor ptr, Tensor weights, int layers, int out_features, int activation, bool final,"
    " bool keep) -> (Tensor y, Tensor kept)",
    reference=reference,
    values=check_values,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_y, Tensor x, Tensor edge_index, Tensor ptr, Tensor weights, Tensor kept, int layers, int out_features,"
    " int activation, bool final, bool needs_x, bool needs_weights) -> (Tensor d_x, Tensor d_weights)",
    shapes=_gradient_shapes,
    others={"keep": lambda known: False},
)


def gin(
    x: Tensor,
    edge_index: Tensor,
    ptr: Tensor,
    weights: Tensor,
    *,
    layers: int,
    out_features: int,
    activation: str = "relu",
    final: bool = False,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """GIN with one linear map a layer, and a linear map of the sums over nodes: `layers` times

        h_v = act(W_k ((1 + eps_k) h_v + sum of h_u over edges (u, v)) + b_k),   y = out(sum of h_v over the graph's nodes)

    from h = x. The first layer has no W: a linear map before the sum does the same. With `final` the activation comes
    after `out` too. On a CPU some samples of a graph go through all layers while they are in the cache; on a GPU each layer
    is two kernels, and the neighbours of all nodes are listed once.

    Args:
        x: (nodes, S, width). edge_index: (2, E) int64, sources and targets. ptr: (B + 1,) int64, where each graph's nodes
            begin. weights: (P,), one row of all parts, matrices as in Linear (out, in) row by row: eps (layers,), the first
            bias (width,); for every further layer weight (width, width), bias; out.weight (out_features, width), out.bias.
        activation: "tanh", "relu", "gelu" (with erf) or "silu".
        recompute: the backward pass computes the layers again, graph by graph, instead of reading each layer's output.
        backend: "auto", "cpu", "triton" (width and out_features at most 4096, layers 1024) or "reference".

    Returns: (B, S, out_features) in the dtype of x; float16 and bfloat16 compute in float32.

    Gradients: x and weights. Saves the arguments and, unless `recompute`, the output of every layer. The gradient of the
    weights is summed over at most 16 parts of the batch, in their order for any number of threads; on a GPU by products of
    the library over parts of the samples. There the order of a node's neighbours in its sum varies, unless in torch's
    deterministic mode.
    Raises: TypeError (dtypes), ValueError (shapes, sizes, activation, ptr, node numbers), RuntimeError (devices, backend).
    Source: Xu et al. 2019 (arXiv 1810.00826).
    """
    op = "gin"
    check_float(op, x=x, weights=weights)
    layers, out_features = check_counts(op, layers=layers, out_features=out_features)
    final, recompute = check_bool(op, "final", final), check_bool(op, "recompute", recompute)
    if x.ndim != 3 or x.shape[2] < 1:
        raise ValueError(f"{op}: x must be (nodes, S, width) with width >= 1, got {tuple(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    for name, value in (("edge_index", edge_index), ("ptr", ptr)):
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be int64, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.device != x.device:
            raise RuntimeError(f"{op}: {name} must be on {x.device}, got {value.device}")
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"{op}: edge_index must be (2, E), got {tuple(edge_index.shape)}")
    if ptr.ndim != 1 or ptr.shape[0] < 1:
        raise ValueError(f"{op}: ptr must be (B + 1,), got {tuple(ptr.shape)}")
    check_weights(op, weights, x, weights_of(x.shape[2], layers, out_features))
    dtype = OP.compute_dtype(backend, x.device, x.dtype)
    if (lacking := beyond_kernels(x.shape[2], layers, out_features)) is None:
        run = OP.select(backend, x.device, dtype)
    else:
        run = OP.without_kernel(backend, x.device, lacking)
    which, keep = ACTIVATIONS.index(activation), needs_kept(recompute, x, weights)
    y, _ = run(x.to(dtype), edge_index, ptr, weights.to(dtype), layers, out_features, which, final, keep)
    return y.to(x.dtype)


def beyond_kernels(width: int, layers: int, out_features: int) -> str | None:
    """Why the kernels do not take these sizes; None: they do."""
    return beyond({"features": max(width, out_features), "layers": layers}, MOST)


def weights_of(width: int, layers: int, out_features: int) -> int:
    """How many weights there are."""
    return layers + width + (layers - 1) * (width + 1) * width + (width + 1) * out_features

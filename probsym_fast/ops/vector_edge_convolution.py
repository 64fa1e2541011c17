"""The edge convolution of Vector Neurons."""

from __future__ import annotations

from inspect import signature

import torch
from torch import Tensor

from probsym_fast._checks import check_count, check_float
from probsym_fast.ops._op import Op
from probsym_fast.ops._weights import beyond
from probsym_fast.ops.reference.vector_edge_convolution import check_values
from probsym_fast.ops.reference.vector_edge_convolution import vector_edge_convolution as reference
from probsym_fast.ops.reference.vector_edge_second import convolution_of_taken


def _shapes(x, feature, direction, pool, gain, bias, running_mean, running_var, num_nodes, neighbors):
    _, d, n, M = x.shape
    w = feature.shape[0]
    taken, count = x.new_empty(w, n, M, dtype=torch.uint8), x.new_empty((), dtype=torch.int64)
    return x.new_empty(w, d, n, M), taken, x.new_empty(w), x.new_empty(w), count


def _gradient_shapes(d_y, x, feature, direction, pool, gain, bias, *others):
    needs_x = others[-1]
    return x.new_empty(x.shape) if needs_x else None, *(t.new_empty(t.shape) for t in (feature, direction, gain, bias))


MOST = {
    "nodes": 256,
    "channels": 4096,
    "components": 4096,
}  # of the kernels, as in csrc/cpu/vector_edge_convolution.cpp
OF_TAKEN = signature(convolution_of_taken).parameters
MOST_ON_GPU = MOST | {"components": 16}
OP = Op(
    "vector_edge_convolution",
    "(Tensor x, Tensor feature, Tensor direction, Tensor pool, Tensor gain, Tensor bias, Tensor? running_mean,"
    " Tensor? running_var, Tensor? num_nodes, int neighbors)"
    " -> (Tensor y, Tensor taken, Tensor mean, Tensor variance, Tensor count)",
    reference=reference,
    values=check_values,
    shapes=_shapes,
)
OP.gradient(
    "(Tensor d_y, Tensor x, Tensor feature, Tensor direction, Tensor pool, Tensor gain, Tensor bias, Tensor? running_mean,"
    " Tensor? running_var, Tensor? num_nodes, Tensor taken, Tensor mean, Tensor variance, Tensor count, int neighbors,"
    " bool needs_x) -> (Tensor d_x, Tensor d_feature, Tensor d_direction, Tensor d_gain, Tensor d_bias)",
    shapes=_gradient_shapes,
    results=lambda known: (convolution_of_taken(**{name: known[name] for name in OF_TAKEN}), *(None,) * 4),
)


def vector_edge_convolution(
    x: Tensor,
    feature: Tensor,
    direction: Tensor,
    pool: Tensor,
    gain: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None = None,
    *,
    neighbors: int,
    num_nodes: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vector features of nodes from those of their nearest nodes, in clouds of points.

    For every node i and each of the nodes j nearest to it, with e = [x_j - x_i, x_i],

        p = feature e,   q = direction e,   r = (gain (|p| - mean) / sqrt(variance + 1e-5) + bias) p / |p|
        y_ij = r - 0.8 min(<r, q>, 0) q / (<q, q> + 1e-6)

    for each of w channels; then y_i is, per channel, the y_ij with the largest <y_ij, pool y_ij>. An orthogonal matrix on
    all vectors of x acts likewise on y. |p| is sqrt(<p, p> + 1e-12).

    Args:
        x: (C, d, n, M), C vectors of each of the n nodes of M clouds. feature, direction: (w, 2 C). pool: (w, w).
        gain, bias: (w,). running: mean and variance (w,) to use; None: those of |p| over the near pairs of all clouds.
        neighbors: k, the nodes nearest to a node over all channels, itself and all as far as the k-th included.
        num_nodes: (M,) int64, 0 to n, the first nodes of each cloud that are valid; None: all. Other nodes are not read, are
            near to none, and give 0. On a CPU time grows with the nodes of the largest of 16 neighbouring clouds, 8 in
            float64: sort the clouds by size.
        backend: "auto", "cpu" (n at most 256; C, d and w at most 4096), "triton" (d at most 16) or "reference".

    Returns: y (w, d, n, M) in the dtype of x; and without a gradient, for running statistics, mean, (biased) variance (w,)
    and the number of near pairs, () int64, 0 with `running`. float16 and bfloat16 compute, and return statistics, in float32.

    Gradients: x, feature, direction, gain, bias, also through the batch's statistics; none for pool, which only chooses, nor
    for running. Saves the arguments and the chosen j, and computes the pairs again, a few clouds at a time. The gradients of
    the weights are summed over at most 16 parts of the batch, in their order for any number of threads; on a GPU by products
    of the library over parts of the batch, without atomics. Cost: n^2 w (w + d) d multiplications per cloud.
    Raises: TypeError (dtypes), ValueError (shapes, counts, M = 0 without `running`), RuntimeError (devices, backend).
    Source: Deng et al. 2021 (arXiv 2104.12229), Wang et al. 2019 (arXiv 1801.07829).
    """
    op = "vector_edge_convolution"
    check_float(op, x=x, feature=feature, direction=direction, pool=pool, gain=gain, bias=bias)
    neighbors = check_count(op, "neighbors", neighbors)
    if x.ndim != 4 or x.shape[0] < 1 or x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"{op}: x must be (C, d, n, M) with C, d, n >= 1, got {tuple(x.shape)}")
    C, w = x.shape[0], gain.shape[0] if gain.ndim else 0
    if w < 1:
        raise ValueError(f"{op}: gain must be (w,) with w >= 1, got {tuple(gain.shape)}")
    if running is not None and (
        not isinstance(running, tuple | list) or len(running) != 2 or any(t is None for t in running)
    ):
        raise TypeError(f"{op}: running must be (mean, variance) or None, got {type(running).__name__}")
    if num_nodes is not None:
        if not isinstance(num_nodes, Tensor) or num_nodes.dtype != torch.int64:
            got = num_nodes.dtype if isinstance(num_nodes, Tensor) else type(num_nodes).__name__
            raise TypeError(f"{op}: num_nodes must be int64, got {got}")
        if tuple(num_nodes.shape) != (x.shape[3],):
            raise ValueError(f"{op}: num_nodes must be (M,) = ({x.shape[3]},), got {tuple(num_nodes.shape)}")
        if num_nodes.device != x.device:
            raise RuntimeError(f"{op}: num_nodes must be on {x.device}, got {num_nodes.device}")
    mean, variance = (None, None) if running is None else running
    sizes = {"gain": (w,), "bias": (w,), "feature": (w, 2 * C), "direction": (w, 2 * C), "pool": (w, w)}
    given = {"gain": gain, "bias": bias, "feature": feature, "direction": direction, "pool": pool}
    if mean is not None and variance is not None:
        check_float(op, mean=mean, variance=variance)
        sizes |= {"mean": (w,), "variance": (w,)}
        given |= {"mean": mean, "variance": variance}
    elif x.shape[3] < 1:
        raise ValueError(f"{op}: x must have M >= 1 clouds without running statistics, got {tuple(x.shape)}")
    for name, value in given.items():
        if tuple(value.shape) != sizes[name]:
            letters = {1: "(w,)", 2: "(w, w)" if name == "pool" else "(w, 2 C)"}[len(sizes[name])]
            raise ValueError(f"{op}: {name} must be {letters} = {sizes[name]}, got {tuple(value.shape)}")
        if value.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must be {x.dtype} as x is, got {value.dtype}")
        if value.device != x.device:
            raise RuntimeError(f"{op}: {name} must be on {x.device}, got {value.device}")
    dtype = OP.compute_dtype(backend, x.device, x.dtype)
    if (lacking := beyond_kernels(x.device.type, tuple(x.shape), w)) is None:
        run = OP.select(backend, x.device, dtype)
    else:
        run = OP.without_kernel(backend, x.device, lacking)
    statistics = (None if t is None else t.to(dtype) for t in (mean, variance))
    weights = (t.to(dtype) for t in (feature, direction, pool, gain, bias))
    y, _, mean, variance, count = run(x.to(dtype), *weights, *statistics, num_nodes, neighbors)
    return y.to(x.dtype), mean.detach(), variance.detach(), count


def beyond_kernels(device: str, shape: tuple[int, ...], width: int) -> str | None:
    """Why the kernels for a device type do not take x of a shape (C, d, n, M) and w = width; None: they do."""
    C, d, n, _ = shape
    found = {"nodes": n, "channels": max(C, width), "components": d}
    return beyond(found, MOST_ON_GPU if device == "cuda" else MOST)

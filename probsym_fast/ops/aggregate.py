"""Message sums over one graph for all samples at once."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast.ops._op import Op, check_float
from probsym_fast.ops.reference.aggregate import aggregate as reference

OP = Op(
    "aggregate",
    "(Tensor x, Tensor edge_index) -> Tensor sums",
    reference=reference,
    shapes=lambda x, edge_index: x.new_empty(x.shape),
)
OP.gradient(
    "(Tensor d_sums, Tensor edge_index) -> Tensor d_x", shapes=lambda d_sums, edge_index: d_sums.new_empty(d_sums.shape)
)


def aggregate(x: Tensor, edge_index: Tensor, *, backend: str = "auto") -> Tensor:
    """`out[v] = sum of x[u] over edges (u, v)`: one adjacency for everything behind the node axis.

    Args:
        x: (nodes, ...), such as (nodes, S, d). edge_index: (2, E) int64, sources and targets.
        backend: "auto", "cpu" or "reference".

    Returns: (nodes, ...), dtype of x (float16, bfloat16 are summed in float32).

    Gradients: x. Cost: E rows read, every row written once.
    Raises: TypeError (dtypes), ValueError (shapes, node numbers), RuntimeError (devices, backend).
    """
    check_float("aggregate", x=x)
    if not isinstance(edge_index, Tensor) or edge_index.dtype != torch.int64:
        raise TypeError(
            f"aggregate: edge_index must be int64, got {getattr(edge_index, 'dtype', type(edge_index).__name__)}"
        )
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or x.ndim < 1:
        raise ValueError(
            f"aggregate: edge_index must be (2, E) and x (nodes, ...), got {tuple(edge_index.shape)}, {tuple(x.shape)}"
        )
    if edge_index.device != x.device:
        raise RuntimeError(f"aggregate: edge_index must be on {x.device}, got {edge_index.device}")
    dtype = x.dtype if x.dtype in OP.dtypes else torch.float32
    return OP.select(backend, x.device, dtype)(x.to(dtype), edge_index).to(x.dtype)

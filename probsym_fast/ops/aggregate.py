"""Sums of messages over one graph, for all samples at once."""

from __future__ import annotations

import torch
from torch import Tensor

from probsym_fast._autocast import promoted
from probsym_fast._checks import check_float
from probsym_fast.ops._op import Op
from probsym_fast.ops.reference.aggregate import aggregate as reference
from probsym_fast.ops.reference.aggregate import check_values

OP = Op(
    "aggregate",
    "(Tensor x, Tensor edge_index, Tensor? ptr, Tensor? own) -> Tensor sums",
    reference=reference,
    values=check_values,
    shapes=lambda x, edge_index, ptr, own: x.new_empty(x.shape),
)
OP.gradient(
    "(Tensor d_sums, Tensor x, Tensor edge_index, Tensor? ptr, Tensor? own, bool needs_x, bool needs_own)"
    " -> (Tensor d_x, Tensor d_own)",
    shapes=lambda d_sums, x, edge_index, ptr, own, needs_x, needs_own: (
        x.new_empty(x.shape) if needs_x else None,
        own.new_empty(()) if needs_own else None,
    ),
)


def aggregate(
    x: Tensor, edge_index: Tensor, *, own: Tensor | None = None, ptr: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """`out[v] = own x[v] + sum of x[u] over edges (u, v)`: one adjacency for all axes after the node axis.

    With `ptr` every graph has a virtual node, joined to itself and in both directions to all nodes of its graph, without
    explicit edges. Virtual nodes are the last B rows.

    Args:
        x: (nodes, ...), such as (nodes, S, d); with ptr (nodes + B, ...). edge_index: (2, E) int64, sources and targets.
        own: scalar tensor, the weight of a node's own row (1 + eps in GIN); None: 0. ptr: (B + 1,) int64.
        backend: "auto", "cpu", "triton" or "reference".

    Returns: the shape and dtype of x (float16 and bfloat16 sum in float32).

    Gradients: x and own. Cost: reads E (with ptr + 3 nodes) rows, writes every row once.
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
    if ptr is not None and not isinstance(ptr, Tensor):
        raise TypeError(f"aggregate: ptr must be an int64 Tensor, got {type(ptr).__name__}")
    if ptr is not None and (ptr.dtype != torch.int64 or ptr.ndim != 1 or not 1 <= ptr.shape[0] <= x.shape[0] + 1):
        raise ValueError(
            f"aggregate: ptr must be (B + 1,) int64 with at most x's {x.shape[0]} rows for B, "
            f"got {ptr.dtype} {tuple(ptr.shape)}"
        )
    if own is not None and not isinstance(own, Tensor):
        raise TypeError(f"aggregate: own must be a scalar tensor, got {type(own).__name__}")
    if own is not None and own.ndim != 0:
        raise ValueError(f"aggregate: own must be a scalar tensor, got {tuple(own.shape)}")
    for name, value in (("ptr", ptr), ("own", own)):
        if value is not None and value.device != x.device:
            raise RuntimeError(f"aggregate: {name} must be on {x.device}, got {value.device}")
    dtype = OP.compute_dtype(backend, x.device, x.dtype)
    own = None if own is None else own.to(promoted(dtype, torch.float32))
    return OP.select(backend, x.device, dtype)(x.to(dtype), edge_index, ptr, own).to(x.dtype)

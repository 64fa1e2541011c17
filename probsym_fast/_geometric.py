"""Reads PyTorch Geometric data for `Graphs` and `PointClouds`, and refuses what they cannot hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from probsym_fast._checks import looks_at_values

OWNER = "Graphs.from_data"
# fields that change the meaning of edges or nodes, and what to do instead
REFUSED = {
    "adj_t": "read it with edge_index, edge_attr = torch_geometric.utils.to_edge_index(data.adj_t.t())",
    "edge_type": "pass it as edge_attr, for example torch.nn.functional.one_hot(data.edge_type)",
    "node_type": "pass it as x, for example torch.nn.functional.one_hot(data.node_type)",
}


def fields_of(data: Any) -> dict[str, Any]:
    """The fields of `Graphs`. Raises as `Graphs.from_data` for what `Graphs.check` cannot see."""
    check_kind(OWNER, data, "x", "edge_index")
    for name, way_out in REFUSED.items():
        if (value := getattr(data, name, None)) is not None:
            raise ValueError(f"{OWNER}: {name} must be None, as it is not read, got {_said(value)}; {way_out}")
    x, edge_index = getattr(data, "x", None), getattr(data, "edge_index", None)
    for name, axes, value in (("x", "(nodes, C)", x), ("edge_index", "(2, E)", edge_index)):
        if value is None:
            raise ValueError(f"{OWNER}: {name} must be {axes}, got None; the data hold {_held(data)}")
    x = _columns(OWNER, "x", x)
    if isinstance(x, Tensor) and x.ndim:
        nodes = getattr(data, "num_nodes", None)
        nodes = int(nodes) if isinstance(nodes, Tensor) and nodes.numel() == 1 and looks_at_values(nodes) else nodes
        if isinstance(nodes, int) and nodes != x.shape[0]:
            raise ValueError(f"{OWNER}: num_nodes must equal the {x.shape[0]} rows of x, got {nodes}")
    return {
        "x": x,
        "edge_index": edge_index,
        "ptr": _ptr(OWNER, data, x),
        "edge_attr": _edge_attr(data, edge_index),
        "key": _key(OWNER, data, x),
        "frame": getattr(data, "frame", None),
        "pairs": getattr(data, "edge_label_index", None),
    }


CLOUDS = "PointClouds.from_data"


def clouds_of(data: Any, features: str | Sequence[str], types: Sequence[int] | None) -> dict[str, Any]:
    """The fields of `PointClouds`, listed, with ptr. Raises as `PointClouds.from_data` for what `check` cannot see."""
    check_kind(CLOUDS, data, "pos")
    positions = getattr(data, "pos", None)
    if not isinstance(positions, Tensor) or positions.ndim != 2 or not positions.is_floating_point():
        got = (
            f"{tuple(positions.shape)} {positions.dtype}" if isinstance(positions, Tensor) else type(positions).__name__
        )
        raise ValueError(f"{CLOUDS}: pos must be (nodes, d) floating point, got {got}; the data hold {_held(data)}")
    names = [features] if isinstance(features, str) else list(features)
    columns = [_feature(data, name, positions, types) for name in names]
    if types is not None and not any(_is_type(data, name) for name in names):
        raise ValueError(f"{CLOUDS}: features must name an integer field (nodes,) with types, got {names}")
    ptr = _ptr(CLOUDS, data, positions)
    if isinstance(ptr, Tensor) and ptr.ndim == 1 and ptr.shape[0]:
        graph = torch.searchsorted(ptr, torch.arange(positions.shape[0], device=ptr.device), right=True) - 1
        check_agreement(CLOUDS, getattr(data, "batch", None), graph)
    return {
        "positions": positions,
        "velocities": getattr(data, "vel", None),
        "features": torch.cat(columns, 1) if columns else None,
        "key": _key(CLOUDS, data, positions),
        "ptr": ptr,
    }


def _is_type(data: Any, name: str) -> bool:
    """Whether it is an integer for each node."""
    values = getattr(data, name, None)
    return isinstance(values, Tensor) and values.ndim == 1 and values.dtype in (torch.int64, torch.int32, torch.uint8)


def _feature(data: Any, name: str, positions: Tensor, types: Sequence[int] | None) -> Tensor:
    """A field as features (nodes, F) in the dtype of the positions; integers (nodes,) as one of types, if given."""
    values, nodes = getattr(data, name, None), positions.shape[0]
    if not isinstance(values, Tensor) or values.ndim not in (1, 2) or values.shape[0] != nodes:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{CLOUDS}: {name} must be ({nodes},) or ({nodes}, F), got {got}; the data hold {_held(data)}")
    if types is not None and _is_type(data, name):
        known = torch.as_tensor(list(types), device=values.device)
        found = values[:, None] == known
        if looks_at_values(values) and not bool((hit := found.any(1)).all()):
            raise ValueError(f"{CLOUDS}: {name} must be one of types {tuple(types)}, got {int(values[~hit][0])}")
        return found.to(positions)
    return _columns(CLOUDS, name, values, positions.dtype).to(positions)


def _key(owner: str, data: Any, x: Any) -> Any:
    """The graphs' keys, also of a single Data, which has a number."""
    key = getattr(data, "key", None)
    if isinstance(x, Tensor) and key is not None:
        try:
            return torch.as_tensor(key, device=x.device).reshape(-1)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"{owner}: key must be one int64 number per graph, got {key!r}") from error
    return key


def check_kind(owner: str, data: Any, *read: str) -> None:
    """TypeError unless data is one graph or batch with one kind of nodes and edges."""
    kind = type(data).__name__
    if isinstance(data, (list, tuple)):
        way_out = "join the graphs with torch_geometric.data.Batch.from_data_list"
        raise TypeError(f"{owner}: batch must be one Data or Batch, got {kind} of {len(data)}; {way_out}")
    bases = {base.__name__ for base in type(data).__mro__}
    if "Dataset" in bases:
        way_out = "take one graph, or join them with torch_geometric.data.Batch.from_data_list(list(dataset))"
        raise TypeError(f"{owner}: batch must be one Data or Batch, got the data set {kind} of {len(data)}; {way_out}")
    if "HyperGraphData" in bases:
        raise TypeError(f"{owner}: batch must have edges between two nodes, got {kind}")
    if "HeteroData" in bases:
        way_out = "call batch.to_homogeneous() and pass the node and edge types as features"
        raise TypeError(f"{owner}: batch must have one kind of nodes and edges, got {kind}; {way_out}")
    if not any(hasattr(data, name) for name in read):
        raise TypeError(f"{owner}: batch must be a Data or Batch of PyTorch Geometric, got {kind}")


def check_agreement(owner: str, batch: Tensor | None, graph: Tensor) -> None:
    """ValueError where the data's `batch` (nodes,) and graph, the one that ptr gives to each node, disagree."""
    if batch is None or not looks_at_values(batch):
        return
    wrong = (batch != graph).nonzero()
    if len(wrong):
        k = int(wrong[0])
        raise ValueError(
            f"{owner}: batch must agree with ptr, got batch[{k}] = {int(batch[k])} in graph {int(graph[k])}"
        )


def _ptr(owner: str, data: Any, x: Any) -> Any:
    """The data's ptr; else made from `batch`, which waits for a GPU; else that of a single graph."""
    ptr, batch = getattr(data, "ptr", None), getattr(data, "batch", None)
    if not isinstance(x, Tensor) or not x.ndim:  # refused by `Graphs.check`
        return ptr
    nodes = x.shape[0]
    if batch is not None:
        if not isinstance(batch, Tensor) or batch.dtype != torch.int64:
            got = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(f"{owner}: batch must be an int64 Tensor, got {got}")
        if tuple(batch.shape) != (nodes,):
            raise ValueError(f"{owner}: batch must be (nodes,) = ({nodes},), got {tuple(batch.shape)}")
        if batch.device != x.device:
            raise RuntimeError(f"{owner}: batch must be on {x.device} as the nodes are, got {batch.device}")
    if ptr is not None:
        return ptr
    if batch is None:
        return torch.tensor([0, nodes], device=x.device)
    if nodes and int(batch[0]) < 0:
        raise ValueError(f"{owner}: batch must be at least 0, got {int(batch[0])}")
    falls = (batch.diff() < 0).nonzero()
    if len(falls):
        k = int(falls[0])
        got = f"batch[{k}] = {int(batch[k])} and batch[{k + 1}] = {int(batch[k + 1])}"
        raise ValueError(f"{owner}: batch must not decrease, got {got}; sort the nodes by graph")
    size = getattr(data, "num_graphs", None) or 0  # the last graphs may be empty
    counts = torch.bincount(batch, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _edge_attr(data: Any, edge_index: Any) -> Any:
    """edge_attr, or edge_weight if there is none."""
    attr, weight = getattr(data, "edge_attr", None), getattr(data, "edge_weight", None)
    if weight is None:
        return _columns(OWNER, "edge_attr", attr)
    if attr is not None:
        way_out = "join them as edge_attr = torch.cat([edge_attr, edge_weight[:, None]], 1)"
        raise ValueError(f"{OWNER}: edge_attr or edge_weight must be None, got both; {way_out}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"{OWNER}: edge_weight must be a Tensor, got {type(weight).__name__}")
    column = _columns(OWNER, "edge_weight", weight)
    if isinstance(column, Tensor) and isinstance(edge_index, Tensor) and edge_index.ndim == 2:
        E = edge_index.shape[1]
        if tuple(column.shape) != (E, 1):
            raise ValueError(f"{OWNER}: edge_weight must be (E,) = ({E},), got {tuple(weight.shape)}")
    return column


def _columns(owner: str, name: str, values: Any, dtype: torch.dtype | None = None) -> Any:
    """Features (rows,) as (rows, 1), integers and bools in dtype (None: the default). Leaves other objects to the checks."""
    if not isinstance(values, Tensor):
        return values
    if values.layout is not torch.strided or values.is_nested:
        got = "a nested Tensor" if values.is_nested else values.layout
        raise TypeError(f"{owner}: {name} must be a dense Tensor, got {got}")
    if values.is_complex():
        raise TypeError(f"{owner}: {name} must be real, got {values.dtype}")
    values = values[:, None] if values.ndim == 1 else values
    if values.is_floating_point():
        return values
    found = values.to(dtype or torch.get_default_dtype())
    if looks_at_values(values):
        lost = values[found.to(values.dtype) != values]
        if len(lost):
            raise ValueError(f"{owner}: {name} must be integers that {found.dtype} holds exactly, got {int(lost[0])}")
    return found


def _held(data: Any) -> str:
    names: Iterable[str] = data.keys() if callable(getattr(data, "keys", None)) else vars(data)
    return ", ".join(sorted(names)) or "nothing"


def _said(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

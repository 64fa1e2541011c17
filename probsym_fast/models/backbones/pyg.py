"""Networks of PyTorch Geometric on graphs with samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from probsym_fast._checks import check_type
from probsym_fast.groups import Graphs

POOLS = ("mean", "sum")
MORE = ("batch", "batch_size", "num_nodes", "edge_weight", "edge_attr")  # that a network may take besides x, edge_index


class PyGBackbone(nn.Module):
    """A network of PyTorch Geometric, `net(x, edge_index, ...)`, on node features (nodes, S, width) and their graphs.

    net gets a batch of S B graphs: those of sample 0, of sample 1, and so on. So x is (S nodes, width) and edge_index
    (2, S E). It may be any module that works on batches, such as `torch_geometric.nn.models.GIN` or a stack of `GPSConv`.
    It shares batch statistics (BatchNorm) over the samples that run together.

    net: also gets what its `forward` names, or `inputs` if given, by keyword: batch (S nodes,), the graph of each node;
        batch_size, S B; num_nodes, S nodes; edge_attr (S E, channels) of the graphs, if they have it; edge_weight (S E,),
        the same with one channel, if it does not take edge_attr.
    rows: what the rows of net's outputs are. "nodes": it returns (nodes, S, C). "graphs": (B, S, C).
    pool: "mean" or "sum" of the nodes of each graph, after a net with rows "nodes": (B, S, C).
    inputs: names among MORE, for a net whose `forward` hides them, such as `torch_geometric.nn.Sequential`.

    In a model, `IdentifiedNodes` makes the node features, and `MeanReadout("nodes")` reads outputs of nodes. Raises
    TypeError for a net that needs other inputs, ValueError for other settings, and in the forward pass for outputs of
    another number of rows.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        rows: Literal["nodes", "graphs"] = "nodes",
        pool: Literal["mean", "sum"] | None = None,
        inputs: Iterable[str] | None = None,
    ):
        super().__init__()
        check_type("PyGBackbone", "net", net, nn.Module, "an nn.Module")
        if rows not in ("nodes", "graphs"):
            raise ValueError(f"PyGBackbone: rows must be nodes or graphs, got {rows!r}")
        if pool is not None and (pool not in POOLS or rows == "graphs"):
            wanted = "None with rows 'graphs'" if rows == "graphs" else f"one of {', '.join(POOLS)} or None"
            raise ValueError(f"PyGBackbone: pool must be {wanted}, got {pool!r}")
        self.net, self.rows, self.pool = net, rows, pool
        self.inputs = _inputs(net) if inputs is None else tuple(inputs)
        if unknown := [name for name in self.inputs if name not in MORE]:
            raise ValueError(f"PyGBackbone: inputs must be among {', '.join(MORE)}, got {unknown[0]!r}")

    def extra_repr(self) -> str:
        return f"rows={self.rows!r}, pool={self.pool!r}, inputs={self.inputs}"

    def forward(self, h: Tensor, batch: Graphs) -> Tensor:
        """h (nodes, S, width) -> (nodes, S, C) or (B, S, C)."""
        nodes, S, B = h.shape[0], h.shape[1], batch.size
        copies = torch.arange(S, device=h.device)
        edge_index = (batch.edge_index[:, None] + nodes * copies[:, None]).flatten(1)
        given: dict[str, Callable[[], Tensor | int | None]] = {
            "batch": lambda: (batch.graph + B * copies[:, None]).flatten(),
            "batch_size": lambda: S * B,
            "num_nodes": lambda: S * nodes,
            "edge_attr": lambda: None if batch.edge_attr is None else batch.edge_attr.repeat(S, 1),
            "edge_weight": lambda: None if batch.edge_attr is None else _weights(batch.edge_attr).repeat(S),
        }
        found = {name: given[name]() for name in self.inputs}
        more = {name: value for name, value in found.items() if value is not None}
        y = self.net(h.transpose(0, 1).flatten(0, 1), edge_index, **more)
        rows = nodes if self.rows == "nodes" else B
        if not isinstance(y, Tensor) or y.shape[:1] != (S * rows,):
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"PyGBackbone: the outputs of net must have {S * rows} rows (of {self.rows}), got {got}")
        y = y.unflatten(0, (S, rows)).transpose(0, 1)
        if self.pool is None:
            return y
        y = batch.pooled(y)
        return y if self.pool == "sum" else y / batch.num_nodes.clamp(min=1).view(-1, *[1] * (y.ndim - 1)).to(y.dtype)


def _inputs(net: nn.Module) -> tuple[str, ...]:
    """The names among MORE that net takes. TypeError if it needs another input besides x and edge_index."""
    parameters = [*inspect.signature(net.forward).parameters.values()]
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if len(places) < 2 and not any(p.kind == p.VAR_POSITIONAL for p in places):
        raise TypeError(f"PyGBackbone: net must take x and edge_index, got {type(net).__name__}")
    first = [p.name for p in places if p.kind != p.VAR_POSITIONAL][:2]
    for p in parameters:
        needed = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if needed and p.name not in (*first, *MORE):
            raise TypeError(f"PyGBackbone: net must take x, edge_index and of {', '.join(MORE)}, got also {p.name}")
    names = [name for name in MORE if any(p.name == name for p in parameters) and name not in first]
    names = [name for name in names if getattr(net, f"supports_{name}", True)]  # of torch_geometric.nn.models
    return tuple(name for name in names if name != "edge_weight" or "edge_attr" not in names)


def _weights(edge_attr: Tensor) -> Tensor:
    """(E, 1) -> (E,)."""
    if edge_attr.shape[1] != 1:
        got = f"{tuple(edge_attr.shape)}; PyGBackbone(net, inputs=()) leaves it out"
        raise ValueError(f"PyGBackbone: edge_attr must have one channel as a weight, got {got}")
    return edge_attr[:, 0]

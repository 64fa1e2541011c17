"""Embeddings and readouts of graphs: permuted graphs to vectors or node features, and outputs back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast import ops
from probsym_fast._autocast import product_dtype
from probsym_fast._checks import check_count, check_counts, check_dtype
from probsym_fast.batches import check_batch
from probsym_fast.groups import Graphs, Group
from probsym_fast.ops import Permutation, SoftPermutation
from probsym_fast.ops._patches import check_items


class PatchWeight(nn.Module):
    """The weight (D, C, P[, P]) of a map between patches and tokens, initialised as in nn.Conv2d.

    Calling it returns the weight in a convolution's layout. It is stored as the ops read it, D innermost, in a contiguous
    parameter, since optimisers copy other layouts. inputs: number of inputs of one output, for the initialisation
    U(-1, 1) / sqrt(inputs); default C P[^2].
    """

    def __init__(self, D: int, C: int, *patch: int, inputs: int | None = None):
        super().__init__()
        bound = 1 / math.sqrt(inputs or C * math.prod(patch))
        self.rows = nn.Parameter(torch.empty(*patch, C, D).uniform_(-bound, bound))

    def forward(self) -> Tensor:
        return self.rows.permute(-1, -2, *range(self.rows.ndim - 2))


class FlatGraph(nn.Module):
    """The first linear map of an MLP on a permuted graph, flattened: (B, S, width).

    `W [flatten(A'), flatten(X')] + b` with A' the permuted adjacency (N, N, edge_features) and, with node features, X'
    (N, node_features). The permuted graph is never materialised. soft: use the soft permutation instead of the hard one,
    densely (an ablation).

    Raises TypeError where edge_attr, or x if it is read, lacks the dtype of the weights (autocast: any floating dtype).
    """

    def __init__(self, N: int, width: int, node_features: int = 0, edge_features: int = 1, soft: bool = False):
        super().__init__()
        N, width, edge_features = check_counts("FlatGraph", N=N, width=width, edge_features=edge_features)
        node_features = check_count("FlatGraph", "node_features", node_features, least=0)
        self.N, self.soft = N, soft
        inputs = N * (N * edge_features + node_features)  # initialised as one nn.Linear
        self.edges = PatchWeight(width, edge_features, N, N, inputs=inputs)
        self.nodes = PatchWeight(width, node_features, N, inputs=inputs) if node_features else None
        self.bias = nn.Parameter(torch.empty(width).uniform_(-1, 1) / math.sqrt(inputs))

    def extra_repr(self) -> str:
        return f"N={self.N}, width={len(self.bias)}, soft={self.soft}"

    def forward(self, batch: Graphs, group: Group, g: Permutation) -> tuple[Tensor]:
        check_batch("FlatGraph", batch, "x", "edge_index")
        if batch.edge_attr is not None:
            check_dtype("FlatGraph", self.bias.dtype, edge_attr=batch.edge_attr)
        if self.nodes is not None:
            check_dtype("FlatGraph", self.bias.dtype, x=batch.x)
        if self.soft:
            return (self._soft(batch, g),)
        dtype = product_dtype(self.bias)
        attributes, weight, bias = batch.attributes.to(dtype), self.edges().to(dtype), self.bias.to(dtype)
        tokens = ops.embed_edges(batch.edge_index, attributes, batch.ptr, g, weight, bias, grid=1)
        if self.nodes is not None:
            x, weight = batch.x.to(dtype), self.nodes().to(dtype)
            tokens = tokens + ops.embed_nodes(x, batch.ptr, g, weight, tokens=1)
        return (tokens[:, :, 0],)

    def bare(self) -> nn.Linear:
        """An nn.Linear of the same size on flattened matrices and features, as in a plain MLP."""
        rows = [part.rows for part in (self.edges, self.nodes) if part is not None]
        return nn.Linear(sum(x[..., 0].numel() for x in rows), len(self.bias))

    def _soft(self, batch: Graphs, g: Permutation) -> Tensor:
        if not isinstance(g, SoftPermutation):
            raise TypeError(
                f"FlatGraph: g must be a SoftPermutation with soft=True (use a learned distribution), got {type(g).__name__}"
            )
        p, N, weight = g.soft().to(self.edges.rows.dtype), self.N, self.edges()
        check_items("FlatGraph", "edge_index", batch.edge_index, batch.ptr)
        graph, local = batch.graph, batch.local
        adjacency = batch.matrix(batch.attributes.to(p.dtype), N)
        out = torch.einsum("bsijc,dcij->bsd", torch.einsum("bsui,buvc,bsvj->bsijc", p, adjacency, p), weight)
        if self.nodes is not None:
            x = p.new_zeros(batch.size, N, batch.x.shape[1]).index_put((graph, local), batch.x.to(p.dtype))
            out = out + torch.einsum("bsui,buc,dci->bsd", p, x, self.nodes())
        return out + self.bias


class IdentifiedNodes(nn.Module):
    """The first linear map of a GNN on node features joined with the identifiers of their slots: (nodes, S, width).

    `W_x x[u] + W_id[rank[u]]`, without bias: a row of the permutation times a weight. Returns the graphs too, for
    `GINBackbone` and `PyGBackbone`. Raises TypeError where x lacks the dtype of the weights (autocast: any floating dtype).
    """

    def __init__(self, N: int, width: int, node_features: int):
        super().__init__()
        N, width = check_counts("IdentifiedNodes", N=N, width=width)
        node_features = check_count("IdentifiedNodes", "node_features", node_features, least=0)
        bound = 1 / math.sqrt(N + node_features)
        self.features = nn.Parameter(torch.empty(width, node_features).uniform_(-bound, bound))
        self.identifiers = nn.Parameter(torch.empty(N, width).uniform_(-bound, bound))

    def extra_repr(self) -> str:
        N, width = self.identifiers.shape
        return f"N={N}, width={width}, node_features={self.features.shape[1]}"

    def forward(self, batch: Graphs, group: Group, g: Permutation) -> tuple[Tensor, Graphs]:
        check_batch("IdentifiedNodes", batch, "x", "edge_index")
        check_items("IdentifiedNodes", "edge_index", batch.edge_index, batch.ptr)
        if batch.x.shape[1] != self.features.shape[1]:
            raise ValueError(
                f"IdentifiedNodes: x must be (nodes, {self.features.shape[1]}), got {tuple(batch.x.shape)}"
            )
        check_dtype("IdentifiedNodes", self.features.dtype, x=batch.x)
        h = ops.node_identifiers(batch.ptr, g, self.identifiers, nodes=batch.x.shape[0])
        return h + (batch.x.to(self.features.dtype) @ self.features.T)[:, None], batch


class MeanReadout(nn.Module):
    """Invariant outputs, averaged over samples: (B, S, ...) -> (B, ...).

    rows: what the first axis holds, "graphs" (or clouds) or "nodes", in the order of the batch, as a GNN gives them.
    """

    def __init__(self, rows: str = "graphs"):
        super().__init__()
        if rows not in ("graphs", "nodes"):
            raise ValueError(f"MeanReadout: rows must be 'graphs' or 'nodes', got {rows!r}")
        self.rows = rows
        self.layout = "c" if rows == "graphs" else "nc"  # of the prediction, for `equivariance_error`

    def extra_repr(self) -> str:
        return "" if self.rows == "graphs" else f"rows={self.rows!r}"

    def forward(self, outputs: Tensor, batch: Any, group: Group, g: Any) -> Tensor:
        return outputs.mean(1)


class SlotReadout(nn.Module):
    """The last linear map of an MLP, one value per slot, mapped back to the nodes, averaged: (B, S, D) -> (nodes, C)."""

    rows = "nodes"  # of the prediction
    layout = "nc"  # of the prediction, for `equivariance_error`

    def __init__(self, N: int, width: int, out_features: int = 1):
        super().__init__()
        N, width, out_features = check_counts("SlotReadout", N=N, width=width, out_features=out_features)
        bound = 1 / math.sqrt(width)
        self.weight = PatchWeight(width, out_features, N, inputs=width)
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound))

    def forward(self, outputs: Tensor, batch: Graphs, group: Group, g: Permutation) -> Tensor:
        settings: dict[str, Any] = {"at": "nodes", "nodes": batch.x.shape[0]}
        return ops.readout(outputs[:, :, None], batch.ptr, g, self.weight(), self.bias, **settings)

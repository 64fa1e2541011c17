"""Graphs as the tokens of a transformer, and its outputs back to graphs, nodes and pairs of nodes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast import ops
from probsym_fast._autocast import product_dtype, without_autocast
from probsym_fast._checks import check_count, check_counts, check_dtype, transformed
from probsym_fast.batches import check_batch
from probsym_fast.groups import Graphs, Group
from probsym_fast.models.graphs import PatchWeight
from probsym_fast.ops import Permutation
from probsym_fast.ops._patches import check_items, check_padding, check_ptr, patch_size

DENSE = 0.07  # density of edges above which matrix products are faster (AVX-512, 1 and 4 channels)


class GraphTokens(nn.Module):
    """A permuted graph cut into patches: tokens (B, S, grid^2, width), row by row.

    `conv2d(pad(A'), W, stride=P) + b` with A' the permuted adjacency (N, N, edge_features) and P = ceil(N / grid). The
    permuted node features are either extra channels on the diagonal of A', or grid^2 one-dimensional patches added to
    the tokens. Initialised as torch initialises these convolutions; weights that no node can reach do not exist.

    Args:
        N: largest graph. width: D. grid: patches along an axis.
        node_features, edge_features: channels of the graphs' x (0: x is ignored) and edge_attr (1 if there is none).
        nodes: "diagonal" (only with zero padding at the end) or "tokens".
        pad_mode: "zeros", "replicate", "reflect" or "circular". centered: half of the padding in front.
        dense: compute the edges' tokens by matrix products (True) or edge by edge (False); None: by the batch's density.
            torch.compile then makes a program for each, once batches need both. An exported one is edge by edge.

    Raises TypeError where x or edge_attr lacks the dtype of the weights (autocast: any floating dtype), ValueError for
    edges that leave their graph and for a permutation of other than N slots.
    """

    def __init__(
        self,
        N: int,
        width: int,
        grid: int,
        node_features: int,
        edge_features: int = 1,
        nodes: str = "tokens",
        pad_mode: str = "zeros",
        centered: bool = False,
        dense: bool | None = None,
    ):
        super().__init__()
        owner = "GraphTokens"
        N, width, grid, edge_features = check_counts(owner, N=N, width=width, grid=grid, edge_features=edge_features)
        node_features = check_count(owner, "node_features", node_features, least=0)
        check_padding("GraphTokens", pad_mode, centered)
        if nodes not in ("diagonal", "tokens"):
            raise ValueError(f"GraphTokens: nodes must be diagonal or tokens, got {nodes!r}")
        if nodes == "diagonal" and (pad_mode != "zeros" or centered):
            got = f"{pad_mode}, centered {centered}"
            raise ValueError(f"GraphTokens: padding must be zeros at the end for nodes on the diagonal, got {got}")
        self.N, self.grid, self.nodes_at, self.dense = N, grid, nodes, dense
        self.padding: dict[str, Any] = {"pad_mode": pad_mode, "centered": centered}
        self.cells = grid if nodes == "diagonal" else grid**2  # patches of the node axis
        P = patch_size(N, grid)
        inputs = (edge_features + (node_features if nodes == "diagonal" else 0)) * P * P
        self.edges = PatchWeight(width, edge_features, P, P, inputs=inputs)
        self.nodes = None
        if node_features:
            alone = None if nodes == "tokens" else inputs
            self.nodes = PatchWeight(width, node_features, patch_size(N, self.cells), inputs=alone)
        self.bias = nn.Parameter(torch.empty(width).uniform_(-1, 1) / math.sqrt(inputs))

    def extra_repr(self) -> str:
        return f"N={self.N}, grid={self.grid}, nodes={self.nodes_at}, {self.padding}"

    def forward(self, batch: Graphs, group: Group, g: Permutation) -> tuple[Tensor]:
        check_batch("GraphTokens", batch, "x", "edge_index")
        _check_slots("GraphTokens", self.N, g)
        dtype = product_dtype(self.bias)
        weight, bias = self.edges().to(dtype), self.bias.to(dtype)
        if batch.edge_attr is not None:
            check_dtype("GraphTokens", self.bias.dtype, edge_attr=batch.edge_attr)
        attributes = batch.attributes.to(dtype)
        if self._is_dense(batch):
            check_ptr("GraphTokens", batch.ptr, g)
            check_items("GraphTokens", "edge_index", batch.edge_index, batch.ptr)
            matrix = batch.matrix(attributes, self.N)
            tokens = ops.embed_matrix(matrix, g, weight, bias, grid=self.grid, **self.padding)
        else:
            edges = batch.edge_index, attributes, batch.ptr
            tokens = ops.embed_edges(*edges, g, weight, bias, grid=self.grid, **self.padding)
        if self.nodes is not None:
            check_dtype("GraphTokens", self.bias.dtype, x=batch.x)
            x, weight = batch.x.to(dtype), self.nodes().to(dtype)
            nodes = ops.embed_nodes(x, batch.ptr, g, weight, tokens=self.cells, **self.padding)
            step = 1 if self.nodes_at == "tokens" else self.grid + 1
            if transformed():  # vmap may run over only one of the two
                places = torch.arange(0, tokens.shape[2], step, device=tokens.device)
                tokens = tokens.index_add(2, places, nodes)
            else:
                tokens = _AddedRows.apply(tokens, nodes, step)
        return (tokens,)

    def _is_dense(self, batch: Graphs) -> bool:
        if self.dense is not None:
            return self.dense
        if torch.compiler.is_exporting():
            return False  # a comparison of sizes would bind the program to batches of one kind
        nodes, edges = batch.x.shape[0], batch.edge_index.shape[1]
        return edges * batch.size > DENSE * nodes**2  # as if graphs had one size: reading ptr would wait for a GPU


class _AddedRows(torch.autograd.Function):
    """x + y in every `step`-th row of x (B, S, rows, D), in its memory. Torch's own gradients of `x[:, :, ::step] += y` copy
    that of x three times; this one passes it on.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor, step: int) -> Tensor:
        x[:, :, ::step] += y
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        x, _, ctx.step = inputs
        ctx.mark_dirty(x)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
        return d, d[:, :, :: ctx.step], None


class NodeTokens(nn.Module):
    """Permuted node features cut into patches: tokens (B, S, tokens, width), in the order of the slots.

    `conv1d(pad(X'), W, stride=P) + b` with X' (N, node_features) the permuted node features and P = ceil(N / tokens). Any
    number of tokens; edges are ignored. Initialised as nn.Conv1d. pad_mode and centered as in `GraphTokens`.

    Raises TypeError where x lacks the dtype of the weights (autocast: any floating dtype), ValueError for other
    features and for a permutation of other than N slots.
    """

    def __init__(
        self, N: int, width: int, tokens: int, node_features: int, pad_mode: str = "zeros", centered: bool = False
    ):
        super().__init__()
        owner = "NodeTokens"
        N, width, tokens, node_features = check_counts(
            owner, N=N, width=width, tokens=tokens, node_features=node_features
        )
        check_padding("NodeTokens", pad_mode, centered)
        self.N, self.tokens = N, tokens
        self.padding: dict[str, Any] = {"pad_mode": pad_mode, "centered": centered}
        P = patch_size(N, tokens)
        self.nodes = PatchWeight(width, node_features, P)
        self.bias = nn.Parameter(torch.empty(width).uniform_(-1, 1) / math.sqrt(node_features * P))

    def extra_repr(self) -> str:
        return f"N={self.N}, tokens={self.tokens}, {self.padding}"

    def forward(self, batch: Graphs, group: Group, g: Permutation) -> tuple[Tensor]:
        check_batch("NodeTokens", batch, "x")
        _check_slots("NodeTokens", self.N, g)
        check_dtype("NodeTokens", self.bias.dtype, x=batch.x)
        weight = self.nodes()
        if batch.x.shape[1] != weight.shape[1]:
            raise ValueError(f"NodeTokens: x must be (nodes, {weight.shape[1]}), got {tuple(batch.x.shape)}")
        dtype = product_dtype(self.bias)
        x, weight, bias = batch.x.to(dtype), weight.to(dtype), self.bias.to(dtype)
        return (ops.embed_nodes(x, batch.ptr, g, weight, bias, tokens=self.tokens, **self.padding),)


class GraphReadout(nn.Module):
    """Outputs of graphs: the mean of pooled vectors over samples and one linear map, (B, S, D) -> (B, out_features).

    Computed and returned in the weights' dtype, also under autocast.
    """

    layout = "c"  # of the prediction, for `equivariance_error`

    def __init__(self, width: int, out_features: int):
        super().__init__()
        width, out_features = check_counts("GraphReadout", width=width, out_features=out_features)
        self.head = nn.Linear(width, out_features)

    def forward(self, outputs: Tensor, batch: Any, group: Group, g: Any) -> Tensor:
        with without_autocast(outputs.device):
            return self.head(outputs.to(self.head.weight.dtype).mean(1))


class DiagonalReadout(nn.Module):
    """Outputs of nodes from the diagonal tokens, averaged over samples: (B, S, grid, D) -> (nodes, out_features).

    The diagonal of a transposed convolution to an N x N map, `y[u] = mean_s W[o, o] . token[c]`, with o the offset and
    c the cell of slot rank_s[u]. The rest of the map is never computed. Initialised as nn.ConvTranspose2d. Raises
    ValueError for a permutation of other than N slots.
    """

    rows = "nodes"  # of the prediction
    layout = "nc"  # of the prediction, for `equivariance_error`

    def __init__(self, N: int, width: int, grid: int, out_features: int):
        super().__init__()
        owner = "DiagonalReadout"
        N, width, grid, out_features = check_counts(owner, N=N, width=width, grid=grid, out_features=out_features)
        self.N = N
        P = patch_size(N, grid)
        inputs = out_features * P * P
        self.weight = PatchWeight(width, out_features, P, inputs=inputs)
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-1, 1) / math.sqrt(inputs))

    def forward(self, outputs: Tensor, batch: Graphs, group: Group, g: Permutation) -> Tensor:
        _check_slots("DiagonalReadout", self.N, g)
        outputs, nodes = outputs.to(self.bias.dtype), batch.x.shape[0]
        return ops.readout(outputs, batch.ptr, g, self.weight(), self.bias, at="nodes", nodes=nodes)


class PairReadout(nn.Module):
    """Outputs of the node pairs `batch.pairs`, averaged over samples: (B, S, grid^2, D) -> (pairs, out_features).

    A transposed convolution to an N x N map, computed only at these pairs. Raises ValueError for a batch without pairs
    and for a permutation of other than N slots.
    """

    rows = "pairs"  # of the prediction
    layout = "c"  # of the prediction, for `equivariance_error`

    def __init__(self, N: int, width: int, grid: int, out_features: int = 1):
        super().__init__()
        owner = "PairReadout"
        N, width, grid, out_features = check_counts(owner, N=N, width=width, grid=grid, out_features=out_features)
        self.N = N
        P = patch_size(N, grid)
        inputs = out_features * P * P
        self.weight = PatchWeight(width, out_features, P, P, inputs=inputs)
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-1, 1) / math.sqrt(inputs))

    def forward(self, outputs: Tensor, batch: Graphs, group: Group, g: Permutation) -> Tensor:
        _check_slots("PairReadout", self.N, g)
        if batch.pairs is None:
            raise ValueError("PairReadout: batch.pairs must be (2, M) node numbers, got None")
        return ops.readout(outputs.to(self.bias.dtype), batch.ptr, g, self.weight(), self.bias, at=batch.pairs)


def _check_slots(owner: str, N: int, g: Permutation) -> None:
    """Raises unless g permutes N slots; with another number the patches may still have the same size."""
    if not isinstance(g, Permutation):
        raise TypeError(f"{owner}: g must be a Permutation, got {type(g).__name__}")
    if g.shape[-1] != N:
        raise ValueError(f"{owner}: g must be permutations of N = {N} slots, got (B, S, N) = {tuple(g.shape)}")

"""Networks for graphs of any size and features: a configured backbone with its embedding and readout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from probsym_fast.models import (
    MLP,
    DiagonalReadout,
    FlatGraph,
    GINBackbone,
    GraphReadout,
    GraphTokens,
    IdentifiedNodes,
    MeanReadout,
    SlotReadout,
    Transformer,
    timm_backbone,
)

GRID = 8  # patches along an axis, at most: 64 tokens run in one pass


class Sizes(NamedTuple):
    """Of a set of graphs: nodes of the largest, channels of x, channels of edge_attr (1 if there is none)."""

    nodes: int
    features: int
    edges: int


class Pooled(nn.Module):
    """A network, then the mean over its tokens: (..., D)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).mean(-2)


@dataclass
class GraphBackbone:
    """The network that is symmetrized.

    Args:
        kind: "mlp" on the flattened graph, "gin" with node identifiers (not for classes of nodes; ignores edge_attr),
            "transformer" on patches of the matrix, or "vit", one of timm on the same patches.
        width: hidden width (not vit).
        layers: number of layers (not vit).
        heads: attention heads (transformer).
        grid: patches along each axis of the matrix; null: at most 8 (transformer), 14 (vit).
        name: a ViT or BEiT of timm (vit).
        pretrained: start from timm's weights (vit).
        arguments: arguments of timm.create_model (vit).
    """

    kind: Literal["mlp", "gin", "transformer", "vit"] = "mlp"
    width: int = 128
    layers: int = 3
    heads: int = 4
    grid: int | None = None
    name: str = "vit_tiny_patch16_224"
    pretrained: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def check(self, per_node: bool) -> None:
        """Raises ValueError for keys that do not fit each other. per_node: the network predicts something per node."""
        if self.kind == "gin" and per_node:
            raise ValueError("config: backbone.kind must be mlp, transformer or vit for classes of nodes, got 'gin'")
        if self.kind == "transformer" and self.width % self.heads:
            raise ValueError(f"config: backbone.heads must divide backbone.width = {self.width}, got {self.heads}")

    def build(
        self, sizes: Sizes, outputs: int, per_node: bool, fresh: bool = True
    ) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Backbone, embedding and readout. outputs: per graph, or per node. fresh: False reads no pretrained weights."""
        N, features, edges = sizes
        if self.kind == "gin":
            gin = GINBackbone(self.width, self.layers, outputs, "relu")
            return gin, IdentifiedNodes(N, self.width, features), MeanReadout()
        if self.kind == "mlp":
            widths = [self.width] * self.layers
            embed = FlatGraph(N, self.width, features, edges)
            if per_node:
                return MLP(widths, last=True), embed, SlotReadout(N, self.width, outputs)
            return MLP([*widths, outputs]), embed, MeanReadout()
        network, width, grid = self._on_patches(N, per_node, fresh)
        tokens = GraphTokens(N, width, grid, features, edges, nodes="diagonal")
        if per_node:
            return network, tokens, DiagonalReadout(N, width, grid, outputs)
        return network, tokens, GraphReadout(width, outputs)

    def _on_patches(self, N: int, per_node: bool, fresh: bool) -> tuple[nn.Module, int, int]:
        """The backbone on grid^2 tokens, its width and the grid."""
        if self.kind == "vit":
            grid, read = self.grid or 14, "diagonal" if per_node else "pooled"
            found = timm_backbone(self.name, self.pretrained and fresh, grid=grid, read=read, **self.arguments)  # type: ignore[arg-type]
            return found, found.width, grid
        grid = self.grid or min(N, GRID)
        network = Transformer(
            in_features=self.width,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            feedforward=2 * self.width,
            tokens=grid**2,
            out_features=self.width,
            read=[k * (grid + 1) for k in range(grid)] if per_node else None,  # the diagonal
        )
        return network if per_node else Pooled(network), self.width, grid

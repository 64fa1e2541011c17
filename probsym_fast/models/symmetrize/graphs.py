"""The parts around a network on graphs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from probsym_fast.batches import Graphs
from probsym_fast.groups import Symmetric
from probsym_fast.models.backbones.folded import Folded
from probsym_fast.models.backbones.gin import GINBackbone
from probsym_fast.models.backbones.on_tokens import OnTokens
from probsym_fast.models.backbones.pyg import PyGBackbone
from probsym_fast.models.backbones.vision import VisionBackbone
from probsym_fast.models.backbones.whole import WholeVisionBackbone
from probsym_fast.models.graphs import FlatGraph, IdentifiedNodes, MeanReadout, SlotReadout
from probsym_fast.models.symmetrize.networks import inputs_of, run, takes_any_axes, takes_edges
from probsym_fast.models.tokens import DiagonalReadout, GraphReadout, GraphTokens, NodeTokens, PairReadout


def wanted(net: nn.Module) -> str:
    """What makes a backbone of a bare model of another library, which takes images or words."""
    library = type(net).__module__
    if library.startswith("timm.models.") and hasattr(net, "forward_features"):
        return "timm_backbone(model, grid=...)"
    if library.startswith("transformers.") and hasattr(net, "get_input_embeddings"):
        return "hf_backbone(name, tokens=...)"
    return ""


class GraphParts:
    """The parts for graphs."""

    def __init__(self, net, group, graphs: Graphs, tokens, output, out_features, width, pool):
        if not isinstance(group, Symmetric):
            raise ValueError(f"symmetrize: group must be Symmetric(n) for Graphs, got {group}")
        self.net, self.graphs, self.N, self.output, self.out_features = net, graphs, group.n, output, out_features
        self.node_features = graphs.x.shape[1]
        self.edge_features = graphs.attributes.shape[1]
        if made_by := wanted(net):
            raise ValueError(f"symmetrize: net must be made by {made_by} for Graphs, got {type(net).__name__}")
        if tokens is None:
            tokens = "flat"
            if isinstance(net, VisionBackbone | WholeVisionBackbone):
                tokens = "patches"
            elif isinstance(net, OnTokens):
                tokens = "sequence"
            elif isinstance(net, GINBackbone | PyGBackbone) or takes_edges(net):
                tokens = "identifiers"
        self.tokens, self.given_width, self.pool = tokens, width, pool
        if tokens in ("patches", "sequence") and not isinstance(net, OnTokens):
            made_by = "timm_backbone" if tokens == "patches" else "hf_backbone"
            raise ValueError(
                f"symmetrize: net must be made by {made_by} for tokens {tokens!r}, got {type(net).__name__}"
            )
        if output == "pairs" and tokens != "patches":
            raise ValueError(f"symmetrize: tokens must be 'patches' for output 'pairs', got {tokens!r}")

    def width(self) -> int:
        found = self.given_width or inputs_of(self.net)
        if found is None:
            raise ValueError(f"symmetrize: width must be given for {type(self.net).__name__}, got None")
        return found

    def embed(self) -> nn.Module:
        if self.tokens == "flat":
            return FlatGraph(self.N, self.width(), self.node_features, self.edge_features)
        if self.tokens == "identifiers":
            return IdentifiedNodes(self.N, self.width(), self.node_features)
        net: Any = self.net
        if self.tokens == "sequence":
            return NodeTokens(self.N, net.width, net.tokens, self.node_features)
        return GraphTokens(self.N, net.width, self._grid(), self.node_features, self.edge_features)

    def _grid(self) -> int:
        net: Any = self.net
        if net.grid is None or net.grid[0] != net.grid[1]:
            raise ValueError(f"symmetrize: net must have a square grid for tokens 'patches', got {net.grid}")
        return net.grid[0]

    def backbone(self) -> nn.Module:
        if self.tokens == "identifiers" and not isinstance(self.net, GINBackbone | PyGBackbone):
            return self._of_pyg()
        return self.net if takes_any_axes(self.net) or self.tokens != "flat" else Folded(self.net)

    def _of_pyg(self) -> nn.Module:
        """With outputs of nodes, pooled where graphs are asked for, or of graphs: as the network gives them."""
        pool = self.pool if self.output == "invariant" else None
        h = self.graphs.x.new_zeros(self.graphs.x.shape[0], 1, self.width())
        backbone = PyGBackbone(self.net, rows="nodes", pool=pool)
        try:
            run(lambda: backbone(h, self.graphs), backbone)
        except ValueError as error:
            if "rows (of nodes)" not in str(error):
                raise
            return PyGBackbone(self.net, rows="graphs")
        return backbone

    def readout(self, y: Tensor, pool: str) -> nn.Module:
        size, nodes = self.out_features, self.graphs.x.shape[0]
        if self.output == "invariant" and y.ndim == 3 and y.shape[0] == self.graphs.size:
            return MeanReadout() if size is None else GraphReadout(y.shape[2], size)
        if self.output == "nodes" and self.tokens == "identifiers" and y.ndim == 3 and y.shape[0] == nodes:
            return MeanReadout("nodes")
        wanted = {"invariant": "(B, S, C)", "nodes": "(nodes, S, C)"}.get(self.output, "(B, S, grid^2, D)")
        if self.output != "invariant" and self.tokens != "identifiers":
            if size is None:
                raise ValueError(f"symmetrize: out_features must be given for output {self.output!r}, got None")
            if self.tokens == "flat" and y.ndim == 3:
                return SlotReadout(self.N, y.shape[2], size)
            if self.tokens == "patches" and y.ndim == 4:
                read, grid = (
                    ("diagonal", DiagonalReadout) if self.output == "nodes" else ("tokens", PairReadout),
                    self._grid(),
                )
                net: Any = self.net
                if net.read == read[0]:
                    return read[1](self.N, y.shape[3], grid, size)
                raise ValueError(
                    f"symmetrize: net must have read={read[0]!r} for output {self.output!r}, got {net.read!r}"
                )
            wanted = "(B, S, D)" if self.tokens == "flat" else "tokens (B, S, L, D)"
        raise ValueError(f"symmetrize: net must return {wanted} for output {self.output!r}, got {tuple(y.shape)}")

"""A symmetrized model in one call: the parts around a network, chosen for its data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._checkpointing import restored_buffers
from probsym_fast._checks import check_count, check_type
from probsym_fast._inputs import embedded
from probsym_fast.batches import Graphs, PointClouds, check_batch
from probsym_fast.distributions import (
    GIN,
    Distribution,
    Energy,
    Frame,
    Identity,
    Learned,
    Normal,
    Orbit,
    Uniform,
    UniformNoise,
    VectorNeurons,
)
from probsym_fast.draws import Draws
from probsym_fast.groups import Group, Orthogonal, Product, Symmetric
from probsym_fast.groups.euclidean import Motions
from probsym_fast.models.backbones.folded import Folded
from probsym_fast.models.backbones.fuse import fuse
from probsym_fast.models.backbones.gin import GINBackbone
from probsym_fast.models.backbones.mlp import MLP
from probsym_fast.models.backbones.on_tokens import OnTokens
from probsym_fast.models.backbones.pyg import PyGBackbone
from probsym_fast.models.backbones.transformer import Transformer
from probsym_fast.models.backbones.vision import VisionBackbone
from probsym_fast.models.backbones.whole import WholeVisionBackbone
from probsym_fast.models.graphs import FlatGraph, IdentifiedNodes, MeanReadout, SlotReadout
from probsym_fast.models.point_clouds import (
    POOLS,
    FlatCloud,
    LayoutReadout,
    NodeReadout,
    NodeVectors,
    PairTokens,
    PooledReadout,
)
from probsym_fast.models.symmetrized import Symmetrized
from probsym_fast.models.tokens import DiagonalReadout, GraphReadout, GraphTokens, NodeTokens, PairReadout

DISTRIBUTIONS = "learned", "canonical", "uniform", "orbit", "frame", "none"
TOKENS = {PointClouds: ("flat", "nodes", "pairs"), Graphs: ("flat", "patches", "sequence", "identifiers")}
# modules that act on the last axis or entry by entry, and so take any leading axes
ENTRYWISE = (
    *(nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
)
COLUMN_NOISE = 0.1  # of learned frames, for clouds of few points
OUTPUTS = {PointClouds: ("invariant", "nodes", "vectors", "positions"), Graphs: ("invariant", "nodes", "pairs")}


def symmetrize(
    net: nn.Module,
    group: Group,
    example: Graphs | PointClouds,
    *,
    tokens: str | None = None,
    output: str = "invariant",
    out_features: int | None = None,
    distribution: str | Distribution = "learned",
    width: int | None = None,
    pool: str = "sum",
    embed: nn.Module | None = None,
    readout: nn.Module | None = None,
    **settings: Any,
) -> Symmetrized:
    """A `Symmetrized` model around a network, with the parts that its data and its output ask for.

    `print(model)` shows the parts. Each is an attribute (`model.embed`, `backbone`, `readout`, `distribution`) and can be
    replaced, here or later. A network that takes one batch axis is `Folded`; an `nn.TransformerEncoder` gets linear maps from
    the nodes' values to its width and to out_features, and runs as one op where it fits (`fuse`).

    Args:
        net: the network. group: the symmetry. example: a batch as the model will get. Its sizes (features, dimensions, nodes)
            fix those of the parts. One forward pass of two samples on it checks that everything fits.
        tokens: what the network takes, B inputs and S samples.
            `PointClouds`: "nodes" (B, S, n, d (+ d) (+ F)), positions, velocities and features; "flat" (B, S, n ...), these
            in one vector; "pairs" (B, S, n n, ...), a token per pair.
            `Graphs`: "flat" (B, S, width), the first linear map of an MLP on adjacency and features; "patches", tokens of a
            `timm_backbone`; "sequence", node features as tokens of an `hf_backbone`; "identifiers" (nodes, S, width) and the
            graphs, for a GNN.
            None: by the network.
        output: "invariant", one vector per input; "nodes", invariant values of nodes; of clouds also "vectors", equivariant
            ones of nodes, and "positions", vectors added to the nodes' positions; of graphs also "pairs".
        out_features: outputs of a last linear map that the readout or the encoder makes. None: the network's outputs are
            the prediction.
        distribution: "learned" (probabilistic symmetrization), "canonical" (learned, without noise: one sample), "uniform"
            (group averaging), "orbit" (every element of a finite group), "frame" (principal axes, or an order), "none", or a
            `Distribution`. Learned means `VectorNeurons` for clouds, `GIN` for graphs, and an `Energy` for finite groups. The
            noise of clouds has the spread of the example's points.
        width: of "flat" and "identifiers", what the network takes. None: read from the network.
        pool: how a network's outputs of nodes become one vector per cloud or graph, "sum" or "mean".
        embed, readout: in place of the chosen ones.
        settings: of `Symmetrized`: draws, reduce, score, chunk, memory.

    Raises TypeError for arguments of another type. ValueError for unknown names, for data or groups without a choice (give
    the part then), and where the network's outputs do not fit.
    """
    owner = "symmetrize"
    check_type(owner, "net", net, nn.Module, "an nn.Module")
    check_type(owner, "group", group, Group, "a Group")
    check_batch(owner, example)
    example.check()
    out_features = None if out_features is None else check_count(owner, "out_features", out_features)
    kind = next((kind for kind in TOKENS if isinstance(example, kind)), None)
    missing = [n for n, part in (("embed", embed), ("readout", readout)) if part is None]
    if kind is None and missing:
        got = type(example).__name__
        raise ValueError(
            f"{owner}: {missing[0]} must be given for batches other than Graphs and PointClouds, got {got}"
        )
    if pool not in POOLS:
        raise ValueError(f"{owner}: pool must be one of {POOLS}, got {pool!r}")
    for name, value, known in (("tokens", tokens, TOKENS), ("output", output, OUTPUTS)):
        if kind is not None and value is not None and value not in known[kind]:
            raise ValueError(f"{owner}: {name} must be one of {known[kind]} for {kind.__name__}, got {value!r}")
    parts: _Clouds | _Graphs | None = None
    if isinstance(example, PointClouds):
        parts = _Clouds(net, group, example, tokens, output, out_features)
    elif isinstance(example, Graphs):
        parts = _Graphs(net, group, example, tokens, output, out_features, width, pool)
    if not isinstance(distribution, Distribution):
        distribution = _distribution(distribution, group, example)
    embed = parts.embed() if embed is None and parts is not None else embed
    backbone = net if parts is None else parts.backbone()
    assert embed is not None
    distribution.to(example.device)
    embed.to(example.device)
    if readout is None:
        assert parts is not None
        outputs = _tried(backbone, embed, distribution, example)
        readout = parts.readout(outputs, pool).to(example.device)
    return Symmetrized(backbone, embed, readout, distribution, **settings)


def _tried(backbone: nn.Module, embed: nn.Module, distribution: Distribution, example: Any) -> Tensor:
    """The backbone's outputs of two samples."""

    def outputs() -> Any:
        g, _ = distribution(example, 2, Draws(seed=0))
        arguments, named = embedded(embed, example, distribution.group, g)
        try:
            return backbone(*arguments, **named)
        except (RuntimeError, TypeError, ValueError) as error:
            given = [tuple(x.shape) for x in (*arguments, *named.values()) if isinstance(x, Tensor)]
            raise ValueError(f"symmetrize: net must take inputs of shapes {given}, got {error}") from error

    found = _run(outputs, backbone, embed, distribution)
    if not isinstance(found, Tensor):
        raise ValueError(f"symmetrize: net must return a Tensor, or readout be given, got {type(found).__name__}")
    return found


def _run(function: Callable[[], Any], *modules: nn.Module) -> Any:
    """function() in eval mode, without gradients. Leaves modes and buffers as they are."""
    training = [(m, m.training) for module in modules for m in module.modules()]
    with torch.no_grad(), restored_buffers(*modules):
        try:
            for module in modules:
                module.eval()
            return function()
        finally:
            for module, mode in training:
                module.training = mode


def _distribution(name: str, group: Group, example: Any) -> Distribution:
    owner = "symmetrize"
    if name not in DISTRIBUTIONS:
        raise ValueError(f"{owner}: distribution must be a Distribution or one of {DISTRIBUTIONS}, got {name!r}")
    if name == "uniform" or (name in ("learned", "canonical") and group.outputs == ()):  # translations only
        return Uniform(group)
    if name == "orbit":
        return Orbit(group)
    if name == "frame":
        return Frame(group)
    if name == "none":
        return Identity(group)
    if isinstance(example, Graphs) and isinstance(group, Symmetric):
        scale = 0.0 if name == "canonical" else 1.0
        return Learned(group, GIN(example.x.shape[1]), UniformNoise(scale))
    if isinstance(example, PointClouds):
        if group.order is not None and name == "learned":
            width = example.positions.shape[1] * _width(example)
            return Energy(group, nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 1)), FlatCloud())
        if _takes_vectors(group):
            return _by_vectors(group, example, 0.0 if name == "canonical" else _spread(example))
    got = f"{group} on {type(example).__name__}"
    raise ValueError(f"{owner}: distribution must be given where nothing is {name!r} for the group, got {got}")


def _takes_vectors(group: Group) -> bool:
    """Whether `VectorNeurons` are equivariant to it."""
    factors = group.factors if isinstance(group, Product) else (group,)
    return all(isinstance(factor, Symmetric | Orthogonal | Motions) for factor in factors)


def _by_vectors(group: Group, example: PointClouds, scale: float) -> Learned:
    outputs = group.outputs or ()
    network = VectorNeurons(
        channels=1 if example.velocities is None else 2,
        scores="scores" in outputs,
        matrices="matrices" in outputs,
        dim=example.positions.shape[2],
        column_noise=COLUMN_NOISE,
        features=0 if example.features is None else example.features.shape[2],
    )
    return Learned(group, network, Normal(scale))


def _spread(clouds: PointClouds) -> float:
    """Standard deviation of the valid points around their centroids."""
    with torch.no_grad():
        found = float(clouds.listed(clouds.positions - clouds.center[:, None]).square().mean().sqrt())
    return float(f"{found:.2g}") if 0 < found < math.inf else 1.0


def _width(clouds: PointClouds) -> int:
    """Values of a point: d (+ d) (+ F)."""
    fields = clouds.positions, clouds.velocities, clouds.features
    return sum(x.shape[2] for x in fields if x is not None)


def _first_linear(net: nn.Module) -> int | None:
    """The inputs of the network's first linear map."""
    return next((m.in_features for m in net.modules() if isinstance(m, nn.Linear)), None)


class _Clouds:
    """The parts for point clouds."""

    def __init__(self, net, group, clouds: PointClouds, tokens, output, out_features):
        self.net, self.clouds, self.output, self.out_features = net, clouds, output, out_features
        self.n, self.d = clouds.positions.shape[1:]
        for factor in group.factors if isinstance(group, Product) else (group,):
            n, d = getattr(factor, "n", self.n), getattr(factor, "d", self.d)
            if isinstance(factor, Symmetric) and factor.axis == "n" and n != self.n:
                raise ValueError(f"symmetrize: group must permute the n = {self.n} points of the example, got {factor}")
            if isinstance(factor, Orthogonal | Motions) and d != self.d:
                raise ValueError(
                    f"symmetrize: group must act in the d = {self.d} dimensions of the example, got {factor}"
                )
        if tokens is None:
            flat = not isinstance(net, nn.TransformerEncoder | Transformer) and _first_linear(net) == self.n * _width(
                clouds
            )
            tokens = "flat" if flat and self.n > 1 else "nodes"
        self.tokens = tokens
        if out_features is not None and not isinstance(net, nn.TransformerEncoder):
            got = f"{out_features} for {type(net).__name__}"
            raise ValueError(f"symmetrize: out_features must be None for a network with outputs of its own, got {got}")
        if clouds.edges is not None and tokens == "nodes" and isinstance(net, nn.TransformerEncoder):
            shape = tuple(clouds.edges.shape)
            raise ValueError(
                "symmetrize: example must have no edges for an nn.TransformerEncoder on nodes (tokens='pairs' reads them),"
                f" got {shape}"
            )
        if out_features is None and isinstance(net, nn.TransformerEncoder):
            raise ValueError("symmetrize: out_features must be given for an nn.TransformerEncoder, got None")

    def embed(self) -> nn.Module:
        if self.tokens == "flat":
            return FlatCloud()
        if self.tokens == "pairs":
            return PairTokens()
        return NodeVectors(lengths=self.clouds.num_nodes is not None)

    def backbone(self) -> nn.Module:
        net = self.net
        if isinstance(net, nn.TransformerEncoder):
            width = _width(self.clouds)
            if self.tokens == "pairs" and self.clouds.edges is not None:
                width += self.clouds.edges.shape[3]
            return EncoderOnNodes(net, width, self.out_features)
        given = net if _takes_any_axes(net) else Folded(net)
        if self.tokens == "nodes" and self.clouds.num_nodes is not None and not isinstance(net, Transformer):
            given = _WithLengths(given)
        return given

    def readout(self, y: Tensor, pool: str) -> nn.Module:
        n, d, flat = self.n, self.d, self.tokens == "flat"
        if self.output == "invariant" and y.ndim == 3:
            return MeanReadout()
        if self.output == "invariant" and y.ndim == 4 and y.shape[2] == n:
            return PooledReadout(pool)
        wanted = f"(B, S, n, C) with n = {n}" if self.output == "nodes" else f"(B, S, n, d) with n, d = {n}, {d}"
        size = None if self.output == "nodes" else d
        if self.output == "invariant":
            wanted = f"(B, S, C) or (B, S, n, C) with n = {n}"
        elif flat and y.ndim == 3 and y.shape[2] % n == 0 and size in (None, y.shape[2] // n):
            return _Unflattened(n, self._of_nodes())
        elif not flat and y.ndim == 4 and y.shape[2] == n and size in (None, y.shape[3]):
            return self._of_nodes()
        elif flat:
            wanted = f"(B, S, n C) with n = {n}" if size is None else f"(B, S, n d) with n, d = {n}, {d}"
        raise ValueError(f"symmetrize: net must return {wanted} for output {self.output!r}, got {tuple(y.shape)}")

    def _of_nodes(self) -> nn.Module:
        if self.output == "positions":
            return NodeReadout(displacement=True)
        return LayoutReadout("nc" if self.output == "nodes" else "nv")


class _Graphs:
    """The parts for graphs."""

    def __init__(self, net, group, graphs: Graphs, tokens, output, out_features, width, pool):
        if not isinstance(group, Symmetric):
            raise ValueError(f"symmetrize: group must be Symmetric(n) for Graphs, got {group}")
        self.net, self.graphs, self.N, self.output, self.out_features = net, graphs, group.n, output, out_features
        self.node_features = graphs.x.shape[1]
        self.edge_features = graphs.attributes.shape[1]
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
            wanted = "timm_backbone" if tokens == "patches" else "hf_backbone"
            raise ValueError(
                f"symmetrize: net must be made by {wanted} for tokens {tokens!r}, got {type(net).__name__}"
            )
        if output == "pairs" and tokens != "patches":
            raise ValueError(f"symmetrize: tokens must be 'patches' for output 'pairs', got {tokens!r}")

    def width(self) -> int:
        found = self.given_width or _inputs_of(self.net)
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
        return self.net if _takes_any_axes(self.net) or self.tokens != "flat" else Folded(self.net)

    def _of_pyg(self) -> nn.Module:
        """With outputs of nodes, pooled where graphs are asked for, or of graphs: as the network gives them."""
        pool = self.pool if self.output == "invariant" else None
        h = self.graphs.x.new_zeros(self.graphs.x.shape[0], 1, self.width())
        backbone = PyGBackbone(self.net, rows="nodes", pool=pool)
        try:
            _run(lambda: backbone(h, self.graphs), backbone)
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


def takes_edges(net: nn.Module) -> bool:
    """Whether its forward takes edge_index, as networks of PyTorch Geometric do."""
    return "edge_index" in inspect.signature(net.forward).parameters


def _takes_any_axes(net: nn.Module) -> bool:
    """Whether it takes inputs of any leading axes: our own backbones, and linear maps with what acts entry by entry."""
    if isinstance(net, MLP | Transformer | OnTokens | GINBackbone):
        return True
    parts = list(net) if isinstance(net, nn.Sequential) else [net]
    return all(type(part) in ENTRYWISE for part in parts)


def _inputs_of(net: nn.Module) -> int | None:
    """What the network takes, as far as it says so."""
    if isinstance(net, MLP):
        return net.widths[0]
    for name in ("in_channels", "in_features", "width"):
        if isinstance(found := getattr(net, name, None), int):
            return found
    return _first_linear(net)


class EncoderOnNodes(nn.Module):
    """An `nn.TransformerEncoder` between linear maps of each token: (..., L, in_features) -> (..., L, out_features).

    It runs as one op where it fits (`fuse`), else as it is. lengths (...) int64: the valid tokens.
    """

    def __init__(self, encoder: nn.TransformerEncoder, in_features: int, out_features: int):
        super().__init__()
        width = encoder.layers[0].self_attn.embed_dim
        self.embed = nn.Linear(in_features, width)
        self.reason = ""
        try:
            self.encoder: nn.Module = fuse(encoder)
        except ValueError as error:  # it computes what the op does not
            self.encoder, self.reason = _WithLengths(Folded(encoder)), str(error)
        self.head = nn.Linear(width, out_features)

    def extra_repr(self) -> str:
        return f"by modules: {self.reason}" if self.reason else ""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        h = self.embed(x)
        return self.head(self.encoder(h) if lengths is None else self.encoder(h, lengths))


class _WithLengths(nn.Module):
    """A network whose last input are lengths: given to a folded one, left out for one that acts node by node."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        if not isinstance(self.net, Folded):
            return self.net(x, *others[:-1])
        return self.net(x, *others[:-1], lengths=others[-1] if others else None)


class _Unflattened(nn.Module):
    """A readout of nodes, for outputs of all nodes in one vector: (B, S, n C) as (B, S, n, C)."""

    def __init__(self, n: int, readout: nn.Module):
        super().__init__()
        self.n, self.readout = n, readout

    @property
    def layout(self) -> Any:
        return getattr(self.readout, "layout", None)

    def forward(self, outputs: Tensor, batch: Any, group: Group, g: Any) -> Tensor:
        return self.readout(outputs.unflatten(2, (self.n, -1)), batch, group, g)

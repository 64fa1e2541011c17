"""Every public op, module and whole model as a small program of tensors: the rows of the matrix in docs/programs.md.

A program is a module with one argument, a tuple of tensors, `Graphs` and `PointClouds`. Its inputs are made for a `Size`, and
which of their axes vary follows from two sizes (`varying`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from probsym_fast import Symmetrized, models, ops
from probsym_fast.distributions import (
    GIN,
    Frame,
    Identity,
    Learned,
    Normal,
    Uniform,
    UniformNoise,
    VectorNeurons,
)
from probsym_fast.draws import Draws
from probsym_fast.groups import Euclidean, Graphs, Motion, PointClouds, Symmetric

S, N, C, D, GRID = 3, 8, 2, 6, 2  # samples, slots, channels, width, patches along an axis
P = N // GRID
COUNTS = 5, 7, 6, 8, 4, 3, 2  # nodes of the graphs


class Size(NamedTuple):
    """batch: graphs or clouds. edges: of all graphs together. nodes: of a cloud."""

    batch: int = 3
    edges: int = 13
    nodes: int = 5


# axis -> six sizes that differ in it; with more graphs there are more nodes and edges
SIZES = {
    "batch": [Size(batch, 4 * batch + 1) for batch in (3, 2, 4, 7, 5, 6)],
    "edges": [Size(edges=edges) for edges in (13, 9, 2, 40, 17, 29)],
    "nodes": [Size(nodes=nodes) for nodes in (5, 6, 8, 9, 7, 11)],  # more than the neighbours that VectorNeurons joins
}


class Program(nn.Module):
    """call(part, *inputs), of one module or none."""

    def __init__(self, call: Callable[..., Any], part: nn.Module | None):
        super().__init__()
        self.call, self.part = call, part

    def forward(self, inputs: tuple) -> Any:
        return self.call(*inputs) if self.part is None else self.call(self.part, *inputs)


@dataclass(frozen=True)
class Row:
    """call(part(), *inputs(size)), which returns tensors.

    kind: its heading in the table. covers: the public names that it shows. axes: those of SIZES that its inputs have. trains:
    whether its outputs have gradients. refuses: what the error says wherever a program is recorded. slow: it takes long to
    trace, so only the slow tests do it. programs: how many of any size there are, since it works in two ways.
    """

    kind: str
    covers: tuple[str, ...]
    call: Callable[..., Any]
    inputs: Callable[[Size], tuple]
    part: Callable[[], nn.Module] | None = None
    axes: tuple[str, ...] = ("batch",)
    trains: bool = True
    refuses: str | None = None
    slow: bool = False
    programs: int = 1

    def program(self, training: bool) -> Program:
        torch.manual_seed(0)
        return Program(self.call, self.part() if self.part else None).train(training)

    def sample(self, size: Size, training: bool) -> tuple:
        """Its inputs. In training those of a row without weights need gradients."""
        torch.manual_seed(1)
        inputs = self.inputs(size)
        leaves = training and self.part is None
        return tree_map(lambda x: x.requires_grad_() if leaves and x.is_floating_point() else x, inputs)

    def leaves(self, size: Size) -> list[Tensor]:
        return tree_leaves(self.sample(size, False))


def cases(wanted: Callable[[Row], bool] = lambda row: True) -> list:
    """The rows to parametrise a test with, those that are slow with the mark."""
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(row, id=name, marks=marks[row.slow]) for name, row in ROWS.items() if wanted(row)]


def cases_by_axis(training: bool) -> list:
    """(row, axis): every axis of every row, in training of those that train. Slow: further axes in training, of slow rows."""
    found = []
    for name, row in ROWS.items():
        for axis in row.axes:
            slow = row.slow or (training and (axis != "batch" or "points" in name))
            if row.trains or not training:
                found.append(pytest.param(row, axis, id=f"{name}-{axis}", marks=[pytest.mark.slow] if slow else []))
    return found


def refused(row: Row) -> AbstractContextManager:
    """Where a program is recorded: expects the row's error, if it has one."""
    return pytest.raises(Exception, match=re.escape(row.refuses)) if row.refuses else nullcontext()


def step(run: Callable, inputs: tuple, training: bool) -> list[Tensor]:
    """The outputs; in training after a backward pass of the sum of their squares."""
    with torch.set_grad_enabled(training):
        found = tree_leaves(run(inputs))
    if training:
        sum(x.square().sum() for x in found if x.requires_grad).backward()
    return [x.detach() for x in found]


# --- inputs ---


def graphs(size: Size, attributes: bool = False, **fields: Tensor) -> Graphs:
    """Ragged graphs with random edges; with `attributes` they have edge_attr and key."""
    counts = torch.tensor([0, *COUNTS[: size.batch]])
    ptr, graph = counts.cumsum(0), torch.arange(size.edges) % size.batch
    edges = (torch.rand(2, size.edges) * counts[1:][graph]).long() + ptr[graph]
    if attributes:
        fields |= {"edge_attr": torch.randn(size.edges, 2), "key": torch.arange(size.batch) * 7 + 1}
    return Graphs(torch.randn(int(ptr[-1]), C), edges, ptr, **fields)


def framed(size: Size) -> Graphs:
    batch = graphs(size)
    return batch.replace(frame=batch.local % 3)


def paired(size: Size, attributes: bool = False) -> Graphs:
    """With a pair of nodes to predict for every edge: from its end to its beginning."""
    batch = graphs(size, attributes)
    return batch.replace(pairs=batch.edge_index.flip(0))


def clouds(size: Size) -> PointClouds:
    lead = size.batch, size.nodes
    return PointClouds(torch.randn(*lead, 3), torch.randn(*lead, 3), torch.randn(*lead, size.nodes, 2))


def scores(size: Size) -> Tensor:
    return torch.randn(size.batch, S, N)


def seed() -> Tensor:
    return torch.tensor(2**61 + 5)


def frames(size: Size) -> Tensor:
    return torch.linalg.qr(torch.randn(size.batch, S, 3, 3)).Q


# --- rows ---

ROWS: dict[str, Row] = {}


def row(kind: str, name: str, call: Callable, inputs: Callable[[Size], tuple], *covers: str, **settings: Any) -> None:
    """Adds a row. It covers the public name that its own name begins with, and `covers`."""
    ROWS[name] = Row(kind, (name.split()[0], *covers), call, inputs, **settings)


def soft(batch: Graphs, given: Tensor) -> ops.SoftPermutation:
    return ops.soft_permutation(given, batch.num_nodes, tau=0.1)


def of_ops() -> None:
    def on_graphs(call: Callable) -> Callable:
        """call(batch, p, *others) with a soft permutation from given scores."""
        return lambda batch, given, *others: call(batch, soft(batch, given), *others)

    def patches(*shape: int) -> Tensor:
        return torch.randn(D, C, *shape)

    both = {"axes": ("batch", "edges")}
    op = "ops"
    row(
        op,
        "act_orthogonal",
        lambda x, g: ops.act_orthogonal(x, g, inverse=True),
        lambda size: (torch.randn(size.batch, size.nodes, 3, 2), frames(size)),
        axes=("batch", "nodes"),
    )
    row(
        op,
        "aggregate",
        lambda batch, h: ops.aggregate(h, batch.edge_index),
        lambda size: (graphs(size), torch.randn(sum(COUNTS[: size.batch]), S, D)),
        **both,
    )
    row(
        op,
        "aggregate (virtual nodes)",
        lambda batch, h, own: ops.aggregate(h, batch.edge_index, own=own, ptr=batch.ptr),
        lambda size: (graphs(size), torch.randn(sum(COUNTS[: size.batch]) + size.batch, S, D), torch.rand(())),
        **both,
    )
    for mode in ("zeros", "replicate", "reflect", "circular"):
        settings = {"grid": 3, "pad_mode": mode, "centered": True}
        row(
            op,
            f"embed_edges ({mode})",
            on_graphs(
                lambda batch, p, w, b, settings=settings: ops.embed_edges(
                    batch.edge_index, batch.edge_attr, batch.ptr, p, w, b, **settings
                )
            ),
            lambda size: (graphs(size, attributes=True), scores(size), patches(3, 3), torch.randn(D)),
            **both,
        )
    row(
        op,
        "embed_nodes",
        on_graphs(lambda batch, p, w, b: ops.embed_nodes(batch.x, batch.ptr, p, w, b, tokens=GRID)),
        lambda size: (graphs(size), scores(size), patches(P), torch.randn(D)),
    )
    row(
        op,
        "embed_matrix",
        on_graphs(lambda batch, p, x, w, b: ops.embed_matrix(x, p, w, b, grid=GRID)),
        lambda size: (graphs(size), scores(size), torch.randn(size.batch, N, N, C), patches(P, P), torch.randn(D)),
    )
    row(
        op,
        "linear_batch_norm_relu",
        ops.linear_batch_norm_relu,
        lambda size: (torch.randn(5 * size.batch, C), torch.randn(D, C), torch.rand(D), torch.randn(D)),
    )
    row(
        op,
        "node_identifiers",
        on_graphs(lambda batch, p, w: ops.node_identifiers(batch.ptr, p, w, nodes=batch.x.shape[0])),
        lambda size: (graphs(size), scores(size), torch.randn(N, D)),
    )
    row(
        op,
        "noise",
        lambda seed, x: ops.noise(seed, (x.shape[0], S, 2), "test", normal=True),
        lambda size: (seed(), torch.zeros(size.batch)),
        trains=False,
    )
    row(
        op,
        "noise (rows)",
        lambda seed, keys: ops.noise(seed, (keys.shape[0], S), "test", rows=keys, mirrored=True, block=2),
        lambda size: (seed(), torch.arange(size.batch)),
        trains=False,
    )
    row(
        op,
        "orthogonal_frame",
        lambda x: ops.orthogonal_frame(x, special=True),
        lambda size: (torch.randn(size.batch, S, 3, 3),),
    )
    row(
        op,
        "permutation_entropy",
        on_graphs(lambda batch, p: ops.permutation_entropy(p)),
        lambda size: (graphs(size), scores(size)),
    )
    row(
        op,
        "readout (nodes)",
        on_graphs(lambda batch, p, z, w, b: ops.readout(z, batch.ptr, p, w, b, nodes=batch.x.shape[0])),
        lambda size: (
            graphs(size),
            scores(size),
            torch.randn(size.batch, S, GRID, D),
            torch.randn(D, C, P),
            torch.randn(C),
        ),
    )
    row(
        op,
        "readout (pairs)",
        on_graphs(lambda batch, p, z, w, b: ops.readout(z, batch.ptr, p, w, b, at=batch.pairs)),
        lambda size: (
            paired(size),
            scores(size),
            torch.randn(size.batch, S, GRID**2, D),
            torch.randn(D, C, P, P),
            torch.randn(C),
        ),
        **both,
    )
    row(
        op,
        "soft_permutation",
        lambda batch, given: soft(batch, given).soft(),
        lambda size: (graphs(size), scores(size)),
    )


def of_embeddings() -> None:
    kind = "embeddings"

    def embedded(part: nn.Module, batch: Graphs, given: Tensor) -> Tensor:
        return part(batch, Symmetric(N), soft(batch, given))[0]

    def plain(size: Size) -> tuple:
        return graphs(size), scores(size)

    def full(size: Size) -> tuple:
        return graphs(size, attributes=True), scores(size)

    of_edges = {
        "FlatGraph": lambda **some: models.FlatGraph(N, D, C, **some),
        "FlatGraph (soft)": lambda **some: models.FlatGraph(N, D, C, soft=True, **some),
        "GraphTokens": lambda **some: models.GraphTokens(N, D, GRID, C, dense=False, **some),
        "GraphTokens (dense)": lambda **some: models.GraphTokens(N, D, GRID, C, nodes="diagonal", dense=True, **some),
    }
    for name, make in of_edges.items():
        patch = ["PatchWeight"] if name == "FlatGraph" else []
        settings = {"axes": ("batch", "edges")}
        row(kind, name, embedded, plain, *patch, part=make, slow="soft" in name, **settings)
        separator = "," if name.endswith(")") else " ("
        more = f"{name.removesuffix(')')}{separator}edge_attr, key)".replace(",e", ", e")
        row(kind, more, embedded, full, part=lambda make=make: make(edge_features=2), slow=True, **settings)
    by_density = {"axes": ("batch", "edges"), "programs": 2}
    row(kind, "GraphTokens (by density)", embedded, plain, part=lambda: models.GraphTokens(N, D, GRID, C), **by_density)
    row(kind, "IdentifiedNodes", embedded, plain, part=lambda: models.IdentifiedNodes(N, D, C), axes=("batch", "edges"))
    row(kind, "NodeTokens", embedded, plain, part=lambda: models.NodeTokens(N, D, GRID, C, "reflect", True))

    def moved(part: nn.Module, batch: PointClouds, frame: Tensor) -> Any:
        g = Motion(frame, batch.center[:, None].expand(-1, S, -1))
        return part(batch, Euclidean(3), g)

    for name in ("NodeVectors", "PairTokens"):
        row(
            kind,
            name,
            moved,
            lambda size: (clouds(size), frames(size)),
            part=getattr(models, name),
            axes=("batch", "nodes"),
            trains=False,
        )


def of_readouts() -> None:
    kind = "readouts"

    def read(part: nn.Module, outputs: Tensor, batch: Graphs, given: Tensor) -> Tensor:
        return part(outputs, batch, Symmetric(N), soft(batch, given))

    def add(name: str, make: Callable[[], nn.Module], *shape: int, pairs: bool = False, **settings: Any) -> None:
        def inputs(size: Size) -> tuple:
            return torch.randn(size.batch, S, *shape, D), (paired if pairs else graphs)(size), scores(size)

        row(kind, name, read, inputs, part=make, **settings)

    add("MeanReadout", models.MeanReadout, trains=False)
    add("GraphReadout", lambda: models.GraphReadout(D, C))
    add("SlotReadout", lambda: models.SlotReadout(N, D, C))
    add("DiagonalReadout", lambda: models.DiagonalReadout(N, D, GRID, C), GRID)
    add("PairReadout", lambda: models.PairReadout(N, D, GRID), GRID**2, pairs=True, axes=("batch", "edges"))

    def placed(part: nn.Module, outputs: Tensor, batch: PointClouds, frame: Tensor) -> Tensor:
        g = Motion(frame, batch.center[:, None].expand(-1, S, -1))
        return part(outputs, batch, Euclidean(3), g)

    for displacement in (False, True):
        row(
            kind,
            f"NodeReadout ({'displacements' if displacement else 'positions'})",
            placed,
            lambda size: (torch.randn(size.batch, S, size.nodes, 3), clouds(size), frames(size)),
            part=lambda displacement=displacement: models.NodeReadout(displacement),
            axes=("batch", "nodes"),
            trains=False,
        )


def drawn(distribution: nn.Module, batch: Any, seed: Tensor) -> list[Tensor]:
    """The tensors of the elements, and the penalties."""
    g, penalties = distribution(batch, S, Draws(seed=seed))
    parts = g if type(g) is tuple else (g,)
    found = []
    for part in parts:
        if isinstance(part, ops.SoftPermutation):
            found += [part.order, part.scores, part.log_r]
        elif isinstance(part, ops.Permutation):
            found.append(part.order)
        elif isinstance(part, Motion):
            found += [x for x in part if x is not None]
        else:
            found.append(part)
    return [*found, *penalties.values()]


def of_distributions() -> None:
    kind, both, free = "distributions", ("batch", "edges"), ("batch", "nodes")

    def nodes(size: Size) -> int:
        return sum(COUNTS[: size.batch])

    row(
        kind,
        "GIN",
        lambda net, batch, noise: net(batch, noise)["scores"],
        lambda size: (graphs(size), torch.randn(nodes(size), S, C)),
        part=lambda: GIN(C, D, 2),
        axes=both,
    )
    row(
        kind,
        "VectorNeurons",
        lambda net, batch, noise: tuple(net(batch, noise).values()),
        lambda size: (clouds(size), torch.randn(size.batch, S, size.nodes, 3, 2)),
        part=lambda: VectorNeurons(width=4, dropout=0.0),
        axes=free,
        slow=True,
    )
    row(
        kind,
        "Learned (graphs)",
        drawn,
        lambda size: (graphs(size), seed()),
        "UniformNoise",
        part=lambda: Learned(Symmetric(N), GIN(C, D, 1), UniformNoise()),
        axes=both,
    )
    row(
        kind,
        "Learned (graphs, edge_attr, key)",
        drawn,
        lambda size: (graphs(size, attributes=True), seed()),
        "Normal",
        part=lambda: Learned(Symmetric(N), GIN(C, D, 1), Normal(1.0, fixed=3)),
        axes=both,
        slow=True,
    )
    row(
        kind,
        "Learned (points)",
        drawn,
        lambda size: (clouds(size), seed()),
        part=lambda: Learned(Euclidean(3), VectorNeurons(width=4, scores=False, dropout=0.0)),
        axes=free,
    )
    for name, make in {"Uniform": Uniform, "Identity": Identity}.items():
        row(
            kind,
            f"{name} (graphs)",
            drawn,
            lambda size: (graphs(size), seed()),
            part=lambda make=make: make(Symmetric(N)),
            axes=both,
            trains=False,
        )
        row(
            kind,
            f"{name} (points)",
            drawn,
            lambda size: (clouds(size), seed()),
            part=lambda make=make: make(Euclidean(3)),
            axes=free,
            trains=False,
        )
    row(
        kind,
        "Frame (classes given)",
        drawn,
        lambda size: (framed(size), seed()),
        part=lambda: Frame(Symmetric(N)),
        axes=both,
        trains=False,
    )
    row(
        kind,
        "Frame",
        drawn,
        lambda size: (graphs(size), seed()),
        part=lambda: Frame(Symmetric(N)),
        axes=both,
        trains=False,
        refuses="Frame: batch.frame must hold classes where a program is recorded, got None",
    )


def tiny_vit() -> nn.Module:
    return models.timm_backbone(
        "vit_tiny_patch16_224", grid=GRID, read="diagonal", depth=1, embed_dim=D, num_heads=2, mlp_ratio=2
    )


def tiny_bert() -> nn.Module:
    from transformers import BertConfig

    sizes = {"vocab_size": 5, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, **dropout, intermediate_size=8, max_position_embeddings=GRID**2)
    return models.hf_backbone(config, False, tokens=GRID**2)


def of_backbones() -> None:
    kind = "backbones"

    def tokens(*shape: int) -> Callable[[Size], tuple]:
        return lambda size: (torch.randn(size.batch, S, *shape),)

    def run(net: nn.Module, *inputs: Any) -> Tensor:
        return net(*inputs)

    row(kind, "MLP", run, tokens(D), part=lambda: models.MLP([D, D, C]))
    row(
        kind,
        "GINBackbone",
        run,
        lambda size: (torch.randn(sum(COUNTS[: size.batch]), S, D), graphs(size)),
        part=lambda: models.GINBackbone(D, 2, C, "tanh"),
        axes=("batch", "edges"),
    )
    row(
        kind,
        "MessagePassing",
        run,
        lambda size: (
            torch.randn(size.batch, S, size.nodes, 6),
            torch.randn(size.batch, 1, size.nodes, size.nodes, 2),
        ),
        part=lambda: models.MessagePassing(width=D, layers=1),
        axes=("batch", "nodes"),
    )
    row(
        kind,
        "Transformer",
        run,
        tokens(9, 8),
        part=lambda: models.Transformer(width=8, layers=1, heads=2, feedforward=8, tokens=9, read=[0, 4, 8]),
    )
    row(kind, "VisionBackbone", run, tokens(GRID**2, D), "timm_backbone", part=tiny_vit)
    row(kind, "LanguageBackbone", run, tokens(GRID**2, D), "hf_backbone", part=tiny_bert)


# --- whole models ---


def on_graphs(*parts: nn.Module) -> Symmetrized:
    return Symmetrized(*parts, Learned(Symmetric(N), GIN(C, D, 1), UniformNoise()))


def flat_mlp(edge_features: int = 1) -> Symmetrized:
    return on_graphs(models.MLP([D, D, 3]), models.FlatGraph(N, D, C, edge_features), models.MeanReadout())


def gin_with_identifiers(edge_features: int = 1) -> Symmetrized:
    return on_graphs(models.GINBackbone(D, 2, 3, "relu"), models.IdentifiedNodes(N, D, C), models.MeanReadout())


def pattern_vit(edge_features: int = 1) -> Symmetrized:
    embed = models.GraphTokens(N, D, GRID, C, edge_features, nodes="diagonal", dense=True)
    return on_graphs(tiny_vit(), embed, models.DiagonalReadout(N, D, GRID, 3))


def points_gnn() -> Symmetrized:
    network = VectorNeurons(width=4, scores=False, dropout=0.0)  # eager and compiled programs drop others
    pieces = models.MessagePassing(width=D, layers=1), models.NodeVectors(), models.NodeReadout(displacement=False)
    return Symmetrized(*pieces, Learned(Euclidean(3), network))


def points_transformer() -> Symmetrized:
    backbone = models.Transformer(width=8, layers=1, heads=2, feedforward=8, read=range(0, 25, 6))
    distribution = Learned(Symmetric(5) * Euclidean(3), VectorNeurons(width=4, dropout=0.0), tau=0.1)
    return Symmetrized(backbone, models.PairTokens(), models.NodeReadout(displacement=True), distribution)


def uniform_transformer() -> Symmetrized:
    backbone = models.Transformer(width=8, layers=1, heads=2, feedforward=8, read=range(0, 25, 6))
    distribution = Uniform(Symmetric(5) * Euclidean(3))
    return Symmetrized(backbone, models.PairTokens(), models.NodeReadout(displacement=True), distribution)


def of_whole_models() -> None:
    kind = "whole models"

    def run(model: Symmetrized, batch: Any, seed: Tensor) -> list[Tensor]:
        prediction, penalties = model(batch, S, seed=seed)
        return [prediction, *penalties.values()]

    for make in (flat_mlp, gin_with_identifiers, pattern_vit):
        name = make.__name__.replace("_", " ")
        both = {"axes": ("batch", "edges")}
        ROWS[name] = Row(kind, ("Symmetrized",), run, lambda size: (graphs(size), seed()), make, **both)
        full = Row(
            kind,
            ("Symmetrized",),
            run,
            lambda size: (graphs(size, attributes=True), seed()),
            lambda make=make: make(2),
            **both,
            slow=True,
        )
        ROWS[f"{name} (edge_attr, key)"] = full
    for make in (points_gnn, points_transformer, uniform_transformer):
        axes = ("batch", "nodes") if make is points_gnn else ("batch",)
        ROWS[make.__name__.replace("_", " ")] = Row(
            kind,
            ("Symmetrized",),
            run,
            lambda size: (clouds(size), seed()),
            make,
            axes=axes,
            slow=make is points_transformer,
        )


for add in (of_ops, of_embeddings, of_readouts, of_distributions, of_backbones, of_whole_models):
    add()


def varying(row: Row, *axes: str) -> tuple:
    """`dynamic_shapes` of the row's inputs for torch.export: Dim.DYNAMIC for every axis that differs along these axes."""
    first = row.sample(SIZES["batch"][0], False)
    others = [row.sample(SIZES[axis][1], False) for axis in axes]

    def of(*tensors: Tensor) -> dict[int, Any]:
        return {
            i: torch.export.Dim.DYNAMIC
            for i, sizes in enumerate(zip(*(x.shape for x in tensors), strict=True))
            if len(set(sizes)) > 1
        }

    def shapes(*inputs: Any) -> Any:
        if isinstance(inputs[0], Tensor):
            return of(*inputs)
        return [of(*tensors) for tensors in zip(*map(tree_leaves, inputs), strict=True)]  # torch takes batches as lists

    return tuple(shapes(*inputs) for inputs in zip(first, *others, strict=True))

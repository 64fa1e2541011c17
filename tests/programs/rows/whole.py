"""Whole models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast import Symmetrized, models
from probsym_fast.distributions import GIN, Learned, Uniform, UniformNoise, VectorNeurons
from probsym_fast.groups import Euclidean, SpecialOrthogonal, Symmetric
from tests.programs.rows.backbones import tiny_vit
from tests.programs.rows.base import Rows
from tests.programs.rows.inputs import GRID, C, D, N, S, clouds, graphs, images, seed

ROWS = Rows("whole models")


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


class MovedPixels(nn.Module):
    """Pixels and mask of g^-1: (B, S, C + 1, H, W)."""

    def forward(self, batch: Any, group: Any, g: Any) -> tuple[Tensor]:
        mask = group.act(g, batch.mask, "hw", inverse=True)[:, :, None].to(batch.dtype)
        return (torch.cat([group.act(g, batch.pixels, "chw", inverse=True), mask], 2),)


def pictures() -> Symmetrized:
    """Pictures that turn along with the images."""
    backbone = nn.Sequential(nn.Linear(N, N), nn.Tanh())  # torch's convolutions compile again for larger batches
    return Symmetrized(backbone, MovedPixels(), models.LayoutReadout("chw"), Uniform(SpecialOrthogonal(2)))


def run(model: Symmetrized, batch: Any, seed: Tensor) -> list[Tensor]:
    prediction, penalties = model(batch, S, seed=seed)
    return [prediction, *penalties.values()]


both = {"covers": ("Symmetrized",), "axes": ("batch", "edges")}
for make in (flat_mlp, gin_with_identifiers, pattern_vit):
    name = make.__name__.replace("_", " ")
    ROWS.add(name, run, lambda size: (graphs(size), seed()), part=make, **both)
    full = {"part": lambda make=make: make(2), "slow": True, **both}
    ROWS.add(f"{name} (edge_attr, key)", run, lambda size: (graphs(size, attributes=True), seed()), **full)
for make in (points_gnn, points_transformer, uniform_transformer):
    ROWS.add(
        make.__name__.replace("_", " "),
        run,
        lambda size: (clouds(size), seed()),
        covers=("Symmetrized",),
        part=make,
        axes=("batch", "nodes") if make is points_gnn else ("batch",),
        slow=make is points_transformer,
    )
ROWS.add("pictures", run, lambda size: (images(size), seed()), covers=("Symmetrized",), part=pictures)

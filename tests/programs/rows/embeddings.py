"""Embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast import models
from probsym_fast.groups import Dihedral, Euclidean, Graphs, Images, Motion, PointClouds, SpecialOrthogonal, Symmetric
from tests.programs.rows.base import Rows, Size
from tests.programs.rows.inputs import GRID, C, D, N, S, clouds, frames, graphs, images, planes, scores, soft, turns

ROWS = Rows("embeddings")
SQUARE = Dihedral(4)


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
both = {"axes": ("batch", "edges")}
for name, make in of_edges.items():
    covers = ("FlatGraph", "PatchWeight") if name == "FlatGraph" else (name.split()[0],)
    ROWS.add(name, embedded, plain, covers=covers, part=make, slow="soft" in name, **both)
    separator = ", " if name.endswith(")") else " ("
    more = f"{name.removesuffix(')')}{separator}edge_attr, key)"
    ROWS.add(more, embedded, full, part=lambda make=make: make(edge_features=2), slow=True, **both)
ROWS.add(
    "GraphTokens (by density)", embedded, plain, part=lambda: models.GraphTokens(N, D, GRID, C), programs=2, **both
)
ROWS.add("IdentifiedNodes", embedded, plain, part=lambda: models.IdentifiedNodes(N, D, C), **both)
ROWS.add("NodeTokens", embedded, plain, part=lambda: models.NodeTokens(N, D, GRID, C, "reflect", True))


def moved(part: nn.Module, batch: PointClouds, frame: Tensor) -> Any:
    g = Motion(frame, batch.center[:, None].expand(-1, S, -1))
    return part(batch, Euclidean(3), g)


for name in ("NodeVectors", "PairTokens", "FlatCloud"):
    ROWS.add(
        name,
        moved,
        lambda size: (clouds(size), frames(size)),
        part=getattr(models, name),
        axes=("batch", "nodes"),
        trains=False,
    )


def on_images(part: nn.Module, batch: Images, plane: Tensor) -> Tensor:
    return part(batch, SQUARE if plane.dtype == torch.int64 else SpecialOrthogonal(2), plane)[0]


for label, plane in (("", planes), (" (turns)", turns)):
    given = lambda size, plane=plane: (images(size), plane(size))  # noqa: E731
    ROWS.add(f"ImageTokens{label}", on_images, given, part=lambda: models.ImageTokens(D, N // GRID, C))
    ROWS.add(f"MovedImages{label}", on_images, given, part=models.MovedImages, trains=False)

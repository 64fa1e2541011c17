"""Readouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast import models
from probsym_fast.groups import Euclidean, Graphs, Images, Motion, PointClouds, SpecialOrthogonal, Symmetric
from tests.programs.rows.base import Rows, Size
from tests.programs.rows.inputs import GRID, C, D, N, S, clouds, frames, graphs, images, paired, planes, scores, soft

ROWS = Rows("readouts")


def read(part: nn.Module, outputs: Tensor, batch: Graphs, given: Tensor) -> Tensor:
    return part(outputs, batch, Symmetric(N), soft(batch, given))


def of_tokens(name: str, make: Callable[[], nn.Module], *shape: int, pairs: bool = False, **settings: Any) -> None:
    def inputs(size: Size) -> tuple:
        return torch.randn(size.batch, S, *shape, D), (paired if pairs else graphs)(size), scores(size)

    ROWS.add(name, read, inputs, part=make, **settings)


of_tokens("MeanReadout", models.MeanReadout, trains=False)
of_tokens("GraphReadout", lambda: models.GraphReadout(D, C))
of_tokens("SlotReadout", lambda: models.SlotReadout(N, D, C))
of_tokens("ScoredReadout", lambda: models.ScoredReadout(models.MeanReadout(), nn.Linear(D, 1)))
of_tokens("DiagonalReadout", lambda: models.DiagonalReadout(N, D, GRID, C), GRID)
of_tokens("PairReadout", lambda: models.PairReadout(N, D, GRID), GRID**2, pairs=True, axes=("batch", "edges"))


def placed(part: nn.Module, outputs: Tensor, batch: PointClouds, frame: Tensor) -> Tensor:
    g = Motion(frame, batch.center[:, None].expand(-1, S, -1))
    return part(outputs, batch, Euclidean(3), g)


for label, make in (
    ("NodeReadout (positions)", lambda: models.NodeReadout(False)),
    ("NodeReadout (displacements)", lambda: models.NodeReadout(True)),
    ("PooledReadout", models.PooledReadout),
    ("LayoutReadout", lambda: models.LayoutReadout("nv")),
):
    ROWS.add(
        label,
        placed,
        lambda size: (torch.randn(size.batch, S, size.nodes, 3), clouds(size), frames(size)),
        part=make,
        axes=("batch", "nodes"),
        trains=False,
    )


def of_images(part: nn.Module, outputs: Tensor, batch: Images, plane: Tensor) -> Tensor:
    return part(outputs, batch, SpecialOrthogonal(2), plane)


for label, make, shape in (
    ("ClassReadout", lambda: models.ClassReadout(nn.Linear(D, C)), (D,)),
    (
        "ClassReadout (probabilities)",
        lambda: models.ClassReadout(nn.Linear(D, C), average="probabilities"),
        (D,),
    ),
    ("TokenReadout", lambda: models.TokenReadout(GRID), (GRID**2, D)),
    ("MaskReadout", models.MaskReadout, (D, N, N)),
    ("MaskReadout (tokens)", lambda: models.MaskReadout(D, C, N // GRID, grid=GRID), (GRID**2, D)),
):
    ROWS.add(
        label,
        of_images,
        lambda size, shape=shape: (torch.randn(size.batch, S, *shape), images(size), planes(size)),
        part=make,
        trains=label not in ("TokenReadout", "MaskReadout"),
    )
ROWS.add(
    "confidence",
    lambda x: models.confidence(x).to(x.dtype),  # itself in float64
    lambda size: (torch.randn(S, size.batch, C),),
)

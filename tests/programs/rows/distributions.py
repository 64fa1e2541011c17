"""Distributions, and the networks of the learned one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast import ops
from probsym_fast.distributions import (
    GIN,
    Energy,
    Frame,
    Identity,
    Learned,
    MinimalFrame,
    Normal,
    Orbit,
    RotationEnergy,
    Uniform,
    UniformNoise,
    VectorNeurons,
    WeightedFrame,
)
from probsym_fast.draws import Draws
from probsym_fast.groups import Cyclic, Euclidean, Finite, Motion, SpecialEuclidean, SpecialOrthogonal, Symmetric
from probsym_fast.models import ImageScores, MovedImages
from tests.programs.rows.base import Rows
from tests.programs.rows.inputs import C, D, N, S, clouds, framed, graphs, images, nodes, seed

ROWS = Rows("distributions")


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


class Spread(nn.Module):
    """A score (B, S) of moved clouds from their coordinates."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh().mean(-2)


class Moved(nn.Module):
    def forward(self, batch: Any, group: Any, g: Any) -> Tensor:
        return group.act(g, batch.positions, "np", inverse=True)


def weighed(distribution: nn.Module, batch: Any, seed: Tensor) -> list[Tensor]:
    """The weights of some elements and of all of them."""
    first, some, penalties = distribution.elements_and_weights(batch, 2, Draws(seed=seed))
    _, every, _ = distribution.elements_and_weights(batch, 4, Draws(seed=seed))
    return [first, some, every, *penalties.values()]


both, free = ("batch", "edges"), ("batch", "nodes")
KLEIN = torch.diag_embed(torch.tensor([[1.0, -1, 1], [-1, 1, 1]]))  # two of its three turns

ROWS.add(
    "GIN",
    lambda net, batch, noise: net(batch, noise)["scores"],
    lambda size: (graphs(size), torch.randn(nodes(size), S, C)),
    part=lambda: GIN(C, D, 2),
    axes=both,
)
ROWS.add(
    "VectorNeurons",
    lambda net, batch, noise: tuple(net(batch, noise).values()),
    lambda size: (clouds(size), torch.randn(size.batch, S, size.nodes, 3, 2)),
    part=lambda: VectorNeurons(width=4, dropout=0.0),
    axes=free,
    slow=True,
)
ROWS.add(
    "Learned (graphs)",
    drawn,
    lambda size: (graphs(size), seed()),
    covers=("Learned", "UniformNoise"),
    part=lambda: Learned(Symmetric(N), GIN(C, D, 1), UniformNoise()),
    axes=both,
)
ROWS.add(
    "Learned (graphs, edge_attr, key)",
    drawn,
    lambda size: (graphs(size, attributes=True), seed()),
    covers=("Learned", "Normal"),
    part=lambda: Learned(Symmetric(N), GIN(C, D, 1), Normal(1.0, fixed=3)),
    axes=both,
    slow=True,
)
ROWS.add(
    "Learned (points)",
    drawn,
    lambda size: (clouds(size), seed()),
    part=lambda: Learned(Euclidean(3), VectorNeurons(width=4, scores=False, dropout=0.0)),
    axes=free,
)
for name, make in {"Uniform": Uniform, "Identity": Identity}.items():
    ROWS.add(
        f"{name} (graphs)",
        drawn,
        lambda size: (graphs(size), seed()),
        part=lambda make=make: make(Symmetric(N)),
        axes=both,
        trains=False,
        differentiable=False,
    )
    ROWS.add(
        f"{name} (points)",
        drawn,
        lambda size: (clouds(size), seed()),
        part=lambda make=make: make(Euclidean(3)),
        axes=free,
        trains=False,
        differentiable=make is Uniform,  # the center of the points
    )
ROWS.add(
    "Frame (classes given)",
    drawn,
    lambda size: (framed(size), seed()),
    part=lambda: Frame(Symmetric(N)),
    axes=both,
    trains=False,
    differentiable=False,
)
ROWS.add(
    "Frame",
    drawn,
    lambda size: (graphs(size), seed()),
    part=lambda: Frame(Symmetric(N)),
    axes=both,
    trains=False,
    differentiable=False,
    refuses="Frame: batch.frame must hold classes where a program is recorded, got None",
)
ROWS.add(
    "Frame (points)",
    drawn,
    lambda size: (clouds(size), seed()),
    part=lambda: Frame(Euclidean(3)),
    axes=free,
    trains=False,
)
ROWS.add(
    "WeightedFrame",
    drawn,
    lambda size: (clouds(size), seed()),
    part=lambda: WeightedFrame(SpecialEuclidean(3)),
    axes=free,
    trains=False,
    slow=True,
)
ROWS.add(
    "MinimalFrame",
    drawn,
    lambda size: (clouds(size), seed()),
    part=lambda: MinimalFrame(SpecialEuclidean(3)),
    axes=free,
    trains=False,
    slow=True,
)
ROWS.add(
    "Orbit",
    drawn,
    lambda size: (clouds(size), seed()),
    part=lambda: Orbit(Cyclic(5) * Cyclic(2)),
    axes=free,
    trains=False,
    differentiable=False,
)
ROWS.add(
    "Energy",
    weighed,
    lambda size: (clouds(size), seed()),
    part=lambda: Energy(Finite.generated({"vp": KLEIN}), Spread(), Moved()),
    slow=True,
)
ROWS.add(
    "RotationEnergy",
    weighed,
    lambda size: (images(size), seed()),
    part=lambda: RotationEnergy(SpecialOrthogonal(2), ImageScores(C, 4, 1), MovedImages(), n=4, prior=1.0),
    slow=True,
)

"""Distributions, and the networks of the learned one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast import ops
from probsym_fast.distributions import GIN, Frame, Identity, Learned, Normal, Uniform, UniformNoise, VectorNeurons
from probsym_fast.draws import Draws
from probsym_fast.groups import Euclidean, Motion, Symmetric
from tests.programs.rows.base import Rows
from tests.programs.rows.inputs import C, D, N, S, clouds, framed, graphs, nodes, seed

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


both, free = ("batch", "edges"), ("batch", "nodes")

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

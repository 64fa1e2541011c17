"""EGNN by egnn-pytorch beside this package: a task for `probsym sweep`, with the data, loss and budget of n-body.

    pip install egnn-pytorch==0.2.8
    probsym sweep -c benchmarks/beside_egnn.yaml --import benchmarks.beside_egnn --threads 1

EGNN is equivariant by construction: Satorras, Hoogeboom, Welling 2021 (arXiv 2102.09844). Its layers in that package have
no velocities. The paper's rule adds them: each layer moves a particle by its velocity, too, times a number from its features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import probsym_fast as psf
from probsym_fast.distributions import Identity
from probsym_fast.models import NodeReadout, NodeVectors, Symmetrized
from probsym_fast.tasks.nbody import DIMENSION, NBodyConfig, NBodyTask


class VelocityEGNN(nn.Module):
    """Layers of `egnn_pytorch.EGNN` and, after each, x += a(h) v.

    nodes: (B, S, n, 6) positions and velocities. pairs: (B, 1 or S, n, n, 2) charge products and squared distances.
    Returns positions (B, S, n, 3).
    """

    def __init__(self, width: int, layers: int):
        super().__init__()
        from egnn_pytorch import EGNN

        self.first = nn.Linear(1, width)
        self.layers = nn.ModuleList(EGNN(width, edge_dim=2, m_dim=width) for _ in range(layers))
        self.along = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)) for _ in range(layers)
        )

    def forward(self, nodes: Tensor, pairs: Tensor) -> Tensor:
        lead = nodes.shape[:2]
        x, v = nodes.flatten(0, 1).split(DIMENSION, -1)
        pairs = pairs.expand(*lead, *pairs.shape[2:]).flatten(0, 1)
        h = self.first(torch.linalg.vector_norm(v, dim=-1, keepdim=True))
        for layer, along in zip(self.layers, self.along, strict=True):
            h, x = layer(h, x, pairs)
            x = x + along(h) * v
        return x.unflatten(0, lead)


@dataclass
class EGNNConfig(NBodyConfig):
    """n-body with EGNN; `backbone.width` and `backbone.layers` are its sizes. Other keys as in n-body."""

    task: Literal["egnn"] = "egnn"  # type: ignore[assignment]
    method: Literal["none"] = "none"  # type: ignore[assignment]


@psf.tasks.register("egnn", EGNNConfig)
class EGNNTask(NBodyTask):
    """EGNN in the place of the backbone, with the identity as the only group element."""

    def model(self, fresh: bool = True) -> Symmetrized:
        width, layers = self.config.backbone.size()
        parts: tuple[Any, ...] = VelocityEGNN(width, layers), NodeVectors(), NodeReadout(displacement=False)
        return Symmetrized(*parts, Identity(self.group()), **self.config.samples.settings())

"""n-body: positions of five charged particles one time unit ahead, with the paper's symmetries, methods and backbones."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from probsym_fast.data import NBody
from probsym_fast.distributions import Distribution, Identity, Learned, Normal, Uniform, VectorNeurons
from probsym_fast.groups import Euclidean, Group, PointClouds, SpecialEuclidean, Symmetric, Translation
from probsym_fast.models import MessagePassing, NodeReadout, NodeVectors, PairTokens, Symmetrized, Transformer
from probsym_fast.training import configuration
from probsym_fast.training.configuration import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, between
from probsym_fast.training.settings import SAMPLES_LIMITS, TRAINING_LIMITS, Run, Samples, Training
from probsym_fast.training.task import Task

BODIES, DIMENSION = 5, 3
GROUPS = {  # all of them remove and restore translation
    "S5xO3": lambda: Symmetric(BODIES) * Euclidean(DIMENSION),
    "S5xSO3": lambda: Symmetric(BODIES) * SpecialEuclidean(DIMENSION),
    "O3": lambda: Euclidean(DIMENSION),
    "SO3": lambda: SpecialEuclidean(DIMENSION),
    "S5": lambda: Symmetric(BODIES) * Translation(DIMENSION),
}
LIMITS = {
    "count": between(1, 10_000),
    "backbone.layers": COUNT,
    "backbone.width": COUNT,
    "backbone.heads": COUNT,
    "backbone.feedforward": COUNT,
    "backbone.dropout": SHARE,
    "distribution.width": between(2, 10_000),
    "distribution.neighbors": COUNT,
    "distribution.dropout": SHARE,
    "distribution.noise": NOT_NEGATIVE,
    "distribution.tau": POSITIVE,
    "distribution.iterations": between(0, 10_000),
    **SAMPLES_LIMITS,
    **TRAINING_LIMITS,
}


@dataclass
class Backbone:
    """The network that is symmetrized.

    Args:
        kind: "transformer" (one token per pair of particles) or "gnn" (message passing).
        layers: number of layers; null: 8 (transformer) or 4 (gnn).
        width: hidden width; null: 64 (transformer) or 60 (gnn).
        heads: attention heads (transformer).
        feedforward: width of the feed-forward layers (transformer).
        dropout: dropout (transformer).
    """

    kind: Literal["transformer", "gnn"] = "gnn"
    layers: int | None = None
    width: int | None = None
    heads: int = 4
    feedforward: int = 64
    dropout: float = 0.0

    def size(self) -> tuple[int, int]:
        """(width, layers), defaults filled in."""
        width, layers = (60, 4) if self.kind == "gnn" else (64, 8)
        return width if self.width is None else self.width, layers if self.layers is None else self.layers


@dataclass
class LearnedDistribution:
    """The learned distribution (method ps and canonical).

    Args:
        width: channels of the Vector Neurons.
        neighbors: number of nearest neighbours.
        dropout: dropout of whole vectors.
        noise: standard deviation of the noise on positions and velocities (canonical: 0).
        tau: temperature of the soft permutation.
        iterations: Sinkhorn iterations.
    """

    width: int = 64 // 3
    neighbors: int = 4
    dropout: float = 0.08
    noise: float = 1.0
    tau: float = 0.1
    iterations: int = 20


@dataclass
class NBodyConfig(Run):
    """The n-body experiment of Kim et al. 2023; defaults are the published settings (docs/differences.md).

    Args:
        task: "nbody".
        symmetry: the group; all of them remove and restore translation.
        method: "ps" learned distribution, "ga" uniform, "canonical" learned without noise, one sample, "none" no group, one
            sample.
        count: number of training simulations, of 10,000.
        data: folder of the data set; null: the cache.
        backbone: the network that is symmetrized.
        distribution: settings of the learned distribution.
        samples: group elements per graph.
        training: optimiser, epochs, devices.
    """

    of_method: ClassVar[dict[str, dict[str, Any]]] = {
        method: {"samples": {"train": 1, "valid": 1, "test": 1}} for method in ("canonical", "none")
    }

    task: Literal["nbody"] = "nbody"
    symmetry: Literal["S5xO3", "S5xSO3", "O3", "SO3", "S5"] = "O3"
    method: Literal["ps", "ga", "canonical", "none"] = "ps"
    count: int = 3000
    data: str | None = None
    backbone: Backbone = field(default_factory=Backbone)
    distribution: LearnedDistribution = field(default_factory=LearnedDistribution)
    samples: Samples = field(default_factory=Samples)
    training: Training = field(default_factory=Training)


class NBodyTask(Task):
    """Mean squared error of the positions at frame 40, from positions and velocities at frame 30."""

    measure = "mse"
    figures = "test_mse", "rotated_mse", "unsymmetrized_mse", "unsymmetrized_rotated_mse"

    def __init__(self, config: NBodyConfig):
        configuration.check(config, LIMITS)
        width, _ = config.backbone.size()
        if config.backbone.kind == "transformer" and width % config.backbone.heads:
            raise ValueError(
                f"config: backbone.heads must divide backbone.width = {width}, got {config.backbone.heads}"
            )
        if config.backbone.kind == "gnn" and config.symmetry not in ("O3", "SO3") and config.method != "none":
            raise ValueError(
                f"config: symmetry must be O3 or SO3 for the gnn, itself permutation symmetric, got {config.symmetry}"
            )
        counts = {config.samples.train, config.samples.valid, config.samples.test}
        if config.method in ("canonical", "none") and counts != {1}:
            raise ValueError(f"config: method {config.method} takes 1 sample, got {config.samples}")
        self.config = config

    def group(self) -> Group:
        return GROUPS[self.config.symmetry]()

    def distribution(self) -> Distribution:
        group, settings = self.group(), self.config.distribution
        if self.config.method == "ga":
            return Uniform(group)
        if self.config.method == "none":
            return Identity(group)
        network = VectorNeurons(
            width=settings.width,
            neighbors=settings.neighbors,
            dropout=settings.dropout,
            scores="S5" in self.config.symmetry,
            matrices="O3" in self.config.symmetry,
        )
        noise = Normal(0.0 if self.config.method == "canonical" else settings.noise)
        return Learned(group, network, noise, settings.tau, settings.iterations)

    def model(self, fresh: bool = True) -> Symmetrized:
        backbone = self.config.backbone
        width, layers = backbone.size()
        parts: tuple[nn.Module, nn.Module, nn.Module]
        if backbone.kind == "gnn":
            messages = MessagePassing(2 * DIMENSION, 2, width, layers, DIMENSION)
            parts = messages, NodeVectors(), NodeReadout(displacement=False)
            return Symmetrized(*parts, self.distribution(), **self.config.samples.settings())
        network = Transformer(
            in_features=2 * DIMENSION + 2,
            width=width,
            layers=layers,
            heads=backbone.heads,
            feedforward=backbone.feedforward,
            tokens=BODIES**2,
            out_features=DIMENSION,
            dropout=backbone.dropout,
            read=[i * (BODIES + 1) for i in range(BODIES)],  # the diagonal
        )
        parts = network, PairTokens(), NodeReadout(displacement=True)
        return Symmetrized(*parts, self.distribution(), **self.config.samples.settings())

    def dataset(self, split: str) -> NBody:
        return NBody(split, self.config.data, self.config.count if split == "train" else None)

    def inputs(self, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[PointClouds, Tensor]:
        positions, velocities, charges, target = batch
        return clouds(positions, velocities, charges), target

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(prediction, target)

    def report(self, model: Symmetrized, folder: Path) -> dict[str, Any]:
        from probsym_fast.tasks.nbody_report import report

        return report(self, model, folder)

    def describe(self, results: dict[str, Any]) -> list[tuple[str, str]]:
        from probsym_fast.tasks.nbody_report import describe

        return describe(results)


def clouds(positions: Tensor, velocities: Tensor, charges: Tensor) -> PointClouds:
    """Pair features (B, n, n, 2): product of charges and squared distance, both 0 on the diagonal."""
    distance = (positions[:, :, None] - positions[:, None]).square().sum(-1)
    product = charges[:, :, None] * charges[:, None]
    product = product - torch.diag_embed(charges * charges)
    return PointClouds(positions, velocities, torch.stack([product, distance], dim=-1))

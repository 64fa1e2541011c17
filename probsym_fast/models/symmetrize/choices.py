"""The distributions that `symmetrize` makes by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from probsym_fast.batches import Graphs, Images, PointClouds
from probsym_fast.distributions import (
    GIN,
    Distribution,
    Energy,
    Frame,
    Identity,
    Learned,
    Normal,
    Orbit,
    RotationEnergy,
    Uniform,
    UniformNoise,
    VectorNeurons,
)
from probsym_fast.groups import Group, Orthogonal, Product, Symmetric
from probsym_fast.groups.elements import tensors
from probsym_fast.groups.euclidean import Motions
from probsym_fast.models.image_scores import ImageScores
from probsym_fast.models.images import MovedImages
from probsym_fast.models.point_clouds import FlatCloud

DISTRIBUTIONS = "learned", "canonical", "uniform", "orbit", "frame", "none"
SIDE = 32  # pixels of the images that are scored
CONCENTRATION = 16.0  # of the prior of rotations: a standard deviation of about 14 degrees
COLUMN_NOISE = 0.1  # of learned frames, for clouds of few points


def distribution_of(name: str | None, group: Group, example: Any) -> Distribution:
    owner = "symmetrize"
    if name is None:
        name = "learned" if not isinstance(example, Images) else "uniform" if group.order is None else "orbit"
    if name not in DISTRIBUTIONS:
        raise ValueError(f"{owner}: distribution must be a Distribution or one of {DISTRIBUTIONS}, got {name!r}")
    if name == "uniform" or (name in ("learned", "canonical") and group.outputs == ()):  # translations only
        return Uniform(group)
    if name == "orbit":
        return Orbit(group)
    if name == "frame" and not isinstance(example, Images):
        return Frame(group)
    if name == "none":
        return Identity(group)
    if isinstance(example, Graphs) and isinstance(group, Symmetric):
        scale = 0.0 if name == "canonical" else 1.0
        return Learned(group, GIN(example.x.shape[1]), UniformNoise(scale))
    if isinstance(example, Images) and name in ("learned", "canonical"):
        if (found := _by_scores(group, example, name == "canonical")) is not None:
            return found
    if isinstance(example, PointClouds) and name in ("learned", "canonical"):
        if group.order is not None:
            n = example.positions.shape[1]
            scores = nn.Sequential(nn.Linear(n * width_of(example), 64), nn.GELU(), nn.Linear(64, 1))
            one, best = PointClouds(example.positions.new_zeros(1, *example.positions.shape[1:])), name == "canonical"
            return Energy(group, scores, FlatCloud(n), prior=_at_identity(group, one) if best else None, best=best)
        if _takes_vectors(group):
            return _by_vectors(group, example, 0.0 if name == "canonical" else _spread(example))
    got = f"{group} on {type(example).__name__}"
    raise ValueError(f"{owner}: distribution must be given where nothing is {name!r} for the group, got {got}")


def _by_scores(group: Group, images: Images, best: bool) -> Distribution | None:
    """Scores of small moved images. Canonicalization has a prior at the upright pose, by whose penalty it learns."""
    network, embed = ImageScores(images.pixels.shape[1]), MovedImages(SIDE)
    if group.order is not None:
        one = Images(images.pixels.new_zeros(1, *images.pixels.shape[1:]))  # the example may have none
        return Energy(group, network, embed, prior=_at_identity(group, one) if best else None, best=best)
    if isinstance(group, Orthogonal) and group.d == 2:
        return RotationEnergy(group, network, embed, prior=CONCENTRATION if best else None, best=best)
    return None


def _at_identity(group: Group, one: Any) -> Tensor:
    """(order,) probability 1 at the identity, of the elements of a finite group. one: a batch of one input, of any device."""
    one = tree_map(lambda x: torch.zeros_like(x, device="cpu"), one)
    pairs = zip(
        tensors(group.elements(one)), tensors(group.identity(one, 1)), strict=True
    )  # (1, order), (1, 1) and more axes
    return torch.stack([(e == i).reshape(*e.shape[:2], -1).all(2)[0] for e, i in pairs]).all(0).float()


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


def width_of(clouds: PointClouds) -> int:
    """Values of a point: d (+ d) (+ F)."""
    fields = clouds.positions, clouds.velocities, clouds.features
    return sum(x.shape[2] for x in fields if x is not None)

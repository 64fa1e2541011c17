"""Small models, batches and elements in float64, for the tests of torch.func."""

from functools import cache

import torch
from torch import Tensor, nn

from probsym_fast import Symmetrized, models, ops
from probsym_fast.distributions import GIN, Learned, Uniform, UniformNoise, VectorNeurons
from probsym_fast.groups import Euclidean, Graphs, Motion, PointClouds, Symmetric

N, S, WIDTH = 4, 2, 3
PTR, EDGES = torch.tensor([0, 4, 7]), torch.tensor([[0, 1, 4, 5, 6, 6, 2], [1, 0, 5, 4, 6, 4, 2]])


@cache
def random(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers in float64 that every floating dtype holds exactly."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.bfloat16().double()


VELOCITIES, PAIRS, SCORES = (
    random(2, 3, 3, seed=2),
    random(2, 3, 3, 2, seed=3),
    random(2, S, N, seed=4),
)  # outside of vmap


def clouds(x: Tensor) -> PointClouds:
    return PointClouds(x, VELOCITIES, PAIRS)


def permutations(x: Tensor | None = None) -> ops.SoftPermutation:
    return ops.soft_permutation(SCORES if x is None else x, PTR.diff(), tau=0.5)


def motions(x: Tensor) -> Motion:
    return Euclidean(3).project({"matrices": x}, clouds(random(2, 3, 3).to(x.dtype)))[0]


# name -> how it is built, and node features or positions
MODELS = {
    "graphs": (
        lambda: Symmetrized(
            models.MLP([WIDTH, 2]),
            models.FlatGraph(N, WIDTH, 2),
            models.MeanReadout(),
            Learned(Symmetric(N), GIN(2, WIDTH, 1), UniformNoise(), tau=0.5),
        ),
        random(7, 2),
    ),
    "clouds": (
        lambda: Symmetrized(
            models.MessagePassing(width=4, layers=1),
            models.NodeVectors(),
            models.NodeReadout(displacement=False),
            Learned(Symmetric(3) * Euclidean(3), VectorNeurons(width=3, neighbors=2), tau=0.5),
        ),
        random(2, 3, 3),
    ),
    "uniform": (
        lambda: Symmetrized(
            models.Transformer(width=4, layers=1, heads=2, feedforward=4, tokens=9, read=[0, 4, 8]),
            models.PairTokens(),
            models.NodeReadout(displacement=True),
            Uniform(Symmetric(3) * Euclidean(3)),
            chunk=1,
        ),
        random(2, 3, 3),
    ),
}


def batches(name: str, x: Tensor) -> Graphs | PointClouds:
    return Graphs(x, EDGES, PTR) if name == "graphs" else clouds(x)


def built(name: str) -> nn.Module:
    """In float64 and eval mode."""
    torch.manual_seed(0)
    return MODELS[name][0]().double().eval()

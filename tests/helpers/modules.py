"""Every public module, how it is built and run: what the tests of whole programs go through."""

import inspect
from functools import cache

import torch
from torch import Tensor, nn

from probsym_fast import Symmetrized, distributions, models, ops
from probsym_fast.distributions import GIN, Frame, Identity, Learned, Uniform, UniformNoise, VectorNeurons
from probsym_fast.groups import Draws, Euclidean, Graphs, Orthogonal, PointClouds, Symmetric

N, S, WIDTH, GRID = 4, 2, 3, 2
PTR, EDGES = torch.tensor([0, 4, 7]), torch.tensor([[0, 1, 4, 5, 6, 6, 2], [1, 0, 5, 4, 6, 4, 2]])


@cache
def random(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers in float64 that every floating dtype holds exactly."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.bfloat16().double()


def graphs(x: Tensor | None = None, edge_attr: Tensor | None = None) -> Graphs:
    if x is None:
        x = random(7, 2) if edge_attr is None else random(7, 2).to(edge_attr.dtype)
    frame = torch.arange(7)
    return Graphs(x=x, edge_index=EDGES, ptr=PTR, edge_attr=edge_attr, frame=frame, pairs=EDGES[:, ::2])


def clouds(x: Tensor | None = None) -> PointClouds:
    x = random(2, 3, 3) if x is None else x
    velocities, edges = random(2, 3, 3, seed=2).to(x.dtype), random(2, 3, 3, 2, seed=3).to(x.dtype)
    return PointClouds(positions=x, velocities=velocities, edges=edges)


def permutations(x: Tensor | None = None) -> ops.SoftPermutation:
    return ops.soft_permutation(random(2, S, N, seed=4) if x is None else x, PTR.diff(), tau=0.5)


def motions(x: Tensor | None = None):
    x = random(2, S, 3, 3, seed=5) if x is None else x
    return Euclidean(3).project({"matrices": x}, clouds(random(2, 3, 3).to(x.dtype)))[0]


def tensor(found) -> Tensor:
    """All of an output in one tensor."""
    if isinstance(found, Tensor):
        return found
    parts = found.values() if isinstance(found, dict) else found
    return torch.cat(
        [tensor(x).flatten() for x in parts if isinstance(x, Tensor) or (isinstance(x, tuple | dict) and x)]
    )


def on_graphs(net, x: Tensor):
    return net(graphs(x), Symmetric(N), permutations())


def on_edges(net, x: Tensor):
    return net(graphs(edge_attr=x), Symmetric(N), permutations())


def back_to_graphs(net, x: Tensor):
    return net(x, graphs(random(7, 2).to(x.dtype)), Symmetric(N), permutations())


def moved(x: Tensor):
    """Fixed motions for values of the dtype of x."""
    return motions(random(2, S, 3, 3, seed=5).to(x.dtype))


def drawn(net, x: Tensor):
    return net(graphs(x), S, Draws(seed=1))


def group_elements(found) -> Tensor:
    """The numbers of a permutation that a distribution gives, and the penalties."""
    g, penalties = found
    return tensor([getattr(g, name).double() for name in g.by_sample] + list(penalties.values()))


# name -> how it is built, an input, and what is computed of it in any dtype
MODULES = {
    "GIN": (lambda: GIN(2, WIDTH, 2), random(7, 2), lambda net, x: net(graphs(x), random(7, S, 2).to(x.dtype))),
    "VectorNeurons": (
        lambda: VectorNeurons(width=3, neighbors=2),
        random(2, 3, 3),
        lambda net, x: net(clouds(x), random(2, S, 3, 3, 2).to(x.dtype)),
    ),
    "MLP": (lambda: models.MLP([WIDTH, 4, 2], "gelu"), random(2, WIDTH), lambda net, x: net(x)),
    "FlatGraph": (lambda: models.FlatGraph(N, WIDTH, 2), random(7, 2), on_graphs),
    "FlatGraph, edges": (lambda: models.FlatGraph(N, WIDTH, 0, 2), random(7, 2), on_edges),
    "FlatGraph, soft": (lambda: models.FlatGraph(N, WIDTH, 2, soft=True), random(7, 2), on_graphs),
    "IdentifiedNodes": (lambda: models.IdentifiedNodes(N, WIDTH, 2), random(7, 2), lambda net, x: on_graphs(net, x)[0]),
    "PatchWeight": (lambda: models.PatchWeight(WIDTH, 2, 3), random(3), lambda net, x: net() * x),
    "GINBackbone": (
        lambda: models.GINBackbone(WIDTH, 2, 2, "tanh"),
        random(7, S, WIDTH),
        lambda net, x: net(x, graphs(random(7, 2).to(x.dtype))),
    ),
    "GraphTokens": (lambda: models.GraphTokens(N, WIDTH, GRID, 2), random(7, 2), on_graphs),
    "GraphTokens, edges": (lambda: models.GraphTokens(N, WIDTH, GRID, 2, 2, dense=False), random(7, 2), on_edges),
    "GraphTokens, dense": (
        lambda: models.GraphTokens(N, WIDTH, GRID, 2, 2, "diagonal", dense=True),
        random(7, 2),
        on_edges,
    ),
    "NodeTokens": (lambda: models.NodeTokens(N, WIDTH, GRID, 2, "circular"), random(7, 2), on_graphs),
    "MeanReadout": (models.MeanReadout, random(2, S, WIDTH), back_to_graphs),
    "GraphReadout": (lambda: models.GraphReadout(WIDTH, 2), random(2, S, WIDTH), back_to_graphs),
    "SlotReadout": (lambda: models.SlotReadout(N, WIDTH), random(2, S, WIDTH), back_to_graphs),
    "DiagonalReadout": (lambda: models.DiagonalReadout(N, WIDTH, GRID, 2), random(2, S, GRID, WIDTH), back_to_graphs),
    "PairReadout": (lambda: models.PairReadout(N, WIDTH, GRID), random(2, S, GRID**2, WIDTH), back_to_graphs),
    "NodeVectors": (models.NodeVectors, random(2, 3, 3), lambda net, x: net(clouds(x), Euclidean(3), moved(x))),
    "PairTokens": (models.PairTokens, random(2, 3, 3), lambda net, x: net(clouds(x), Euclidean(3), moved(x))[0]),
    "NodeReadout": (
        lambda: models.NodeReadout(displacement=True),
        random(2, S, 3, 3),
        lambda net, x: net(x, clouds(random(2, 3, 3).to(x.dtype)), Euclidean(3), moved(x)),
    ),
    "MessagePassing": (
        lambda: models.MessagePassing(width=4, layers=1),
        random(2, 3, 6),
        lambda net, x: net(x, random(2, 3, 3, 2).to(x.dtype)),
    ),
    "Transformer": (
        lambda: models.Transformer(width=4, layers=1, heads=2, feedforward=4, tokens=5, read=[0, 2]),
        random(1, 5, 8),
        lambda net, x: net(x),
    ),
    "Uniform": (lambda: Uniform(Euclidean(3)), random(2, 3, 3), lambda net, x: net(clouds(x), S, Draws(seed=1))[0]),
    "Identity": (lambda: Identity(Orthogonal(3)), random(2, 3, 3), lambda net, x: net(clouds(x), S)[0] * x[:, None]),
    "Frame": (lambda: Frame(Symmetric(N)), random(7, 2), lambda net, x: group_elements(drawn(net, x)) * x.sum()),
    "Learned": (
        lambda: Learned(Symmetric(N), GIN(2, WIDTH, 2), UniformNoise(), tau=0.5),
        random(7, 2),
        lambda net, x: group_elements(drawn(net, x)),
    ),
    "Symmetrized, graphs": (
        lambda: Symmetrized(
            models.MLP([WIDTH, 2]),
            models.FlatGraph(N, WIDTH, 2),
            models.MeanReadout(),
            Learned(Symmetric(N), GIN(2, WIDTH, 1), UniformNoise(), tau=0.5),
        ),
        random(7, 2),
        lambda net, x: net(graphs(x), S, seed=1),
    ),
    "Symmetrized, clouds": (
        lambda: Symmetrized(
            models.MessagePassing(width=4, layers=1),
            models.NodeVectors(),
            models.NodeReadout(displacement=False),
            Learned(Symmetric(3) * Euclidean(3), VectorNeurons(width=3, neighbors=2), tau=0.5),
        ),
        random(2, 3, 3),
        lambda net, x: net(clouds(x), S, seed=1),
    ),
    "Symmetrized, uniform": (
        lambda: Symmetrized(
            models.Transformer(width=4, layers=1, heads=2, feedforward=4, tokens=9, read=[0, 4, 8]),
            models.PairTokens(),
            models.NodeReadout(displacement=True),
            Uniform(Symmetric(3) * Euclidean(3)),
            chunk=1,
        ),
        random(2, 3, 3),
        lambda net, x: net(clouds(x), S, seed=1),
    ),
}


def public_modules() -> set[str]:
    """The names of the public modules, but for those that other packages bring and the abstract one."""
    kinds = [x for x in (*vars(models).values(), *vars(distributions).values()) if inspect.isclass(x)]
    return {x.__name__ for x in kinds if issubclass(x, nn.Module)} - {
        "Distribution",
        "VisionBackbone",
        "LanguageBackbone",
    }


def built(name: str) -> nn.Module:
    """In float64 and eval mode."""
    torch.manual_seed(0)
    return MODULES[name][0]().double().eval()

"""Every distribution, on degenerate inputs too: the standard error that `estimate` reports is the deviation over seeds."""

import inspect

import pytest
import torch
from torch import nn

import probsym_fast as psf
from probsym_fast import distributions as D
from probsym_fast.distributions import Discrete
from probsym_fast.distributions.distribution import Distribution
from probsym_fast.groups import Cyclic, Dihedral, Euclidean, Orthogonal, SpecialEuclidean, SpecialOrthogonal, Symmetric
from probsym_fast.models import FlatCloud, MeanReadout

COPIES, SEEDS, S = 24, 16, 64
LINE = torch.tensor([-2.0, -0.5, 0.7, 1.8])[:, None]


def points(d: int) -> dict[str, torch.Tensor]:
    """Clouds of four points in d dimensions, none of them along an axis."""
    x = torch.randn(4, d, generator=torch.Generator().manual_seed(d))
    return {
        "generic": x,
        "one line": LINE * x[:1],
        "a plane": x[:, :2] @ x[:2],
        "one point": x[:1],
        "equal points": x[:1].expand(4, -1),
        "two points": x[:2],
    }


def scores(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1))


def energy(group, n: int, **settings) -> Distribution:
    return D.Energy(group, scores(2 * n), FlatCloud(), **settings)


def rotation_energy(group, n: int) -> Distribution:
    return D.RotationEnergy(group, scores(2 * n), FlatCloud(), n=4)


def learned(group) -> Distribution:
    network = D.VectorNeurons(
        channels=1, scores=isinstance(group, Symmetric), matrices=not isinstance(group, Symmetric)
    )
    return D.Learned(group, network)


E3, SE3, O2, SO2, D4 = Euclidean(3), SpecialEuclidean(3), Orthogonal(2), SpecialOrthogonal(2), Dihedral(4)
# name -> (dimensions, what makes it for n points, settings of the model)
CASES = {
    "Uniform": (3, lambda n: D.Uniform(E3), {}),
    "Uniform, permutations": (3, lambda n: D.Uniform(Symmetric(n)), {}),
    "Identity": (3, lambda n: D.Identity(E3), {}),
    "Orbit": (2, lambda n: D.Orbit(D4), {}),
    "Frame": (3, lambda n: D.Frame(E3), {}),
    "MinimalFrame": (3, lambda n: D.MinimalFrame(E3), {}),
    "MinimalFrame, special": (3, lambda n: D.MinimalFrame(SE3), {}),
    "WeightedFrame": (3, lambda n: D.WeightedFrame(E3), {}),
    "WeightedFrame, special": (3, lambda n: D.WeightedFrame(SE3), {}),
    "WeightedFrame, plane": (2, lambda n: D.WeightedFrame(O2), {}),
    "WeightedFrame, weighted": (3, lambda n: D.WeightedFrame(E3, replacement=True), {"reduce": "weighted"}),
    "Learned": (3, lambda n: learned(E3), {}),
    "Learned, permutations": (3, lambda n: learned(Symmetric(n)), {}),
    "Energy": (2, lambda n: energy(D4, n), {}),
    "Energy, weighted": (
        2,
        lambda n: energy(Cyclic(8), n, replacement=True),
        {"reduce": "weighted"},
    ),
    "RotationEnergy": (2, lambda n: rotation_energy(SO2, n), {}),
    "RotationEnergy, weighted": (
        2,
        lambda n: rotation_energy(O2, n),
        {"reduce": "weighted"},
    ),
}


def test_all_distributions_are_here():
    public = {x.__name__ for x in vars(D).values() if inspect.isclass(x) and issubclass(x, Distribution)}
    assert {name.partition(",")[0] for name in CASES} == public - {"Distribution", "Discrete"}


@torch.no_grad()
def assert_honest(model, batch, samples=S, step=None) -> None:
    """Root mean squares over copies of the input and outputs, of all seeds."""
    found = [model.estimate(batch, samples, seed=seed, step=step) for seed in range(SEEDS)]
    reported = torch.stack([each.standard_error for each in found]).square().mean().sqrt()
    true = torch.stack([each.prediction for each in found]).std(0).square().mean().sqrt()
    assert abs(float(reported - true)) <= 0.15 * float(true) + 1e-6, (float(reported), float(true))


@pytest.mark.parametrize("kind", ["generic", "one line", "a plane", "one point", "equal points", "two points"])
@pytest.mark.parametrize("name", CASES)
def test_on_clouds(name, kind):
    torch.manual_seed(0)
    d, make, settings = CASES[name]
    x = points(d)[kind]
    batch = psf.PointClouds(x.expand(COPIES, -1, -1).clone())
    net = nn.Sequential(nn.Linear(len(x) * d, 16), nn.Tanh(), nn.Linear(16, 4))
    for draws in psf.draws.KINDS if kind in ("generic", "one line") else ("independent",):
        model = psf.Symmetrized(net, FlatCloud(), MeanReadout(), make(len(x)), draws=draws, **settings).eval()
        assert_honest(model, batch, S, 8 if settings or model.distribution.shares_noise else None)


@pytest.mark.parametrize("name", ["Frame", "Learned", "Uniform"])
def test_on_graphs(name):
    """Of two rings, and of nodes without an edge, which are all alike."""
    torch.manual_seed(0)
    group, ring = Symmetric(4), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    ring = torch.cat([ring, ring.flip(0)], 1)
    make = {
        "Frame": lambda: D.Frame(group),
        "Learned": lambda: D.Learned(group, D.GIN(2), D.UniformNoise()),
        "Uniform": lambda: D.Uniform(group),
    }
    for edges in (ring, ring[:, :0]):
        for x in (torch.randn(4, 2), torch.ones(4, 2)):
            edge_index = (edges[:, None] + 4 * torch.arange(COPIES)[:, None]).flatten(1)
            batch = psf.Graphs(x.repeat(COPIES, 1), edge_index, torch.arange(COPIES + 1) * 4)
            embed, net = psf.models.FlatGraph(4, 16, 2), nn.Sequential(nn.Tanh(), nn.Linear(16, 4))
            assert_honest(psf.Symmetrized(net, embed, MeanReadout(), make[name]()).eval(), batch)


@pytest.mark.parametrize("make", [D.Frame, D.MinimalFrame, D.WeightedFrame])
@pytest.mark.parametrize("kind", ["one line", "one point", "equal points"])
@torch.no_grad()
def test_the_equivariance_error_falls(make, kind):
    torch.manual_seed(0)
    x = points(3)[kind]
    batch = psf.PointClouds(x.expand(4, -1, -1).clone().double())
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    model = psf.symmetrize(net, E3, batch, tokens="nodes", distribution=make(E3)).eval()
    few, many = (psf.equivariance_error(model, batch, samples=count, moves=4, scale=1) for count in (4, 1024))
    assert many < few / 8 or many < 1e-6  # 1 / sqrt(S): 16
    if make is D.WeightedFrame:
        model.distribution.replacement, model.reduce = True, "weighted"
        few, many = (psf.equivariance_error(model, batch, samples=count, moves=4, scale=1) for count in (4, 1024))
        assert many < few / 8 or many < 1e-6


class Turned(Discrete):
    """A turn of the plane that all samples share, which the class says or not."""

    def candidates(self, batch, draws):
        angle = 2 * torch.pi * draws.uniform((batch.size, 1), "turn", device=batch.device)
        frames = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
        return frames.to(batch.dtype), torch.zeros(batch.size, 1), {}


class Declared(Turned):
    shares_noise = True


def test_shared_noise_has_to_be_declared():
    torch.manual_seed(0)
    batch = psf.PointClouds(points(2)["generic"].expand(COPIES, -1, -1).clone())
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    assert not Turned.shares_noise
    for kind in (Declared, Turned):
        model = psf.Symmetrized(net, FlatCloud(), MeanReadout(), kind(SO2)).eval()
        if kind is Declared:
            assert_honest(model, batch, step=8)
            continue
        with pytest.raises(AssertionError):
            assert_honest(model, batch)

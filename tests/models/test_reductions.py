"""Averages for the same cost: expectations are left alone, variances fall where they should, errors are what they say."""

import re

import pytest
import torch
from torch import nn

from probsym_fast import Symmetrized, models
from probsym_fast.distributions import GIN, Frame, Learned, Normal, Uniform, UniformNoise, VectorNeurons
from probsym_fast.groups import (
    Draws,
    Euclidean,
    Orthogonal,
    PointClouds,
    SpecialEuclidean,
    SpecialOrthogonal,
    Symmetric,
)
from probsym_fast.groups.elements import samples_of
from probsym_fast.models.chunks import Chunks
from probsym_fast.models.estimates import LEAST_BLOCKS
from tests.conftest import assert_near
from tests.helpers.graphs import random_graphs

N = 6
KINDS = "antithetic", "stratified"
ROTATIONS = [*(Orthogonal(d) for d in (1, 2, 3, 4)), *(SpecialOrthogonal(d) for d in (2, 3, 4))]


def clouds(count=1) -> PointClouds:
    generator = torch.Generator().manual_seed(4)
    x, v, e = (torch.randn(count, N, *rest, generator=generator).double() for rest in ((3,), (3,), (N, 2)))
    return PointClouds(x, v, e)


class Points:
    """A batch of which a rotation reads the size alone."""

    def __init__(self, size: int):
        self.size, self.dtype, self.device = size, torch.float64, torch.device("cpu")


# --- noise ---


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_mirror_each_other(kind):
    draws, shape = Draws(seed=3, kind=kind), (4, 10, 3)
    u, z = draws.uniform(shape, "test"), draws.normal(shape, "test")
    assert torch.equal(u[:, 0::2] + u[:, 1::2], torch.full_like(u[:, ::2], 1 - 2**-32))
    assert torch.equal(z[:, 0::2], -z[:, 1::2])
    assert u.min() >= 0 and u.max() < 1 and len(u[:, ::2].unique()) == u[:, ::2].numel()
    for draw in ("uniform", "normal"):  # chunks give the same numbers, also where they part a pair
        whole = getattr(draws, draw)(shape, "test")
        parts = [getattr(draws.starting(k), draw)((4, n, 3), "test") for k, n in ((0, 3), (3, 3), (6, 4))]
        assert torch.equal(torch.cat(parts, 1), whole)
    for other in (draws.fork(1), draws.seeded(5), draws.starting(2)):
        assert other.kind == kind
    with pytest.raises(ValueError, match=re.escape("Draws: kind must be one of ('independent', 'antithetic', ")):
        Draws(kind="mirrored")


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_alone_is_distributed_as_ever(kind):
    """Moments of every place in a block, within five standard errors."""
    count, block = 40_000, 2
    u, z = (
        getattr(Draws(seed=1, kind=kind), draw)((count, block, 1), "test")[..., 0] for draw in ("uniform", "normal")
    )
    for place in range(block):
        for power, moment in ((1, 1 / 2), (2, 1 / 3), (3, 1 / 4)):
            variance = 1 / (2 * power + 1) - moment**2
            assert abs((u[:, place] ** power).mean() - moment) < 5 * (variance / count) ** 0.5
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs((z[:, place] ** power).mean() - moment) < 5 * (variance / count) ** 0.5


@pytest.mark.parametrize("group", ROTATIONS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_rotations_of_a_block_are_haar_distributed_one_by_one(group, kind):
    """The entries' moments of first to fourth order are those of independent draws, for every place in the block."""
    count, d, block = 20_000, group.d, group.block(kind)
    g = group.uniform(Points(count), 2 * block, Draws(seed=2, kind=kind))
    eye = torch.eye(d, dtype=torch.float64)
    assert (g @ g.mT - eye).abs().max() < 1e-9
    if group.special:
        assert (torch.linalg.det(g) - 1).abs().max() < 1e-9
    signs = group.signs(kind)
    assert len(signs.unique(dim=0)) == block == {"antithetic": 2, "stratified": 2 ** (d - group.special)}[kind]
    relative = g[:, :1].mT @ g[:, :block]  # D, exactly the same in every block
    assert_near(relative, torch.diag_embed(signs.double()).expand_as(relative), {torch.float64: 1e-9})
    x = torch.linspace(-1, 1, d * d, dtype=torch.float64).view(d, d) + 0.3
    independent = group.uniform(Points(count), block, Draws(seed=9))
    for place in range(block):
        for power in (1, 2, 3, 4):
            a, b = (((e[:, place] * x).sum((-1, -2))) ** power for e in (g, independent))
            assert abs(a.mean() - b.mean()) < 5 * ((a.var() + b.var()) / count).sqrt() + 1e-12
    for entry in ((0, 0), (d - 1, 0)):  # blocks are independent
        a, b = g[:, 0, entry[0], entry[1]], g[:, block, entry[0], entry[1]]
        assert abs((a * b).mean()) < 5 / count**0.5


def test_antithetic_permutations_are_uniform():
    count = 24_000
    g = Symmetric(3).uniform(random_graphs([3] * count), 2, Draws(seed=1, kind="antithetic"))
    assert torch.equal(g.order[:, 0], g.order[:, 1].flip(-1))  # the reverse
    for place in range(2):
        counts = (g.order[:, place] * torch.tensor([9, 3, 1])).sum(-1).unique(return_counts=True)[1]
        assert len(counts) == 6 and (counts - count / 6).abs().max() < 5 * (count * 5 / 36) ** 0.5


# --- models: the expectation is left alone, the variance falls ---


class Quadratic(nn.Module):
    """A backbone with an odd and an even part in the coordinates."""

    def __init__(self, odd: float, even: float):
        super().__init__()
        torch.manual_seed(1)
        self.odd, self.even, self.mix = odd, even, nn.Linear(N * 6, N * 3, bias=False)

    def forward(self, x, edges):
        y = self.mix(x.flatten(2))
        return (self.odd * y + self.even * y.square()).unflatten(-1, (N, 3))


def cloud_model(group, kind="independent", learned=False, odd=1.0, even=1.0) -> Symmetrized:
    torch.manual_seed(1)
    distribution = Uniform(group)
    if learned:
        distribution = Learned(group, VectorNeurons(width=6, scores=False), Normal(1.0))
    parts = Quadratic(odd, even), models.NodeVectors(), models.NodeReadout(displacement=True)
    return Symmetrized(*parts, distribution, draws=kind).double().eval()


def graph_model(kind="independent", distribution=None) -> Symmetrized:
    torch.manual_seed(1)
    parts = models.MLP([16, 8, 3], "tanh"), models.FlatGraph(N, 16, 2), models.MeanReadout()
    learned = Learned(Symmetric(N), GIN(2, 8), UniformNoise(), tau=0.1)
    return Symmetrized(*parts, distribution or learned, draws=kind).double().eval()


MODELS = {
    "O(3)": lambda kind: (cloud_model(Euclidean(3), kind), clouds()),
    "SO(3)": lambda kind: (cloud_model(SpecialEuclidean(3), kind), clouds()),
    "learned O(3)": lambda kind: (cloud_model(Euclidean(3), kind, learned=True), clouds()),
    "uniform S_n": lambda kind: (graph_model(kind, Uniform(Symmetric(N))), random_graphs([6])),
    "learned S_n": lambda kind: (graph_model(kind), random_graphs([6])),
}


@torch.no_grad()
def means(f: Symmetrized, batch, samples: int, repeats: int) -> torch.Tensor:
    """(repeats, ...) averages of so many samples with noise of their own."""
    each, _ = f(batch, samples * repeats, torch.Generator().manual_seed(8), reduce="none")
    return each.unflatten(0, (repeats, samples)).mean(1)


@pytest.mark.parametrize("name", MODELS)
def test_expectations_are_left_alone(name):
    samples, repeats = 8, 250
    plain = means(*MODELS[name]("independent"), samples, repeats)
    for kind in KINDS:
        found = means(*MODELS[name](kind), samples, repeats)
        assert not torch.equal(found, plain)
        error = ((found.var(0) + plain.var(0)) / repeats).sqrt()
        assert ((found.mean(0) - plain.mean(0)).abs() < 5 * error + 1e-12).all()


@pytest.mark.parametrize(
    ("group", "kind"), [(Euclidean, "antithetic"), (Euclidean, "stratified"), (SpecialEuclidean, "stratified")]
)
def test_variances_fall_with_the_even_part_of_a_backbone(group, kind):
    """g phi(g^-1 x) is odd in g where phi is even, and g, -g takes that away; where phi is odd it is the same twice."""
    ratio = {}
    for odd, even in ((0.1, 1.0), (1.0, 0.0)):
        models_of = (cloud_model(group(3), k, odd=odd, even=even) for k in ("independent", kind))
        plain, found = (means(f, clouds(), 8, 250).var(0).mean() for f in models_of)
        ratio[even] = float(plain / found)
    assert ratio[1.0] > (1.3 if group is SpecialEuclidean else 10)
    assert ratio[0.0] < 0.9 or group is SpecialEuclidean


def test_variances_fall_with_antithetic_permutations():
    """A sum over slots with rising weights is odd about its mean under the reverse order: no variance is left."""
    batch = random_graphs([6])
    f = graph_model("independent", Uniform(Symmetric(N)))
    f.backbone, f.embed, f.readout = nn.Identity(), models.NodeTokens(N, 1, N, 2).double(), SlotSum()
    plain = means(f, batch, 2, 400).var(0)
    f.draws = "antithetic"
    assert plain > 0.1 and means(f, batch, 2, 400).var(0) < 1e-20


class SlotSum(nn.Module):
    """sum of j x[slot j]."""

    def forward(self, outputs, batch, group, g):
        return (outputs[..., 0] * torch.arange(N, dtype=torch.float64)).sum(-1, keepdim=True).mean(1)


# --- other averages ---


def test_reductions():
    f, batch = (
        graph_model(),
        random_graphs([6, 6, 5]),
    )  # no two samples alike, or rounding says whose gradient the largest gets
    draw = lambda **how: f(batch, 5, torch.Generator().manual_seed(2), **how)[0]  # noqa: E731
    each, mean = draw(reduce="none"), draw()
    assert each.shape == (5, *mean.shape)
    assert_near(each.mean(0), mean)
    assert torch.equal(draw(reduce="max"), each.amax(0))
    weights = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    found = draw(reduce="weighted", weights=weights)
    expected = torch.stack([(each[:, b] * weights[b, :, None]).sum(0) / weights[b].sum() for b in range(3)])
    assert_near(found, expected)
    assert_near(torch.autograd.grad(found.sum(), weights)[0], torch.autograd.grad(expected.sum(), weights)[0])
    assert_near(draw(reduce="weighted", weights=torch.full((3, 5), 7.0)), mean, {torch.float64: 1e-7})
    for how in ({"reduce": "none"}, {"reduce": "max"}, {"reduce": "weighted", "weights": weights}):
        if how["reduce"] == "max":  # of samples that differ: else rounding chooses whose gradient it has
            f, batch = graph_model(distribution=Uniform(Symmetric(N))), random_graphs([6, 6, 5])
            largest, second = draw(reduce="none").topk(2, 0).values
            assert (largest - second).min() > 1e-6
        else:
            f, batch = graph_model(), random_graphs([3, 6, 5])
        f.chunks = Chunks(2)
        chunked = draw(**how)
        f.chunks = Chunks()
        whole = draw(**how)
        assert_near(chunked, whole)
        # of samples with one permutation rounding says which is the largest, and whose scores get the gradient
        part = f.backbone if how["reduce"] == "max" else f
        gradients = [
            torch.autograd.grad(y.square().sum(), list(part.parameters()), allow_unused=True) for y in (chunked, whole)
        ]
        for a, b in zip(*gradients, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("kind", ["nodes", "pairs"])
def test_weights_of_nodes_and_pairs_are_their_graphs(kind):
    batch, width = random_graphs([3, 6, 5]), 8
    batch = batch.replace(pairs=torch.tensor([[0, 4, 8, 12], [1, 5, 7, 13]]))
    readout = models.SlotReadout(N, width, 2) if kind == "nodes" else models.PairReadout(N, width, 3, 2)
    embed = models.FlatGraph(N, width, 2) if kind == "nodes" else models.GraphTokens(N, width, 3, 2)
    f = Symmetrized(models.MLP([width, width]), embed, readout, Frame(Symmetric(N))).double()
    weights = torch.eye(3, dtype=torch.float64)[:, [0, 1, 1, 2]] + 1e-30  # graph 0: sample 0, 1: 1 and 2, 2: 3
    each, found = (
        f(batch, 4, torch.Generator().manual_seed(2), **how)[0]
        for how in ({"reduce": "none"}, {"reduce": "weighted", "weights": weights})
    )
    graph = batch.graph if kind == "nodes" else torch.tensor([0, 1, 1, 2])
    expected = torch.stack([each[:, i][[[0], [1, 2], [3]][b]].mean(0) for i, b in enumerate(graph.tolist())])
    assert_near(found, expected)


@pytest.mark.parametrize("scale", [3e38, 1e-38])
def test_weights_whose_sum_or_share_leaves_the_range_of_float32(scale):
    f, batch = graph_model(), random_graphs([6, 6, 5])
    draw = lambda **how: f(batch, 4, torch.Generator().manual_seed(2), **how)[0]  # noqa: E731
    shares = torch.tensor([1.0, 0.25, 1.0, 0.5]).repeat(3, 1)
    found, expected = (draw(reduce="weighted", weights=x) for x in (scale * shares, shares))
    assert expected.abs().min() > 1e-6
    assert_near(found, expected, {torch.float64: 1e-6})
    assert_near(draw(reduce="weighted", weights=torch.full((3, 4), scale)), draw(), {torch.float64: 1e-6})


def test_bad_reductions():
    f, batch = graph_model(), random_graphs([3, 6])
    for error, how, message in (
        (ValueError, {"reduce": "sum"}, "reduce must be one of ('mean', 'none', 'max', 'weighted', 'best'), got 'sum'"),
        (ValueError, {"reduce": "weighted"}, "weights must be (B, S) = (2, 3), got None"),
        (ValueError, {"weights": torch.ones(2, 3)}, "weights must be None with reduce 'mean', got (2, 3)"),
        (
            ValueError,
            {"reduce": "weighted", "weights": torch.ones(3, 2)},
            "weights must be (B, S) = (2, 3), got (3, 2)",
        ),
        (TypeError, {"reduce": "weighted", "weights": [[1.0] * 3] * 2}, "weights must be a Tensor or None, got list"),
        (TypeError, {"weights": [[1.0] * 3] * 2}, "weights must be a Tensor or None, got list"),
        (TypeError, {"reduce": "weighted", "weights": torch.ones(2, 3).long()}, "weights must be floating point, got"),
        (
            ValueError,
            {"reduce": "weighted", "weights": torch.zeros(2, 3)},
            "weights must be finite and >= 0 with a sum > 0",
        ),
    ):
        with pytest.raises(error, match=re.escape(f"Symmetrized: {message}")):
            f(batch, 3, **how)


# --- standard errors ---


@pytest.mark.parametrize("kind", ["independent", "antithetic", "stratified"])
def test_standard_error_is_that_of_the_mean(kind):
    """Of 64 samples, against the deviation of 200 such means, and the mean is that of `forward`."""
    f, batch = cloud_model(Euclidean(3), kind), clouds()
    seeds = [torch.Generator().manual_seed(k) for k in range(200)]
    found = [f.estimate(batch, 64, seed, step=24) for seed in seeds]
    assert all(x.samples == 64 for x in found)
    true = torch.stack([x.prediction for x in found]).std(0)
    told = torch.stack([x.standard_error.square() for x in found]).mean(0).sqrt()
    assert ((told / true).log().mean().abs() < 0.05) and ((told / true).log().abs() < 0.35).all()
    with torch.no_grad():
        assert_near(found[3].prediction, f(batch, 64, torch.Generator().manual_seed(3))[0])


def test_estimates_stop_when_the_error_is_small_enough():
    f, batch = graph_model(), random_graphs([6, 5])
    estimate = lambda **how: f.estimate(batch, 512, torch.Generator().manual_seed(1), **how)  # noqa: E731
    whole = estimate()
    assert whole.samples == 512
    tolerance = 3 * float(whole.standard_error.max())  # about a ninth of the samples
    found = estimate(tolerance=tolerance)
    assert 24 <= found.samples <= 128 and found.samples % 8 == 0
    assert found.standard_error.max() <= tolerance
    before = f.estimate(batch, found.samples - 8, torch.Generator().manual_seed(1))
    assert before.standard_error.max() > tolerance
    assert ((found.prediction - whole.prediction).abs() < 5 * found.standard_error).all()
    assert estimate(tolerance=0.0).samples == 512
    assert not found.prediction.requires_grad
    one = f.estimate(batch, 1)
    assert one.samples == 1 and one.standard_error.isnan().all()
    f.draws = "antithetic"
    assert f.estimate(batch, 5, step=3).samples == 6
    g, _ = f.distribution(batch, 6, Draws(seed=1, kind="antithetic"))
    assert samples_of(g) == 6
    for error, how, message in (
        (ValueError, {"tolerance": -1.0}, "estimate: tolerance must be at least 0, got -1.0"),
        (ValueError, {"tolerance": float("nan")}, "estimate: tolerance must be at least 0, got nan"),
        (TypeError, {"tolerance": "a"}, "estimate: tolerance must be a number, got str 'a'"),
        (ValueError, {"step": 0}, "estimate: step must be at least 1, got 0"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            estimate(**how)
    with pytest.raises(RuntimeError, match="estimate: the model must be in eval mode, got training mode"):
        f.train().estimate(batch, 4)
    f.eval().samples_mesh = "mesh"
    with pytest.raises(ValueError, match="estimate: the model's samples_mesh must be None, got mesh"):
        f.estimate(batch, 4)


def test_estimates_of_few_samples_that_agree_do_not_stop():
    """Of two nodes' orders: half of all pairs of samples agree, and one in 128 of all eights."""
    f, batch = graph_model(distribution=Uniform(Symmetric(N))), random_graphs([2])
    found = [f.estimate(batch, 64, torch.Generator().manual_seed(k), tolerance=1e-6, step=2) for k in range(100)]
    assert all(x.samples >= LEAST_BLOCKS for x in found)
    assert sum(x.samples < 64 for x in found) <= 5
    assert f.estimate(batch, 6, tolerance=1e9, step=2).samples == 6
    assert f.estimate(batch, 64, tolerance=1e9, step=3).samples == 9
    f.draws = "antithetic"  # blocks of both orders: exact, each of them
    assert f.estimate(batch, 64, tolerance=1e-6, step=2).samples == 2 * LEAST_BLOCKS

"""Discrete distributions and energies: equivariance, sampling, weights without bias, penalties, what is refused."""

import math
import re

import pytest
import torch
from torch import nn

from probsym_fast import PointClouds, Symmetrized, equivariance_error, models
from probsym_fast.distributions import Discrete, Energy, Uniform
from probsym_fast.draws import KINDS
from probsym_fast.groups import Cyclic, Dihedral, Draws, Orthogonal
from tests.conftest import assert_near
from tests.groups.test_groups import N, S, clouds

GROUPS = [Dihedral(4), Dihedral(3) * Cyclic(N, "n")]


class Shape(nn.Module):
    """One score per cloud from its coordinates, not symmetric in anything."""

    def __init__(self, d=2, flat=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(N * d, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.flat = flat

    def forward(self, batch):
        return self.net(batch.positions.flatten(1))[:, 0] if self.flat else self.net(batch.positions.flatten(1))


class Coordinates(nn.Module):
    """(B, S, n d) moved positions."""

    def forward(self, batch, group, g):
        return group.act(g, batch.positions, "np", inverse=True).flatten(2)


class Bad(nn.Module):
    """A score of infinity for the first input, 0 for the others."""

    def forward(self, x):
        scores = torch.zeros(x.size if isinstance(x, PointClouds) else x.shape[:2])
        return scores.index_fill(0, torch.tensor(0), math.inf)


def energies(group) -> dict[str, Energy]:
    return {
        "batches": Energy(group, Shape()),
        "flat": Energy(group, Shape(flat=True)),
        "tokens": Energy(group, Shape().net, Coordinates()),
    }


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_probabilities_move_with_the_input(group):
    """p(hg|hx) = p(g|x), whichever way the network is called."""
    batch = clouds(3, d=2)
    wanted = None
    for p in energies(group).values():
        log_p = p.log_probabilities(batch)
        assert_near(log_p.exp().sum(1), torch.ones(3, dtype=log_p.dtype))
        wanted = log_p if wanted is None else wanted
        assert_near(log_p, wanted)
        assert log_p.std() > 0.1
        h = group.uniform(batch, 1, Draws(seed=4))
        moved = p.log_probabilities(batch.moved(group, h))
        every = group.elements(batch)
        wide = [x.expand(-1, group.order) for x in (h if isinstance(h, tuple) else (h,))]
        hg = group.compose(tuple(wide) if isinstance(h, tuple) else wide[0], every)
        number = (hg[0] * N + hg[1]) if isinstance(hg, tuple) else hg
        assert_near(moved.gather(1, number), log_p)


def weighted(model, batch, samples, seed=0):
    """The weighted mean over elements of the model's distribution."""
    return model(batch, samples, seed=seed, reduce="weighted")[0]


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_the_whole_orbit_is_exact(group):
    """The weighted mean over all elements: equivariant to rounding, and the expectation of the samples' mean."""
    batch = clouds(2, d=2)
    net = models.MessagePassing(in_features=4, edge_features=2, out_features=2, width=8, layers=1)
    parts = net, models.NodeVectors(), models.NodeReadout(displacement=True)
    model = Symmetrized(*parts, Energy(group, Shape())).double().eval()
    exact = lambda x: weighted(model, x, group.order)  # noqa: E731
    assert equivariance_error(exact, batch, group=group, output="np", moves=3) < 1e-12
    expected, uniform = exact(batch), Symmetrized(*parts, Uniform(group)).double().eval()
    found = model.estimate(batch, 128, seed=1, step=128)
    assert ((found.prediction - expected).abs() < 5 * found.standard_error + 1e-9).all()
    assert (uniform(batch, samples=128, seed=1)[0] - expected).abs().max() > 1e-3  # weights matter
    expected.square().sum().backward()
    assert model.distribution.network.net[0].weight.grad.abs().max() > 0


class Table(Discrete):
    """The same probabilities for every input."""

    def __init__(self, group, logits, **settings):
        super().__init__(group, **settings)
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def candidates(self, batch, draws):
        log_p = self.logits.log_softmax(0).expand(batch.size, -1)
        return self.group.elements(batch), log_p, {}


LOGITS = [0.0, 1.0, -2.0, 0.5, -torch.inf]
VALUES = torch.tensor([1.0, -2.0, 0.3, 4.0, 100.0], dtype=torch.float64)
COUNT = 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_probabilities(kind):
    """Chi-square of every place in a block; stratified blocks hold each element about as often as its share."""
    group = Cyclic(5)
    p = torch.tensor(LOGITS, dtype=torch.float64).softmax(0)
    g, penalties = Table(group, LOGITS)(clouds(COUNT, 2), 5, Draws(seed=3, kind=kind))
    assert penalties == {}
    for place in range(5):
        counts = torch.bincount(g[:, place], minlength=5)
        assert counts[4] == 0 and ((counts - COUNT * p)[:4].square() / (COUNT * p)[:4]).sum() < 3 + 5 * 6**0.5
    if kind == "stratified":
        counts = torch.stack([(g == k).sum(1) for k in range(5)], 1)
        assert ((counts - 5 * p).abs() < 1).all()
    whole = Table(group, LOGITS)(clouds(3, 2), 7, Draws(seed=5, kind=kind))[0]
    parts = [
        Table(group, LOGITS)(clouds(3, 2), n, Draws(seed=5, kind=kind).starting(k))[0] for k, n in ((0, 3), (3, 4))
    ]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("samples", [1, 2, 4, 5])
def test_weights_without_replacement_have_no_bias(samples):
    """Sums weighted by p / q, and their gradients, are those of the exact mean, in five standard errors."""
    p = Table(Cyclic(5), LOGITS)
    exact = (p.logits.softmax(0) * VALUES).sum()
    (wanted,) = torch.autograd.grad(exact, p.logits)
    g, weights, _ = p.elements_and_weights(clouds(COUNT, 2), samples, Draws(seed=1))
    assert g.shape == weights.shape == (COUNT, samples)
    if samples == 5:
        assert torch.equal(g, torch.arange(5).expand(COUNT, -1))
    assert (g.sort(1).values.diff(dim=1) > 0).all()  # each once
    sums = (weights * VALUES[g]).sum(1)
    assert abs(sums.mean() - exact) < 5 * sums.std() / COUNT**0.5 + 1e-12
    slopes = weights.detach()[..., None] * VALUES[g][..., None] * (torch.eye(5)[g] - p.logits.softmax(0).detach())
    spread = slopes.sum(1).std(0)
    (found,) = torch.autograd.grad(sums.mean(), p.logits)
    assert ((found - wanted).abs() <= 5 * spread / COUNT**0.5 + 1e-12)[:4].all()
    assert found[:4].isfinite().all()


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_the_score_function_has_no_bias(samples):
    """Independent samples of equal weight; the gradient of their normalised mean is that of the exact one."""
    p = Table(Cyclic(4), LOGITS[:4], replacement=True)
    exact = (p.logits.softmax(0) * VALUES[:4]).sum()
    (wanted,) = torch.autograd.grad(exact, p.logits)
    g, weights, _ = p.elements_and_weights(clouds(COUNT, 2), samples, Draws(seed=2))
    assert torch.equal(weights, torch.ones_like(weights))
    assert torch.equal(g, p(clouds(COUNT, 2), samples, Draws(seed=2))[0])
    means = ((weights / weights.sum(1, keepdim=True)) * VALUES[g]).sum(1)
    (found,) = torch.autograd.grad(means.mean(), p.logits)
    if samples == 1:
        assert found.abs().max() < 1e-12
        return
    each = (VALUES[g] - VALUES[g].mean(1, keepdim=True))[..., None] * (torch.eye(4)[g] - p.logits.softmax(0).detach())
    assert ((found - wanted).abs() < 5 * each.sum(1).std(0) / (samples - 1) / COUNT**0.5).all()
    assert abs(means.mean() - exact) < 5 * means.std() / COUNT**0.5


def test_the_best():
    """Every sample is the most probable element; the weighted ones fall. It goes before `replacement`."""
    batch = clouds(3, 2)
    p = Table(Cyclic(5), LOGITS, best=True, replacement=True)
    for kind in KINDS:
        assert torch.equal(p(batch, 3, Draws(seed=1, kind=kind))[0], torch.ones(3, 3, dtype=torch.int64))
    g, weights, _ = p.elements_and_weights(batch, 3, Draws(seed=1))
    assert g[0].tolist() == [1, 3, 0]
    assert_near(weights, p.logits.softmax(0)[[1, 3, 0]].expand(3, -1))
    assert weights.requires_grad
    p.best = False
    assert not torch.equal(p(batch, 3, Draws(seed=1))[0], torch.ones(3, 3, dtype=torch.int64))


def test_penalties():
    """The entropy of p, and the divergence from a prior."""
    group, batch = Dihedral(2), clouds(3, d=2)
    p = Energy(group, Shape(), prior=torch.tensor([1.0, 0, 0, 0]))
    _, penalties = p(batch, S, Draws(seed=1))
    log_p = p.log_probabilities(batch)
    assert_near(penalties["entropy"], torch.distributions.Categorical(logits=log_p).entropy().mean())
    assert_near(penalties["prior"], -log_p[:, 0].mean())
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    _, _, penalties = Energy(group, Shape(), prior=q).elements_and_weights(batch, 4)
    assert_near(penalties["prior"], (q * (q.log() - log_p)).sum(1).mean())
    penalties["prior"].backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: Energy(Orthogonal(2), Shape()),
            ValueError,
            "Energy: group must be finite, with an order, got Orthogonal(2)",
        ),
        (lambda: Energy(Cyclic(2), 1), TypeError, "Energy: network must be an nn.Module, got int"),
        (lambda: Energy(Cyclic(2), Shape(), 1), TypeError, "Energy: embed must be an nn.Module or None, got int"),
        (lambda: Energy(Cyclic(2), Shape(), replacement=1), TypeError, "Energy: replacement must be a bool, got int 1"),
        (lambda: Energy(Cyclic(2), Shape(), best=1), TypeError, "Energy: best must be a bool, got int 1"),
        (
            lambda: Energy(Cyclic(2), Shape(), prior=torch.ones(3)),
            ValueError,
            "Energy: prior must be (2,), got (3,)",
        ),
        (
            lambda: Energy(Cyclic(2), Shape(), prior=torch.ones(2)),
            ValueError,
            "Energy: prior must be >= 0 with sum 1, got [1.0, 1.0]",
        ),
        (
            lambda: Energy(Cyclic(2), nn.Identity(), Coordinates())(clouds(d=2), 1),
            ValueError,
            "Energy: the network's scores must be (B, order) = (2, 2), got (2, 2, 10)",
        ),
        *(
            (
                lambda embed=embed, settings=settings: Energy(Cyclic(2), Bad(), embed, **settings)(clouds(d=2), 1),
                ValueError,
                "Energy: the network's scores must be finite, got NaN or infinity",
            )
            for embed in (None, Coordinates())
            for settings in ({}, {"best": True}, {"replacement": True})
        ),
        (
            lambda: Energy(Cyclic(2), nn.Identity())(clouds(d=2), 1),
            TypeError,
            "Energy: the network's scores must be a Tensor, got PointClouds",
        ),
        (
            lambda: Energy(Cyclic(2), Shape()).elements_and_weights(clouds(d=2), 3),
            ValueError,
            "Energy: samples must be at most the number of elements, 2, got 3",
        ),
        (
            lambda: Energy(Cyclic(2), Shape()).elements_and_weights(clouds(d=2), 0),
            ValueError,
            "Energy: samples must be at least 1, got 0",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()

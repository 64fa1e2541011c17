"""Estimators of the mean over p(g|x) on images: values and gradients against the sum over all elements.

Every row is one input with weights of its own, so that its gradient is known by itself, and errors are counted in standard
errors over the rows: at most 5 for each of the 1 + 16 numbers.
"""

import math

import pytest
import torch
from torch import nn

from probsym_fast import Images, Symmetrized
from probsym_fast.distributions import Energy, RotationEnergy
from probsym_fast.groups import Cyclic, Dihedral, Draws, Orthogonal, SpecialOrthogonal
from probsym_fast.models import MovedImages
from tests.conftest import assert_near
from tests.distributions.test_rotation_energy import Offset

COUNT, SIDE, BOUND = 4000, 4, 5
IMAGE = torch.randn(1, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
WEIGHT = torch.randn(SIDE**2, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) / 2
OUT = torch.randn(SIDE**2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) / 2
BATCH = Images(IMAGE.expand(COUNT, -1, -1, -1))


class Scores(nn.Module):
    """Linear in the moved image, with weights (rows, 16)."""

    def __init__(self, rows=COUNT):
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.expand(rows, -1).clone())

    def forward(self, x):
        return (x.flatten(2) * self.weight[:, None]).sum(-1)


def outputs(group, g, batch=BATCH):
    """A number per sample, (rows, S), that depends on g in no symmetric way."""
    return (MovedImages()(batch, group, g)[0].flatten(2) @ OUT).tanh()


KINDS = {
    "C4": lambda **settings: Energy(Cyclic(4), Scores(), MovedImages(), **settings),
    "D4": lambda **settings: Energy(Dihedral(4), Scores(), MovedImages(), **settings),
    "SO2": lambda **settings: RotationEnergy(SpecialOrthogonal(2), Scores(), MovedImages(), n=6, **settings),
    "O2": lambda **settings: RotationEnergy(Orthogonal(2), Scores(), MovedImages(), n=4, **settings),
}
ORDER = {"C4": 4, "D4": 8, "SO2": 6, "O2": 8}


def by_rows(p, means):
    """(rows, 1 + 16): the rows' means, and their gradients."""
    (slopes,) = torch.autograd.grad(means.sum(), p.network.weight)
    return torch.cat([means.detach()[:, None], slopes], 1)


def whole(p, order, seed):
    g, weights, _ = p.elements_and_weights(BATCH, order, Draws(seed=seed))
    assert_near(weights.sum(1), torch.ones(COUNT, dtype=torch.float64))
    return by_rows(p, (weights * outputs(p.group, g)).sum(1))


def assert_unbiased(errors):
    spread = errors.std(0) / len(errors) ** 0.5
    assert (errors.mean(0).abs() <= BOUND * spread + 1e-10).all(), errors.mean(0) / spread


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_orbit_is_the_expectation(kind):
    """Of a finite group by the definition of p; of a continuous one for the offsets' mean by a fine grid of them."""
    p = KINDS[kind]()
    found = whole(p, ORDER[kind], 1)
    if kind in ("C4", "D4"):
        images = torch.stack([(IMAGE.flip(-2) if k > 3 else IMAGE).rot90(k % 4, (-2, -1)) for k in range(ORDER[kind])])
        back = [k if k > 3 else -k % 4 for k in range(ORDER[kind])]  # g^-1 x for element g
        moved, weight = images[back].flatten(1), WEIGHT.clone().requires_grad_()
        mean = ((moved @ weight).softmax(0) * (moved @ OUT).tanh()).sum()
        (slope,) = torch.autograd.grad(mean, weight)
        assert_near(found, torch.cat([mean.detach()[None], slope]).expand(COUNT, -1))
        return
    one, rows = Images(IMAGE), []
    for u in torch.arange(64).add(0.5).div(64).tolist():
        p.network = Scores(1)
        g, log_p, _ = p.candidates(one, Offset(u))
        rows.append(by_rows(p, (log_p.exp() * outputs(p.group, g, one)).sum(1)))
    assert_unbiased(found - torch.cat(rows).mean(0))


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_without_replacement(kind, samples):
    """The sum weighted by p / q."""
    p = KINDS[kind]()
    g, weights, _ = p.elements_and_weights(BATCH, samples, Draws(seed=2))
    assert_unbiased(by_rows(p, (weights * outputs(p.group, g)).sum(1)) - whole(p, ORDER[kind], 2))


@pytest.mark.parametrize("kind", KINDS)
def test_straight_through(kind):
    """Independent samples of weight 1, whose gradient knows of p. The plain mean has the value, but not the gradient."""
    p = KINDS[kind](replacement=True)
    exact = whole(KINDS[kind](), ORDER[kind], 3)
    g, weights, _ = p.elements_and_weights(BATCH, 3, Draws(seed=3))
    assert torch.equal(weights, torch.ones_like(weights))
    found = by_rows(p, (weights * outputs(p.group, g)).sum(1) / weights.sum(1))
    assert_unbiased(found - exact)
    again, _ = p(BATCH, 3, Draws(seed=3))
    plain = outputs(p.group, again).mean(1)
    assert_near(plain, found[:, 0])
    if kind in ("C4", "D4"):
        assert not plain.requires_grad
    else:
        errors = by_rows(p, plain) - exact
        assert (errors.mean(0).abs() > 2 * BOUND * errors.std(0) / COUNT**0.5)[1:].any()


class Number(nn.Module):
    """`outputs` as a model's: (B, S, C, H, W) -> (B, S)."""

    def forward(self, x):
        return (x.flatten(2) @ OUT).tanh()


class Mean(nn.Module):
    def forward(self, outputs, batch, group, g):
        return outputs.mean(1)


@pytest.mark.parametrize("reduce", ["mean", "weighted"])
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_standard_errors(kind, replacement, reduce):
    """Of `estimate`: the deviation over rows of one input, also where the samples of a call depend on each other."""
    p = KINDS[kind](replacement=replacement)
    model = Symmetrized(Number(), MovedImages(), Mean(), p, reduce=reduce).eval()
    found = model.estimate(BATCH, 60, seed=5, step=3)
    assert found.samples == 60
    told, true = found.standard_error.square().mean().sqrt(), found.prediction.std()
    assert 0.94 < told / true < 1.06
    if reduce == "mean" or replacement:  # no bias
        exact = whole(KINDS[kind](), ORDER[kind], 1)[:, 0]  # of angles a row for each offset
        error = (true**2 + exact.std() ** 2).sqrt() / COUNT**0.5
        assert (found.prediction.mean() - exact.mean()).abs() < BOUND * error


def test_the_error_of_a_whole_orbit():
    """0 for a group's, and that of the offset for angles."""
    for kind, zero in (("D4", True), ("SO2", False)):
        model = Symmetrized(Number(), MovedImages(), Mean(), KINDS[kind](), reduce="weighted").eval()
        found = model.estimate(BATCH, 20 * ORDER[kind], seed=5, step=ORDER[kind], tolerance=1e-9)
        assert found.samples == (1 if zero else 20) * ORDER[kind]
        assert bool((found.standard_error < 1e-12).all()) == zero
        if not zero:
            assert 0.94 < found.standard_error.square().mean().sqrt() / found.prediction.std() < 1.06


def test_estimates_that_are_no_means():
    model = Symmetrized(Number(), MovedImages(), Mean(), KINDS["D4"](), reduce="max").eval()
    with pytest.raises(
        ValueError, match=r"estimate: the model's reduce must be one of \('mean', 'weighted'\), got 'max'"
    ):
        model.estimate(BATCH, 4)
    model.reduce = "weighted"
    with pytest.raises(ValueError, match="Energy: samples must be at most the number of elements, 8, got 9"):
        model.estimate(BATCH, 18, step=9)


@pytest.mark.parametrize("samples", [1, 2])
def test_tails_without_replacement(samples):
    """Undivided, of uniform p: P(sum of weights > S w) is C(8, S + 1) / 8^(S + 1) w^-(S + 1) for large w (`Discrete`)."""
    p, w = Energy(Dihedral(4), Scores(), MovedImages()), 4.0
    with torch.no_grad():
        p.network.weight.zero_()
        seen = [p.elements_and_weights(BATCH, samples, Draws(seed=seed))[1].sum(1) > samples * w for seed in range(20)]
    share, expected = float(torch.cat(seen).double().mean()), math.comb(8, samples + 1) / (8 * w) ** (samples + 1)
    assert 0.75 < share / expected < 1.25


def test_steps_of_few_elements():
    """By default at most the elements; a larger step is refused, unless samples repeat."""
    for kind, order in ORDER.items():
        model = Symmetrized(Number(), MovedImages(), Mean(), KINDS[kind](), reduce="weighted").eval()
        assert model.distribution.most == order
        steps = 1 if kind in ("C4", "D4") else -(-16 // min(8, order))  # the whole orbit is exact
        assert model.estimate(BATCH, 16).samples == steps * min(8, order)
        with pytest.raises(ValueError, match=f"samples must be at most the number of elements, {order}, got 12"):
            model.estimate(BATCH, 24, step=12)
        model.distribution.replacement = True
        assert model.distribution.most is None and model.estimate(BATCH, 24, step=12).samples == 24

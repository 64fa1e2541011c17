"""`RotationEnergy` on points of the plane, where everything is known: p(g|x) is a von Mises law about the point's angle."""

import math
import re

import pytest
import scipy.stats
import torch
from torch import nn

from probsym_fast import PointClouds
from probsym_fast.distributions import RotationEnergy
from probsym_fast.distributions.rotation_energy import _peak
from probsym_fast.groups import Cyclic, Draws, Orthogonal, SpecialOrthogonal
from tests.conftest import assert_near

KAPPA, N = 3.0, 16
GROUPS = [SpecialOrthogonal(2), Orthogonal(2)]


def points(angles) -> PointClouds:
    """One point each, at these angles."""
    angles = torch.as_tensor(angles, dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin()], -1)[:, None]
    return PointClouds(x, torch.zeros_like(x), torch.zeros(len(angles), 1, 1, 1, dtype=torch.float64))


class Right(nn.Module):
    """kappa times the first coordinate of the moved point, and a share of the second: of R(t) kappa cos(angle - t)."""

    def __init__(self, kappa=KAPPA, up=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([kappa, up], dtype=torch.float64))

    def forward(self, positions):
        return (positions[..., 0, :] * self.weight).sum(-1)


class Positions(nn.Module):
    def forward(self, batch, group, g):
        return group.act(g, batch.positions, "np", inverse=True)


class OfBatch(Right):
    def forward(self, batch):
        return super().forward(batch.positions)


class Offset:
    """In place of `Draws`: this offset for every input."""

    def __init__(self, u):
        self.u = u

    def uniform(self, shape, stream, device):
        return torch.full(shape, self.u, dtype=torch.float64)


def angle_of(g):
    return torch.atan2(g[..., 1, 0], g[..., 0, 0])


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_the_law_moves_with_the_input(group, refine):
    """Rotations add to the offset, which is uniform, reflections negate it, and candidates move along: p(hg|hx) = p(g|x)."""
    p, batch, u = RotationEnergy(group, Right(up=1.5), Positions(), n=N, refine=refine), points([0.4, -2.0]), 0.3
    g, log_p, _ = p.candidates(batch, Offset(u))
    assert g.shape == (2, len(log_p[0]), 2, 2) and log_p.shape[1] == (N if group.special else 2 * N)
    assert_near(log_p.exp().sum(1), torch.ones(2, dtype=torch.float64))
    assert_near(torch.linalg.det(g)[:, :N], torch.ones(2, N, dtype=torch.float64))
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
    moved, log_q, _ = p.candidates(
        batch.moved(group, turn.expand(2, 1, 2, 2)), Offset(u + math.atan2(0.6, 0.8) * N / 2 / math.pi)
    )
    assert_near(moved, turn @ g)
    assert_near(log_q, log_p)
    by_batches = RotationEnergy(group, OfBatch(up=1.5), n=N, refine=refine)
    assert_near(by_batches.candidates(batch, Offset(u))[1], log_p)
    if not group.special:
        mirror = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
        moved, log_q, _ = p.candidates(batch.moved(group, mirror.expand(2, 1, 2, 2)), Offset(-u))
        k = torch.arange(2 * N)
        place = -k % N + N * (k < N)  # M R(t) = R(-t) M
        assert_near(moved[:, place], mirror @ g)
        assert_near(log_q[:, place], log_p)
        assert_near(torch.linalg.det(g)[:, N:], -torch.ones(2, N, dtype=torch.float64))


def test_samples_follow_a_von_mises_law():
    """Without `refine`, at n = 16, samples of inputs with offsets of their own: Kolmogorov-Smirnov, p > 0.001."""
    p = RotationEnergy(SpecialOrthogonal(2), Right(), Positions(), n=N, refine=False)
    found = angle_of(p(points([0.7] * 4000), 1, Draws(seed=1))[0])[:, 0] - 0.7
    found = torch.remainder(found + math.pi, 2 * math.pi) - math.pi
    assert scipy.stats.kstest(found.detach().numpy(), scipy.stats.vonmises(KAPPA).cdf).pvalue > 1e-3
    offsets = (angle_of(p(points([0.7] * 4000), 1, Draws(seed=2))[0])[:, 0] * N / 2 / math.pi).remainder(1)
    assert scipy.stats.kstest(offsets.detach().numpy(), "uniform").pvalue > 1e-3


def test_the_best_is_the_mode():
    """Refined, to a hundredth of a step; else to half a step. All samples are the same, and weights are p."""
    angles = torch.linspace(-3, 3, 50, dtype=torch.float64)
    batch, group, step = points(angles), SpecialOrthogonal(2), 2 * math.pi / N
    p = RotationEnergy(group, Right(up=1.0), Positions(), n=N, best=True)
    mode = angles - math.atan2(1.0, KAPPA)

    def errors(p):
        return torch.remainder(angle_of(p(batch, 1, Draws(seed=3))[0])[:, 0] - mode + math.pi, 2 * math.pi) - math.pi

    assert errors(p).abs().max() < 0.01 * step
    rough = errors(RotationEnergy(group, p.network, Positions(), n=N, refine=False, best=True)).abs()
    assert 0.3 * step < rough.max() <= 0.5001 * step
    g, _ = p(batch, 3, Draws(seed=3))
    assert torch.equal(g, g[:, :1].expand_as(g)) and torch.equal(g, p(batch, 3, Draws(seed=3))[0])
    some, weights, _ = p.elements_and_weights(batch, 3, Draws(seed=3))
    _, log_p, _ = p.candidates(batch, Draws(seed=3).fork(0))
    assert torch.equal(some[:, 0], g[:, 0])
    assert_near(weights, log_p.exp().sort(1, descending=True).values[:, :3])


def test_offsets_of_peaks():
    """Exact for a parabola, 0 where flat or at a symmetric minimum, uphill by half a step elsewhere, never infinite."""
    flat = RotationEnergy(SpecialOrthogonal(2), Right(0.0), Positions(), n=N)
    g, log_p, _ = flat.candidates(points([0.3]), Offset(0.0))
    assert_near(angle_of(g)[0, :8], 2 * math.pi / N * torch.arange(8, dtype=torch.float64))
    g.sum().backward()
    assert flat.network.weight.grad.isfinite().all()
    steep = RotationEnergy(SpecialOrthogonal(2), Right(20.0), Positions(), n=N)
    g, _, _ = steep.candidates(points([0.0]), Offset(0.0))
    offset = torch.remainder(angle_of(g)[0] * N / 2 / math.pi - torch.arange(N) + N / 2, N) - N / 2
    expected = torch.tensor([0.0] + [-0.5] * 7 + [0.0] + [0.5] * 7, dtype=torch.float64)
    assert_near(offset, expected)
    places = torch.arange(-2, 3, dtype=torch.float64)
    scores = (-2 * (places - 0.3).square())[None]
    assert_near(_peak(scores, 0.1)[0, 2], torch.tensor(0.3, dtype=torch.float64))
    torch.autograd.gradcheck(_peak, (scores.requires_grad_(), 0.1))


def test_gradients():
    """A plain mean has one through the refined angles only; the mode's is that of the angle itself."""
    batch, group = points([0.4]), SpecialOrthogonal(2)
    assert not RotationEnergy(group, Right(), Positions(), refine=False)(batch, 2)[0].requires_grad
    p = RotationEnergy(group, Right(up=0.5), Positions(), n=64, best=True)
    g, _ = p(batch, 1, Draws(seed=1))
    (found,) = torch.autograd.grad(angle_of(g).sum(), p.network.weight)
    kappa, up = p.network.weight.detach().tolist()
    size = kappa**2 + up**2  # of the mode, angle - atan2(up, kappa)
    assert_near(found, torch.tensor([up / size, -kappa / size], dtype=torch.float64), {torch.float64: 0.02})


def test_penalties():
    """Those of von Mises laws; the sum over 16 angles is exact to rounding. Reflections have a share of the prior."""
    angle, prior = 0.7, 2.0
    batch, i0 = points([angle]), lambda kappa: float(torch.special.i0(torch.tensor(kappa, dtype=torch.float64)))
    ratio = float(torch.special.i1(torch.tensor(prior, dtype=torch.float64))) / i0(prior)
    divergence = math.log(i0(KAPPA) / i0(prior)) + ratio * (prior - KAPPA * math.cos(angle))
    p = RotationEnergy(SpecialOrthogonal(2), Right(), Positions(), n=N, prior=prior)
    _, found = p(batch, 2, Draws(seed=1))
    assert found["prior"].item() == pytest.approx(divergence, abs=1e-5)
    entropy = float(scipy.stats.vonmises(KAPPA).entropy()) + math.log(N / 2 / math.pi)
    assert found["entropy"].item() == pytest.approx(entropy, abs=1e-5)
    sum(found.values()).backward()
    assert p.network.weight.grad.abs().min() > 1e-3
    for share in (0.0, 0.25):  # the scores of R(t) M are those of R(t), so that each half has 1/2
        p = RotationEnergy(Orthogonal(2), Right(), Positions(), n=N, prior=prior, reflected=share)
        more = math.log(2) + sum(q * math.log(q) for q in (share, 1 - share) if q)
        assert p(batch, 2, Draws(seed=1))[1]["prior"].item() == pytest.approx(divergence + more, abs=1e-5)


def make(group=GROUPS[0], network=None, embed=None, **settings):
    return RotationEnergy(group, network or Right(), embed or Positions(), **settings)


SOME = "RotationEnergy: group must be SpecialOrthogonal(2) or Orthogonal(2), got"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(Cyclic(4)), TypeError, f"{SOME} Cyclic(4)"),
        (lambda: make(Orthogonal(3)), ValueError, f"{SOME} Orthogonal(3)"),
        (lambda: make(network=1), TypeError, "RotationEnergy: network must be an nn.Module, got int"),
        (lambda: make(n=2), ValueError, "RotationEnergy: n must be at least 3, got 2"),
        (lambda: make(refine=1), TypeError, "RotationEnergy: refine must be a bool, got int 1"),
        (lambda: make(best=1), TypeError, "RotationEnergy: best must be a bool, got int 1"),
        (lambda: make(prior="1"), TypeError, "RotationEnergy: prior must be a number or None, got str '1'"),
        (lambda: make(prior=-1), ValueError, "RotationEnergy: prior must be finite and >= 0, got -1"),
        (lambda: make(reflected=0.1), ValueError, "RotationEnergy: reflected must be 0 without a prior, got 0.1"),
        (
            lambda: make(prior=1.0, reflected=0.1),
            ValueError,
            "RotationEnergy: reflected must be 0 for SpecialOrthogonal(2), got 0.1",
        ),
        (
            lambda: make(Orthogonal(2), nn.Identity(), n=4)(points([0.0, 1.0]), 1),
            ValueError,
            "RotationEnergy: the network's scores must be (B, 2 n) = (2, 8), got (2, 8, 1, 2)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()

"""The unitary and Lorentz groups: axioms, uniform elements, frames from networks."""

import re

import pytest
import torch
from torch import nn

from probsym_fast import PointClouds, Symmetrized, equivariance_error, models
from probsym_fast.distributions import Learned, Normal, Uniform
from probsym_fast.groups import Draws, Euclidean, Lorentz, Symmetric, Unitary
from tests.conftest import assert_near
from tests.groups.test_groups import N, S, check_axioms, clouds, ks, two_sample_ks

GROUPS = [Unitary(2), Unitary(3), Lorentz(2), Lorentz(4), Symmetric(N) * Lorentz(3)]


def size(group) -> int:
    return next(f.d for f in getattr(group, "factors", (group,)) if hasattr(f, "d"))


@pytest.mark.parametrize("group", GROUPS, ids=repr)
@pytest.mark.parametrize("layout", ["np", "nvv", "nnc", "vcv"])
def test_axioms(group, layout):
    d, batch = size(group), clouds()
    dtype = torch.complex128 if isinstance(group, Unitary) else torch.float64
    x = torch.randn(2, S, *({"n": N, "c": 2}.get(letter, d) for letter in layout), dtype=dtype)
    check_axioms(group, batch, [group.anywhere(batch, S, Draws(seed=i)) for i in range(3)], x, layout)
    assert group.keeps("cc") and not group.keeps("v")


@pytest.mark.parametrize("kind", ["independent", "antithetic"])
def test_uniform_unitary_matrices_follow_the_haar_measure(kind):
    """E |Q_ij|^2 = 1/d, E Q_ij^2 = 0, |Q_11|^2 has distribution function 1 - (1 - t)^(d - 1); left and right invariant."""
    d, count = 3, 20_000
    group, batch = Unitary(d), clouds(count)
    q = group.uniform(batch, 2, Draws(seed=5, kind=kind))
    if kind == "antithetic":
        assert torch.equal(q[:, 1], -q[:, 0])
    q = q[:, 1]
    assert_near(q @ q.mH, torch.eye(d, dtype=q.dtype).expand_as(q))
    for moment, expected in ((q.abs().square(), 1 / d), (q.square(), 0), (q, 0), (torch.linalg.det(q), 0)):
        assert (moment.mean(0) - expected).abs().max() < 5 / count**0.5
    for entry in q.abs().square().flatten(1).T:
        assert ks(entry, lambda t: 1 - (1 - t) ** (d - 1)) < 2.2
    h = group.uniform(clouds(1), 1, Draws(seed=6))[0, 0]
    other = group.uniform(batch, 1, Draws(seed=7))[:, 0]
    for moved in (h @ other, other @ h):
        assert two_sample_ks(moved[:, 0, 0].real, q[:, 0, 0].real) < 1.95


def test_lorentz_elements_reach_every_part():
    """They keep the metric; time and space are reflected half of the time, and boosts differ."""
    group, count = Lorentz(4), 2000
    g = group.anywhere(clouds(count), 1, Draws(seed=1))[:, 0]
    m = torch.diag(group.metric(g))
    assert ((g.mT @ m @ g - m).abs().amax((1, 2)) < 1e-13 * g.abs().amax((1, 2)) ** 2).all()
    time, space = g[:, 0, 0], torch.linalg.det(g[:, 1:, 1:])
    for sign in (time, space):
        assert abs((sign > 0).double().mean() - 0.5) < 5 * 0.5 / count**0.5
    assert time.abs().min() >= 1 and time.abs().min() < 1.1 and 2 < time.abs().max() < 50
    with pytest.raises(
        ValueError, match=r"^Lorentz\(4\): the group must be compact for uniform elements, got one that is"
    ):
        Uniform(group)(clouds(), 1)


@pytest.mark.parametrize("group", [Unitary(3), Lorentz(4)], ids=repr)
def test_frames_move_with_the_matrices(group):
    dtype = torch.complex128 if isinstance(group, Unitary) else torch.float64
    a = torch.randn(2, S, group.d, group.d, dtype=dtype, requires_grad=True)
    h = group.anywhere(clouds(), S, Draws(seed=2))
    found, penalties = group.project({"matrices": h @ a}, clouds())
    assert penalties == {} and (found - h @ group.frames(a)).abs().max() < 1e-11
    assert_near(group.compose(group.inverse(found), found), group.identity(clouds(), S))
    assert torch.autograd.gradcheck(group.frames, a[:1, :1].detach().requires_grad_())
    single = a.detach().to(torch.complex64 if a.is_complex() else torch.float32)
    assert group.frames(single).dtype == single.dtype


def test_columns_that_give_no_frame():
    """Null, equal and zero columns: still an element of the group, with finite gradients."""
    group = Lorentz(3)
    columns = {
        "null first": [[1.0, 1, 0], [1, 0, 0], [0, 0, 1]],
        "equal": [[2.0, 1, 0], [2, 1, 0], [0, 0, 1]],
        "zero": [[0.0, 0, 0], [0, 0, 0], [0, 0, 0]],
        "time-like last": [[0.0, 1, 0], [0, 0, 1], [1, 0, 0]],
    }
    a = torch.tensor(list(columns.values()), dtype=torch.float64).mT.requires_grad_()
    g = group.frames(a)
    m = torch.diag(group.metric(g)).expand_as(g)
    assert_near(g.mT @ m @ g, m)
    assert_near(g[3], torch.eye(3, dtype=torch.float64))
    (g * torch.randn_like(g)).sum().backward()
    assert a.grad.isfinite().all() and (a.grad[2] == 0).all() and (a.grad[3] != 0).any()
    g = Unitary(2).frames(torch.tensor([[1j, 2j], [1, 2]]))
    assert_near(g.mH @ g, torch.eye(2, dtype=g.dtype), {torch.float32: 1e-6})


class Momenta(nn.Module):
    """Matrices whose columns are sums of the particles, with weights that are functions of invariants and noise."""

    outputs = ("matrices",)

    def __init__(self, group: Lorentz):
        super().__init__()
        self.group, self.weights = group, nn.Linear(2, group.d)
        nn.init.normal_(self.weights.weight, 0, 3)

    def noise_shape(self, batch, samples):
        return batch.size, samples, batch.positions.shape[1], 1

    def forward(self, batch, noise):
        p = batch.positions
        invariant = (p * self.group.metric(p) * p.sum(1, keepdim=True)).sum(-1)
        invariant = (invariant / invariant.mean(1, keepdim=True))[:, None, :, None].expand_as(noise)
        weights = self.weights(torch.cat([invariant, noise], -1)).sin()  # (B, S, n, d)
        return {"matrices": torch.einsum("bsnk,bni->bsik", weights, p)}


def test_a_model_of_particles():
    """Canonical frames make a model of momenta equivariant to boosts; learned ones in the mean."""
    torch.manual_seed(0)
    group = Lorentz(4)
    momenta = torch.randn(3, N, 4, dtype=torch.float64)
    momenta[..., 0] = (momenta[..., 1:].square().sum(-1) + 1).sqrt()  # mass 1
    batch = PointClouds(momenta, torch.zeros_like(momenta), torch.ones(3, N, N, 1, dtype=torch.float64))
    net = models.MessagePassing(in_features=8, edge_features=1, out_features=4, width=8, layers=1)
    parts = net, models.NodeVectors(), models.NodeReadout(displacement=True)
    model = Symmetrized(*parts, Learned(group, Momenta(group), Normal(0.0))).double().eval()
    assert equivariance_error(model, batch, samples=1, moves=4) < 1e-8
    loss = model(batch, samples=2, seed=0)[0].square().sum()
    loss.backward()
    assert model.distribution.network.weights.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Lorentz(1), ValueError, "Lorentz: d must be at least 2, got 1"),
        (lambda: Unitary(2.0), TypeError, "Unitary: d must be an int, got float 2.0"),
        (
            lambda: Unitary(3).act(Unitary(3).identity(clouds(), 1), torch.ones(2, N, 3), "nv"),
            TypeError,
            "Unitary(3): x must be complex, got torch.float32",
        ),
        (
            lambda: Unitary(3).project({"matrices": torch.ones(2, 1, 3, 3)}, clouds()),
            TypeError,
            "Unitary(3): matrices must be complex, got torch.float32",
        ),
        (
            lambda: Lorentz(4).act(Lorentz(4).identity(clouds(), 1), torch.ones(2, N, 3), "nv"),
            ValueError,
            "Lorentz(4): axis 2 of x must have size 4, got (2, 5, 3)",
        ),
        (
            lambda: (Lorentz(3) * Euclidean(3)).project({"matrices": torch.ones(2, 1, 3, 3)}, clouds()),
            ValueError,
            "each output must be read by one factor, got 'matrices' read by two",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()

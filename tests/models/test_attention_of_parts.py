"""Second derivatives of models whose parts call torch's fused attention: a user's backbone, readout, distribution."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import probsym_fast as psf
from probsym_fast.distributions import Energy, Uniform
from probsym_fast.models import FlatCloud, MeanReadout, NodeVectors, PooledReadout, symmetrized
from probsym_fast.models.backbones import attention

E3 = psf.groups.Euclidean(3)
FLIP = psf.groups.Finite.generated({"vp": -torch.eye(3)[None]})


class Attention(nn.Module):
    """Self-attention over the last axis but one: (..., n, 3) -> (..., n, C)."""

    def __init__(self, out_features: int = 1):
        super().__init__()
        self.project, self.out = nn.Linear(3, 24), nn.Linear(8, out_features)

    def forward(self, x):
        h = self.project(x).reshape(-1, x.shape[-2], 3, 8)  # fused for four axes only
        q, k, v = h.movedim(2, 0)[:, :, None]
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)).view(*x.shape[:-1], -1)


class Nested(Attention):
    """As our own backbones do."""

    def forward(self, x):
        return attention.every_derivative(super().forward, x)


class Pooled(nn.Module):
    """One number: (..., n, 3) -> (..., 1)."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return self.attention(x).tanh().sum(-2)


class Score(Pooled):
    def forward(self, x):
        return super().forward(x.unflatten(-1, (-1, 3)))


class AttentionReadout(nn.Module):
    layout = "c"

    def __init__(self):
        super().__init__()
        self.pooled = Pooled()

    def forward(self, outputs, batch, group, g):
        return self.pooled(outputs).mean(1)


def clouds(padded: bool = False) -> psf.PointClouds:
    counts = torch.tensor([3, 5]) if padded else None
    return psf.PointClouds(torch.randn(2, 5, 3).double(), num_nodes=counts)


def encoder(padded: bool = False, **settings):
    """Not fused: by torch's own modules, on what `symmetrize` makes around it."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, **{"dropout": 0.0, "batch_first": True, **settings})
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    single = psf.PointClouds(torch.randn(2, 5, 3), num_nodes=torch.tensor([3, 5]) if padded else None)
    return psf.symmetrize(net, E3, single, out_features=1)


def by_hand(backbone, readout, distribution=None, embed=None):
    return psf.Symmetrized(backbone, embed or NodeVectors(), readout, distribution or Uniform(E3))


def scored():
    return by_hand(Pooled(), MeanReadout(), Energy(FLIP, Score(), FlatCloud()))


MODELS = {
    "encoder": encoder,
    "encoder, padded": lambda: encoder(True),
    "encoder with dropout": lambda: encoder(norm_first=True, dropout=0.1),
    "backbone": lambda: by_hand(Attention(), PooledReadout()),
    "backbone of symmetrize": lambda: psf.symmetrize(Attention(), E3, clouds().to(torch.float32)),
    "readout": lambda: by_hand(nn.Linear(3, 3), AttentionReadout()),
    "distribution": scored,
}


def built(name):
    torch.manual_seed(0)
    return MODELS[name]().double().eval(), clouds("padded" in name)


def gradients(model, batch, **settings):
    _, forces, _ = psf.models.energy_and_forces(model, batch, 2, seed=0)
    found = torch.autograd.grad(forces.square().sum(), list(model.parameters()), allow_unused=True)
    return [forces.detach(), *(x for x in found if x is not None)]


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("name", MODELS)
def test_forces_are_trained(name, chunk):
    """As with attention by its formula, which has every derivative."""
    model, batch = built(name)
    model.chunk, model.reduce = chunk, "weighted" if name == "distribution" else "mean"
    y, _ = model(batch, 2)
    assert attention._fused(y.grad_fn, set())
    found = gradients(model, batch)
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients(model, batch)
    assert len(found) == len(expected) > 1 and any(x.abs().max() > 1e-6 for x in found[1:])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_with_given_elements():
    model, batch = built("backbone")
    g, _ = model.distribution(batch, 2)
    x = batch.positions.clone().requires_grad_()

    def gradient():
        y = model.apply_elements(batch.replace(positions=x), g)
        (d,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(d.square().sum(), x)[0]

    found = gradient()
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(found, gradient(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_first_derivatives_are_those_of_torch(monkeypatch, name):
    model, batch = built(name)

    def first():
        y = model(batch, 2, seed=0, reduce="mean")[0].square().sum()
        found = torch.autograd.grad(y, list(model.parameters()), allow_unused=True)
        return [x for x in found if x is not None]

    found = first()
    monkeypatch.setattr(symmetrized, "every_derivative", lambda run, *inputs: run(*inputs))
    assert all(map(torch.equal, found, first()))


def test_transforms():
    """Forward mode, which fused attention lacks."""
    model, batch = built("backbone")
    energy = lambda x: model(batch.replace(positions=x), 2, seed=0)[0].sum()  # noqa: E731
    x, v = batch.positions, torch.randn_like(batch.positions)
    _, found = torch.func.jvp(energy, (x,), (v,))
    torch.testing.assert_close(found, (torch.func.grad(energy)(x) * v).sum(), rtol=1e-8, atol=1e-10)


def test_attention_of_our_own_backbones_is_replaced_once(monkeypatch):
    """Though the backbone and its model both prepare for it."""
    batch, counted, real = clouds(), [], attention.gradients
    monkeypatch.setattr(attention, "gradients", lambda *a, **k: counted.append(1) or real(*a, **k))
    model = by_hand(Nested(), PooledReadout()).double()
    psf.models.energy_and_forces(model, batch, 2, seed=0)
    psf.models.energy_and_forces(model, batch, 2, seed=0)
    assert len(counted) == 2


def test_what_comes_before_the_batch_is_left_alone():
    """A gradient by the positions does not need the graph of the velocities, which is freed."""
    torch.manual_seed(0)
    batch = clouds()
    before = Attention(3).double()
    vectors = before(batch.positions)
    vectors.square().sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        vectors.sum().backward()
    batch = batch.replace(velocities=vectors)
    model = by_hand(nn.Sequential(nn.Linear(6, 3), Attention()), PooledReadout()).double()
    assert psf.models.energy_and_forces(model, batch, 2)[1].abs().max() > 0

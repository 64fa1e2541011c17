"""Forces: the gradient of the symmetrized energy, by differences; padded clouds; chunks; training; inference mode."""

import re

import pytest
import torch

from probsym_fast import PointClouds, Symmetrized
from probsym_fast.distributions import Learned, Normal, Uniform, VectorNeurons
from probsym_fast.groups import Euclidean
from probsym_fast.models import NodeReadout, NodeVectors, PooledReadout, Transformer, energy_and_forces

B, N, TYPES = 3, 5, 2


def clouds(num_nodes=None):
    features = torch.nn.functional.one_hot(torch.randint(0, TYPES, (B, N)), TYPES).double()
    counts = None if num_nodes is None else torch.tensor(num_nodes)
    return PointClouds(torch.randn(B, N, 3, dtype=torch.float64), features=features, num_nodes=counts)


def model(learned=True, **settings):
    group = Euclidean(3)
    network = VectorNeurons(channels=1, width=4, neighbors=9, dropout=0, scores=False, features=TYPES, column_noise=1.0)
    backbone = Transformer(3 + TYPES, width=8, layers=2, heads=2, feedforward=8, tokens=None, out_features=1)
    distribution = Learned(group, network, Normal(0.3)) if learned else Uniform(group)
    return (
        Symmetrized(backbone, NodeVectors(lengths=True), PooledReadout("sum"), distribution, **settings).double().eval()
    )


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("num_nodes", [None, [2, 5, 4]])
def test_forces_are_the_slope_of_the_energy(learned, num_nodes):
    net, batch = model(learned), clouds(num_nodes)
    energy, forces, penalties = energy_and_forces(net, batch, 4, seed=7)
    torch.testing.assert_close(energy, net(batch, 4, seed=7)[0])
    assert forces.shape == batch.positions.shape and penalties == {}
    step = torch.randn_like(batch.positions)
    h = 1e-6 * step
    above, below = (net(batch.replace(positions=batch.positions + k * h), 4, seed=7)[0] for k in (1, -1))
    slope = -(forces * step).sum((1, 2))
    torch.testing.assert_close((above - below)[:, 0] / 2e-6, slope, rtol=1e-5, atol=1e-7)
    assert forces.abs().max() > 1e-3
    if num_nodes is not None:
        assert not forces[~batch.valid].any()


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_without_gradients(how):
    """Also for a batch that is made in inference mode, as a trainer's validation makes it."""
    net, batch = model(), clouds([2, 5, 4])
    expected = energy_and_forces(net, batch, 2, seed=1)[:2]
    with how():
        again = batch.replace(positions=batch.positions * 1, features=batch.features * 1, num_nodes=batch.num_nodes + 0)
        found = energy_and_forces(net, again, 2, seed=1)[:2]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y.detach())
        assert not x.requires_grad


def test_a_loss_on_forces_trains_every_weight_also_in_chunks_and_step_by_step():
    """Gradients of the loss are those of differences of it, and the same for chunks and without fused ops."""
    net, batch = model().train(), clouds()
    weights = dict(net.named_parameters())

    def loss():
        energy, forces, _ = energy_and_forces(net, batch, 4, seed=2)
        return energy.square().sum() + forces.square().sum()

    def gradients():
        found = torch.autograd.grad(loss(), list(weights.values()), allow_unused=True)
        return {name: g for name, g in zip(weights, found, strict=True) if g is not None}

    expected = gradients()
    assert expected.keys() == weights.keys()
    net.chunk = 2
    for name, g in gradients().items():
        torch.testing.assert_close(g, expected[name], rtol=1e-8, atol=1e-9)
    net.chunk = None
    net.backbone.one_pass = net.distribution.network.conv1.one_pass = False
    for name, g in gradients().items():
        torch.testing.assert_close(g, expected[name], rtol=1e-8, atol=1e-9)
    for name in ("distribution.network.matrix_head", "backbone.blocks.0.qkv.weight"):
        weight, step = weights[name], torch.randn_like(weights[name])
        values = []
        for k in (1e-6, -2e-6, 1e-6):
            with torch.no_grad():
                weight += k * step
            values.append(float(loss().detach()))
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float((expected[name] * step).sum()), rel=1e-4)


def test_statistics_that_are_constants_of_the_positions():
    """In training, forces of a cloud are then those of its own energy; the values stay."""
    net, batch = model().train(), clouds()
    conv = net.distribution.network.conv1
    before, forces, _ = energy_and_forces(net, batch, 4, seed=2)
    conv.detached_statistics = True
    energy, detached, _ = energy_and_forces(net, batch, 4, seed=2)
    torch.testing.assert_close(energy, before)
    assert (detached - forces).abs().max() > 1e-6
    mean, variance = [], []
    hook = type(conv.norm)._scaling

    def seen(self, moments, count, dtype):
        mean.append(moments[0].detach()), variance.append(moments[1].detach())
        return hook(self, moments, count, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(conv.norm), "_scaling", seen)
        net(batch, 4, seed=2)
    net.eval()
    conv.norm.running_mean.copy_(mean[0])
    conv.norm.running_var.copy_(variance[0])
    alone, expected, _ = energy_and_forces(net, batch, 4, seed=2)
    torch.testing.assert_close(alone, energy)
    torch.testing.assert_close(detached, expected)


def test_other_models_are_refused(monkeypatch):
    net = model()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"^energy_and_forces: must not be compiled, which cannot differentiate inside"
    ):
        energy_and_forces(net, clouds(), 2)
    monkeypatch.undo()
    net.readout, net.backbone.head[5] = NodeReadout(displacement=True), torch.nn.Linear(8, 3).double()
    wanted = f"energy_and_forces: model must predict (B, 1) = ({B}, 1), got ({B}, {N}, 3)"
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$"):
        energy_and_forces(net, clouds(), 2)

"""Backbones: the two ways of attention, gradients, leading axes, a single node."""

import pytest
import torch

from probsym_fast.distributions import Learned, Uniform, VectorNeurons
from probsym_fast.groups import Euclidean, PointClouds, Symmetric, Translation
from probsym_fast.models import MessagePassing, NodeReadout, NodeVectors, PairTokens, Symmetrized, Transformer
from probsym_fast.models.backbones import transformer as module
from tests.conftest import GRADIENT, assert_near


def test_plain_attention_equals_the_fused_kernel(monkeypatch):
    net = Transformer(3, 8, 2, 2, 12, 7, 3).double()
    x = torch.randn(2, 4, 7, 3, dtype=torch.float64)
    found = []
    for limit in (0, 7):
        monkeypatch.setattr(module, "SHORT", limit)
        y = net(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))))
    for a, b in zip(*found, strict=True):
        assert_near(a, b, GRADIENT)


@pytest.mark.parametrize("limit", [0, 7])
def test_attention_drops_in_training_only(limit, monkeypatch):
    monkeypatch.setattr(module, "SHORT", limit)
    net, x = Transformer(3, 8, 1, 2, 12, 7, 3, dropout=0.5), torch.randn(4, 7, 3)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize(
    ("net", "shapes"),
    [
        (Transformer(3, 8, 2, 2, 12, 7, 3, read=[0, 4]), [(2, 7, 3)]),
        (MessagePassing(3, 2, 5, 2, 3), [(2, 2, 4, 3), (2, 1, 4, 4, 2)]),
    ],
    ids=["transformer", "message passing"],
)
def test_gradients(net, shapes):
    net = net.double()
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(net, inputs, fast_mode=True)
    (net(*inputs) * torch.randn_like(net(*inputs))).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_message_passing_takes_any_leading_axes():
    net = MessagePassing(3, 2, 5, 2, 4).double()
    x, e = torch.randn(2, 3, 4, 3).double(), torch.randn(2, 4, 4, 2).double()
    expected = torch.stack([torch.stack([net(x[b, s], e[b]) for s in range(3)]) for b in range(2)])
    assert_near(net(x, e[:, None]), expected)
    assert_near(net(x[:, 0], e), expected[:, 0])


def test_message_passing_of_one_node_has_no_messages():
    net = MessagePassing(3, 2, 5, 2, 4)
    x, edges = torch.randn(6, 1, 3), torch.randn(6, 1, 1, 2)
    assert torch.equal(net(x, edges), net(x, 10 * edges))
    assert net(x, edges).isfinite().all()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (0, 3), (3, 0)])
def test_any_leading_axes(lead):
    net = Transformer(3, 8, 2, 2, 12, 7, 4, read=[0, 4]).double()
    x = torch.randn(*lead, 7, 3, dtype=torch.float64)
    y = net(x)
    assert y.shape == (*lead, 2, 4)
    assert_near(y, net(x.reshape(-1, 7, 3)).reshape(y.shape)) if y.numel() else y.sum().backward()
    net = MessagePassing(3, 2, 5, 2, 4)
    y = net(torch.randn(*lead, 4, 3), torch.randn(*lead, 4, 4, 2))
    assert y.shape == (*lead, 4, 4)


EMPTY = {  # (group, scores and matrices the network makes)
    "S5": (Symmetric(5) * Translation(3), True, False),
    "O3": (Euclidean(3), False, True),
    "S5xO3": (Symmetric(5) * Euclidean(3), True, True),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("symmetry", EMPTY)
def test_no_clouds_at_all(symmetry, learned, training):
    group, scores, matrices = EMPTY[symmetry]
    network = VectorNeurons(width=4, scores=scores, matrices=matrices)
    distribution = Learned(group, network, tau=0.1) if learned else Uniform(group)
    batch = PointClouds(torch.randn(0, 5, 3), torch.randn(0, 5, 3), torch.randn(0, 5, 5, 2))
    for model in (
        Symmetrized(Transformer(layers=1, read=range(0, 25, 6)), PairTokens(), NodeReadout(True), distribution),
        Symmetrized(MessagePassing(), NodeVectors(), NodeReadout(False), distribution),
    ):
        prediction, penalties = model.train(training)(batch, 4)
        assert prediction.shape == (0, 5, 3)
        sum(penalties.values(), prediction.sum()).backward()
        assert all(value.isfinite().all() for value in model.buffers())

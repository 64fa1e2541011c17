"""Backbones: the two ways of attention, gradients, leading axes, a single node."""

import pytest
import torch

from probsym_fast.models import MessagePassing, Transformer
from probsym_fast.models import transformer as module
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

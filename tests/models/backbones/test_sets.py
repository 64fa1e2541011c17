"""The Transformer over any number of tokens, without positions, and with lengths."""

import re

import pytest
import torch
from torch.export import Dim

from probsym_fast.models import Transformer
from probsym_fast.models.backbones.transformer import SHORT, TOKENS
from tests.conftest import assert_near

LENGTHS = torch.tensor([[1, 7, 3], [7, 5, 2]])


def network(tokens: int | None = None, dropout: float = 0.0, **settings) -> Transformer:
    return Transformer(4, 8, 2, 2, 12, tokens=tokens, out_features=3, dropout=dropout, **settings).double()


def outputs(net: Transformer, x: torch.Tensor, lengths: torch.Tensor | None = None):
    """And the gradients."""
    x = x.clone().requires_grad_()
    y = net(x, lengths)
    return y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])


@pytest.mark.parametrize("tokens", [None, 7])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all", "lengths"])
def test_modules_give_what_the_op_gives(tokens, lengths):
    net, x = network(tokens), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    assert net.why_not(x.device, x.dtype) is None
    net.one_pass = True  # for few sequences too
    found = outputs(net, x, lengths)
    net.one_pass = False
    for a, b in zip(found, outputs(net, x, lengths), strict=True):
        assert_near(a, b, {torch.float64: 1e-10})


@pytest.mark.parametrize("one_pass", [True, False])
def test_tokens_are_a_set(one_pass):
    net, x = network(), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    net.one_pass, order = one_pass, torch.randperm(7)
    assert_near(net(x[:, :, order]), net(x)[:, :, order], {torch.float64: 1e-12})
    assert [name for name in net.state_dict() if "positions" in name] == []
    net.load_state_dict({name: p for name, p in network(7).state_dict().items() if name != "positions"})


@pytest.mark.parametrize("L", [7, 45, 70], ids=["plain", "fused attention", "too long for the op"])
@pytest.mark.parametrize("one_pass", [True, False])
def test_later_tokens_are_not_read(L, one_pass):
    net, lengths = network(), torch.tensor([3, L, 1])
    net.one_pass = one_pass
    x = torch.randn(3, L, 4, dtype=torch.float64)
    found = outputs(net, x, lengths)
    after = torch.arange(L) >= lengths[:, None]
    assert not found[0][after].any() and not found[1][after].any()
    x[after] = torch.nan
    for a, b in zip(found, outputs(net, x, lengths), strict=True):
        assert torch.equal(a, b)
    assert_near(net(x[:1, :3]), found[0][:1, :3], {torch.float64: 1e-12})


def test_dropout_and_autocast():
    net, x = network(dropout=0.5).float(), torch.randn(2, 3, 7, 4)
    assert not torch.equal(net(x, LENGTHS), net(x, LENGTHS))
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, LENGTHS)
    assert (y.float() - net(x, LENGTHS)).abs().max() < 0.1


@pytest.mark.parametrize("one_pass", [True, False])
def test_exported_for_any_number_of_tokens(one_pass):
    net = network().eval()
    net.one_pass = one_pass
    x = torch.randn(4, 7, 4, dtype=torch.float64)
    sizes = {0: Dim.DYNAMIC, 1: Dim("L", min=2, max=TOKENS if one_pass else SHORT)}, {0: Dim.DYNAMIC}
    program = torch.export.export(net, (x, torch.tensor([1, 7, 3, 2])), dynamic_shapes=sizes).module()
    for M, L in ((4, 7), (3, 9)):
        x, lengths = torch.randn(M, L, 4, dtype=torch.float64), torch.randint(1, L + 1, (M,))
        assert_near(program(x, lengths), net(x, lengths), {torch.float64: 1e-12})
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x, lengths), net(x, lengths), {torch.float64: 1e-12})


def test_wrong_arguments():
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    for net, given, message in (
        (network(), (x[..., 0],), "x must be (..., L, 4) with L >= 1, got (2, 3, 7)"),
        (network(), (x[:, :, :0],), "x must be (..., L, 4) with L >= 1, got (2, 3, 0, 4)"),
        (network(5), (x,), "x must be (..., 5, 4), got (2, 3, 7, 4)"),
        (network(), (x, LENGTHS.T), "lengths must be (2, 3) int64, got (3, 2) torch.int64"),
        (network(), (x, LENGTHS.int()), "lengths must be (2, 3) int64, got (2, 3) torch.int32"),
        (network(7, read=[0]), (x, LENGTHS), "read must be None where lengths are given, got both"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'Transformer: {message}')}$"):
            net(*given)
    for one_pass in (True, False):
        net = network()
        net.one_pass = one_pass
        with pytest.raises(ValueError, match=r"^transformer: each of lengths must be in 1\.\.7, got 0$"):
            net(x, LENGTHS - 1)
    with pytest.raises(ValueError, match=r"^Transformer: read must be None for any number of tokens, got \[0\]$"):
        network(read=[0])
